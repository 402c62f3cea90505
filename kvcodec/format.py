"""Bytes <-> header. The only module that knows an offset; what the bytes mean is in
proto/FORMAT.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import xxhash

from kvcodec.derotation import check_derotation
from kvcodec.errors import (
    ConfigError,
    CorruptPage,
    MismatchedPage,
    QualityBelowMinimum,
    UnsupportedPage,
)
from kvcodec.extension import MAX_EXTENSION_BYTES, Extension, extension_record, parse_extensions
from kvcodec.identity import MAX_IDENTITY_BYTES, MAX_KEY_BYTES, Identity, Namespace
from kvcodec.layout import (
    MAX_LAYER_COUNT,
    MAX_SECTION_BYTES,
    MAX_STREAM_COUNT,
    DType,
    PageLayout,
    Role,
    Stream,
)
from kvcodec.section import RAW, Axis, Kind, SectionCodec, Transform

__all__ = [
    "CHECKSUM_BYTES",
    "FIXED",
    "MAGIC",
    "MAJOR",
    "MAX_EXTENSION_BYTES",
    "MAX_HEADER_BYTES",
    "MINOR",
    "PAGE_BYTES_OFFSET",
    "PAGE_BYTES_SIZE",
    "SECTION",
    "SIZE_BYTES",
    "STREAM",
    "EncodedPage",
    "Extension",
    "PageHeader",
    "extension_record",
    "pad64",
    "parameter_bytes",
    "section_row",
    "section_stored_bytes",
]

MAGIC = b"\x89KVC\r\n\x1a\n"
MAJOR = 1
MINOR = 0
MAX_HEADER_BYTES = 1 << 18
CHECKSUM_BYTES = 8
SIZE_BYTES = 4
PAGE_BYTES_OFFSET = 16
PAGE_BYTES_SIZE = 8

FIXED = struct.Struct("<8sHHIQII12sIHHI8s")
STREAM = struct.Struct("<B3sIII")
SECTION = np.dtype(
    [
        ("kind", "u1"),
        ("bits", "u1"),
        ("options", "u1"),
        ("table", "u1"),
        ("group_size", "<u4"),
        ("stored_bytes", "<u4"),
        ("side_bytes", "<u4"),
        ("checksum", "<u8"),
    ]
)
assert (FIXED.size, STREAM.size, SECTION.itemsize) == (64, 16, 24)

_ASYMMETRIC = 1
_CHANNEL = 2
_TRANSFORM_SHIFT = 2  # of two bits, of which one is set at most
_OPTIONS = 15
_MAX_HADAMARD_SIZE = 4096
_TABLE_VERSION = 1
#: What a row of the section table says, without the checksum.
_SETTINGS = ["kind", "bits", "options", "table", "group_size", "stored_bytes", "side_bytes"]


def pad64(size: int) -> int:
    """`size` rounded up to a multiple of 64."""
    return -(-size // 64) * 64


def parameter_bytes(stream: Stream, token_count: int, codec: SectionCodec) -> int:
    """Bytes of an int section's parameters, without padding. `codec` must be resolved."""
    if codec.kind is not Kind.INT:
        return 0
    if codec.axis is Axis.CHANNEL:
        groups = stream.head_count * -(-token_count // codec.group_size) * stream.head_size
    else:
        groups = stream.head_count * token_count * -(-stream.head_size // codec.group_size)
    return groups * (4 if codec.asymmetric else 2)


def section_stored_bytes(
    dtype: DType, stream: Stream, token_count: int, codec: SectionCodec
) -> int:
    """Exact bytes of a section, without its padding; of a coded one the most, what it takes raw.
    `codec` must be resolved.
    """
    rows = stream.head_count * token_count
    if codec.kind is Kind.FP8:
        return rows * stream.head_size
    if codec.kind is not Kind.INT:
        return rows * stream.head_size * dtype.itemsize
    if codec.axis is Axis.CHANNEL:
        words = -(-token_count * codec.bits // 32)
        codes = stream.head_count * words * stream.head_size * 4
    else:
        blocks, rest = divmod(stream.head_size, 64)
        codes = rows * (blocks * 8 * codec.bits + -(-rest * codec.bits // 8))
    return pad64(parameter_bytes(stream, token_count, codec)) + codes


@dataclass(frozen=True, slots=True, kw_only=True)
class PageHeader:
    """What a page says about itself. `section_offsets` tells where each section starts."""

    identity: Identity
    key: str
    layout: PageLayout
    codecs: tuple[SectionCodec, ...]
    stored_bytes: tuple[int, ...]
    checksums: tuple[int, ...]
    extensions: tuple[Extension, ...]
    minor: int
    header_bytes: int
    page_bytes: int
    section_offsets: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        sizes = (pad64(size) for size in self.stored_bytes[:-1])
        offsets = tuple(accumulate(sizes, initial=self.header_bytes))
        object.__setattr__(self, "section_offsets", offsets)

    @property
    def namespace(self) -> Namespace:
        """Where the page belongs."""
        return Namespace(self.identity, self.layout)

    @property
    def minimum_bits(self) -> int:
        """Whole bits per element of the coarsest section; one without loss counts its element's."""
        raw_bits = 8 * self.layout.dtype.itemsize
        bits = (codec.nominal_bits for codec in self.codecs)
        return int(min(raw_bits if found is None else found for found in bits))

    def expect(self, namespace: Namespace, key: str, *, minimum_bits: int = 0) -> None:
        """Raise `MismatchedPage`, naming the field, unless this is the page of `key` in
        `namespace`.
        """
        layout, wanted = self.layout, namespace.layout
        for name in ("dtype", "token_count", "layer_start", "layer_count", "streams"):
            _same(name, getattr(layout, name), getattr(wanted, name))
        found, expected = self.identity.as_dict(), namespace.identity.as_dict()
        for name in sorted(set(found) | set(expected)):
            _same(name if name in expected else "identity", found.get(name), expected.get(name))
        _same("key", self.key, key)
        # Nothing was lost where every section is exact, however few bits an element has.
        lossy = any(codec.nominal_bits is not None for codec in self.codecs)
        if self.minimum_bits < minimum_bits and lossy:
            raise QualityBelowMinimum(self.minimum_bits, minimum_bits)


def _same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise MismatchedPage(what, found, expected)


def section_row(layout: PageLayout, stream: Stream, codec: SectionCodec) -> tuple[int, ...]:
    """A section's row in the table, its checksum zero, and so the size of a coded one. Raises
    `ConfigError` beyond a limit.
    """
    if codec.kind is not Kind.RAW and not layout.dtype.is_quantizable:
        raise ConfigError(
            f"{layout.dtype.text} pages are stored raw; {codec.text} cannot be applied"
        )
    if codec.kind in (Kind.LOSSLESS, Kind.BLOCK) and layout.dtype.itemsize != 2:
        raise ConfigError(
            f"{codec.text} knows bf16 and fp16; {layout.dtype.text} pages can be stored raw"
        )
    size = stream.head_size
    if codec.transform is Transform.HADAMARD and (size & (size - 1) or size > _MAX_HADAMARD_SIZE):
        raise ConfigError(
            f"{codec.text} needs rows of a power of two, up to {_MAX_HADAMARD_SIZE}; "
            f"{stream.role.text} rows have {size} elements"
        )
    stored = section_stored_bytes(layout.dtype, stream, layout.token_count, codec)
    if stored > MAX_SECTION_BYTES:
        raise ConfigError(f"a section would take {stored} bytes, allowed is {MAX_SECTION_BYTES}")
    if codec.kind is Kind.RAW:
        return (Kind.RAW, 8 * layout.dtype.itemsize, 0, 0, 0, stored, 0, 0)
    options = _ASYMMETRIC * codec.asymmetric | _CHANNEL * (codec.axis is Axis.CHANNEL)
    options |= codec.transform << _TRANSFORM_SHIFT
    if codec.kind.is_coded:
        bits = codec.bits or 8 * layout.dtype.itemsize
        return (codec.kind, bits, options, _TABLE_VERSION, 0, 0, 0, 0)
    return (codec.kind, codec.bits, options, 0, max(codec.group_size, 0), stored, 0, 0)


@dataclass(frozen=True, slots=True)
class EncodedPage:
    """A page as stored: its verified header and all its bytes. Sections are verified when they are
    used.
    """

    header: PageHeader
    data: memoryview

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> EncodedPage:
        """Read and verify the header of a stored page.

        Raises `CorruptPage` for bytes that break the format and `UnsupportedPage` for a page of a
        newer version. The cost and the memory are bounded by the header's limits, whatever the
        bytes say.
        """
        view = memoryview(data).cast("B")
        return cls(_parse_header(view), view)

    def section(self, index: int) -> memoryview:
        """The stored bytes of a section and its padding. Raises `CorruptPage` if damaged."""
        offset = self.header.section_offsets[index]
        stored = self.header.stored_bytes[index]
        padded = self.data[offset : offset + pad64(stored)]
        if xxhash.xxh3_64_intdigest(padded) != self.header.checksums[index]:
            _corrupt("section_checksum", f"section {index} does not have its checksum")
        if any(padded[stored:]):
            _corrupt("padding", f"the padding of section {index} is not zero")
        return padded

    def verify(self) -> None:
        """Verify every section. Raises `CorruptPage` at the first damaged one."""
        for index in range(len(self.header.codecs)):
            self.section(index)


def _corrupt(what: str, message: str) -> NoReturn:
    raise CorruptPage(what, message)


def _parse_header(view: memoryview) -> PageHeader:
    if len(view) < 128:
        _corrupt("length", f"{len(view)} bytes are too few for a page")
    start = bytes(view[: FIXED.size])
    fixed = FIXED.unpack(start)
    magic, major, minor, header_bytes, page_bytes, required, _unused = fixed[:7]
    layout_bytes, section_count, identity_bytes, key_bytes, extension_bytes, reserved = fixed[7:]
    if magic != MAGIC:
        _corrupt("magic", "the object does not start like a page")
    if major != MAJOR:
        raise UnsupportedPage("version", major, MAJOR)
    if header_bytes % 64 or not 128 <= header_bytes <= MAX_HEADER_BYTES:
        _corrupt(
            "header_bytes",
            f"header_bytes is {header_bytes}; allowed are multiples of 64 to {MAX_HEADER_BYTES}",
        )
    if page_bytes != len(view):
        _corrupt("length", f"the page says {page_bytes} bytes, the object has {len(view)}")
    if header_bytes > page_bytes:
        _corrupt("header_bytes", f"a header of {header_bytes} bytes in a page of {page_bytes}")
    # What was read above is what is verified below, whoever else writes to this memory.
    header = start + bytes(view[FIXED.size : header_bytes])
    (checksum,) = struct.unpack_from("<Q", header, header_bytes - CHECKSUM_BYTES)
    if xxhash.xxh3_64_intdigest(header[:-CHECKSUM_BYTES]) != checksum:
        _corrupt("header_checksum", "the header does not have its checksum")
    if required:
        raise UnsupportedPage("required_flags", hex(required), "none")
    if any(reserved):
        raise UnsupportedPage("reserved", "reserved bytes of the header", "zero")
    layout = _parse_layout(header, layout_bytes, section_count)
    table_offset = FIXED.size + len(layout.streams) * STREAM.size
    identity_offset = table_offset + section_count * SECTION.itemsize
    key_offset = identity_offset + identity_bytes
    extension_offset = key_offset + key_bytes
    end = extension_offset + extension_bytes
    if pad64(end + CHECKSUM_BYTES) == header_bytes and any(header[end:-CHECKSUM_BYTES]):
        _corrupt("padding", "the padding of the header is not zero")
    if pad64(end + CHECKSUM_BYTES) != header_bytes:
        _corrupt(
            "header_bytes",
            f"the parts of the header end at {end}, which does not fit its {header_bytes} bytes",
        )
    if identity_bytes > MAX_IDENTITY_BYTES or not 1 <= key_bytes <= MAX_KEY_BYTES:
        _corrupt("limits", f"an identity of {identity_bytes} or a key of {key_bytes} bytes")
    table = np.frombuffer(header, SECTION, section_count, table_offset)
    codecs = _parse_table(layout, table, header_bytes, page_bytes)
    try:
        key = header[key_offset:extension_offset].decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptPage("key", f"the key is not UTF-8: {error}") from error
    extensions = parse_extensions(header[extension_offset:end])
    check_derotation(layout, codecs, extensions)
    return PageHeader(
        identity=Identity.parse(header[identity_offset:key_offset]),
        key=key,
        layout=layout,
        codecs=codecs,
        stored_bytes=tuple(table["stored_bytes"].tolist()),
        checksums=tuple(table["checksum"].tolist()),
        extensions=extensions,
        minor=minor,
        header_bytes=header_bytes,
        page_bytes=page_bytes,
    )


def _parse_layout(header: bytes, record: bytes, section_count: int) -> PageLayout:
    dtype, stream_count, layer_count, layer_start, token_count = struct.unpack("<BBHII", record)
    if not 1 <= stream_count <= MAX_STREAM_COUNT or not 1 <= layer_count <= MAX_LAYER_COUNT:
        _corrupt("limits", f"{stream_count} streams, {layer_count} layers")
    if section_count != layer_count * stream_count:
        _corrupt(
            "section_count",
            f"{section_count} sections for {layer_count} layers of {stream_count} streams",
        )
    streams = []
    try:
        for index in range(stream_count):
            role, zero, heads, size, start = STREAM.unpack_from(
                header, FIXED.size + index * STREAM.size
            )
            if any(zero):
                raise UnsupportedPage("reserved", f"reserved bytes of stream {index}", "zero")
            streams.append(Stream(Role(role), heads, size, start))
        return PageLayout(
            dtype=DType(dtype),
            token_count=token_count,
            layer_count=layer_count,
            layer_start=layer_start,
            streams=tuple(streams),
        )
    except ValueError as error:
        raise CorruptPage("layout", f"impossible layout: {error}") from error


def _parse_table(
    layout: PageLayout, table: npt.NDArray[np.void], header_bytes: int, page_bytes: int
) -> tuple[SectionCodec, ...]:
    """The codecs of all sections. Equal rows are checked once, so the cost follows the number of
    distinct codecs.
    """
    codecs: list[SectionCodec] = [RAW] * len(table)
    for index, stream in enumerate(layout.streams):
        rows = table[index :: len(layout.streams)]
        settings = rows[_SETTINGS].copy()
        coded = np.isin(settings["kind"], [kind for kind in Kind if kind.is_coded])
        most = section_stored_bytes(layout.dtype, stream, layout.token_count, RAW)
        if ((rows["stored_bytes"] == 0) | (rows["stored_bytes"] > most))[coded].any():
            _corrupt("section", f"a coded section of no bytes, or of more than its {most} raw ones")
        settings["stored_bytes"][coded] = 0
        known = {row: _row_codec(layout, stream, row) for row in set(settings.tolist())}
        codecs[index :: len(layout.streams)] = [known[row] for row in settings.tolist()]
    total = header_bytes + sum(pad64(size) for size in table["stored_bytes"].tolist())
    if total != page_bytes:
        _corrupt("length", f"header and sections take {total} bytes, the page says {page_bytes}")
    return tuple(codecs)


@lru_cache(maxsize=256)
def _row_codec(layout: PageLayout, stream: Stream, row: tuple[int, ...]) -> SectionCodec:
    kind, bits, options, table, group_size, _, side_bytes = row
    if kind not in list(Kind):
        raise UnsupportedPage("section_kind", kind, ", ".join(f"{k} ({k.name})" for k in Kind))
    if options & ~_OPTIONS:
        raise UnsupportedPage("reserved", f"section options {options:#x}", "bits 0 to 3")
    if side_bytes or table != _TABLE_VERSION * Kind(kind).is_coded:
        raise UnsupportedPage("section", f"coding table {table}, {side_bytes} side bytes", "none")
    axis = Axis.CHANNEL if options & _CHANNEL else Axis.TOKEN
    try:
        if kind == Kind.INT:
            length = layout.token_count if axis is Axis.CHANNEL else stream.head_size
            if not 1 <= group_size <= length:
                _corrupt("section", f"an int section with groups of {group_size} along {length}")
            transform = Transform(options >> _TRANSFORM_SHIFT)
            asymmetric = bool(options & _ASYMMETRIC)
            codec = SectionCodec(Kind.INT, bits, asymmetric, axis, group_size, transform)
        elif kind == Kind.RAW:
            codec = RAW
        else:
            bits = bits if kind in (Kind.ECQ, Kind.FP8) else 0
            codec = SectionCodec(Kind(kind), bits, axis=axis)
        wanted = section_row(layout, stream, codec)[:-1]
    except (ConfigError, ValueError) as error:
        raise CorruptPage("section", str(error)) from error
    if wanted != row:
        _corrupt("section", f"a section entry says {row}; wanted {wanted}")
    return codec
