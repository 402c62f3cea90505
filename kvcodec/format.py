"""Bytes <-> header. The only module that knows an offset; what the bytes mean is in
proto/FORMAT.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import xxhash

from kvcodec.errors import (
    ConfigError,
    CorruptPage,
    MismatchedPage,
    QualityBelowMinimum,
    UnsupportedPage,
)
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
from kvcodec.spec import RAW, Axis, Kind, SectionCodec

__all__ = [
    "CHECKSUM_BYTES",
    "FIXED",
    "MAGIC",
    "MAJOR",
    "MAX_EXTENSION_BYTES",
    "MAX_HEADER_BYTES",
    "MINOR",
    "SECTION",
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
MAX_EXTENSION_BYTES = 65536
CHECKSUM_BYTES = 8

FIXED = struct.Struct("<8sHHIQII12sIHHI8s")
STREAM = struct.Struct("<B3sIII")
_EXTENSION = struct.Struct("<HHI")
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


def pad64(size: int) -> int:
    """`size` rounded up to a multiple of 64."""
    return -(-size // 64) * 64


def parameter_bytes(stream: Stream, token_count: int, codec: SectionCodec) -> int:
    """Bytes of a section's parameters, without padding. `codec` must be resolved."""
    if codec.kind is Kind.RAW:
        return 0
    if codec.axis is Axis.CHANNEL:
        groups = stream.head_count * -(-token_count // codec.group_size) * stream.head_size
    else:
        groups = stream.head_count * token_count * -(-stream.head_size // codec.group_size)
    return groups * (4 if codec.asymmetric else 2)


def section_stored_bytes(
    dtype: DType, stream: Stream, token_count: int, codec: SectionCodec
) -> int:
    """Exact bytes of a section, without its padding. `codec` must be resolved."""
    rows = stream.head_count * token_count
    if codec.kind is Kind.RAW:
        return rows * stream.head_size * dtype.itemsize
    if codec.axis is Axis.CHANNEL:
        words = -(-token_count * codec.bits // 32)
        codes = stream.head_count * words * stream.head_size * 4
    else:
        blocks, rest = divmod(stream.head_size, 64)
        codes = rows * (blocks * 8 * codec.bits + -(-rest * codec.bits // 8))
    return pad64(parameter_bytes(stream, token_count, codec)) + codes


@dataclass(frozen=True, slots=True)
class Extension:
    """One extension record of a header."""

    type: int
    data: bytes
    critical: bool = False


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
        """Bits per element of the coarsest section; a raw section counts its element's bits."""
        raw_bits = 8 * self.layout.dtype.itemsize
        return min(codec.bits if codec.kind is Kind.INT else raw_bits for codec in self.codecs)

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
        # Nothing was lost where every section is raw, however few bits an element has.
        if self.minimum_bits < minimum_bits and any(codec.bits for codec in self.codecs):
            raise QualityBelowMinimum(self.minimum_bits, minimum_bits)


def _same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise MismatchedPage(what, found, expected)


def section_row(layout: PageLayout, stream: Stream, codec: SectionCodec) -> tuple[int, ...]:
    """A section's row in the table, its checksum zero. Raises `ConfigError` beyond a limit."""
    if codec.kind is Kind.INT and not layout.dtype.is_quantizable:
        raise ConfigError(
            f"{layout.dtype.text} pages are stored raw; {codec.text} cannot be applied"
        )
    stored = section_stored_bytes(layout.dtype, stream, layout.token_count, codec)
    if stored > MAX_SECTION_BYTES:
        raise ConfigError(f"a section would take {stored} bytes, allowed is {MAX_SECTION_BYTES}")
    if codec.kind is Kind.RAW:
        return (Kind.RAW, 8 * layout.dtype.itemsize, 0, 0, 0, stored, 0, 0)
    options = _ASYMMETRIC * codec.asymmetric | _CHANNEL * (codec.axis is Axis.CHANNEL)
    return (Kind.INT, codec.bits, options, 0, codec.group_size, stored, 0, 0)


def extension_record(extensions: Sequence[Extension]) -> bytes:
    """The extensions as they stand in a header. Raises `ConfigError` beyond a limit."""
    types = [extension.type for extension in extensions]
    if types != sorted(set(types)) or not all(0 <= number <= 0xFFFF for number in types):
        raise ConfigError(f"extension types {types} are not ascending numbers of 16 bits")
    record = b"".join(
        _EXTENSION.pack(e.type, int(e.critical), len(e.data)) + e.data + bytes(-len(e.data) % 8)
        for e in extensions
    )
    if len(record) > MAX_EXTENSION_BYTES:
        raise ConfigError(
            f"the extensions take {len(record)} bytes, allowed is {MAX_EXTENSION_BYTES}"
        )
    return record


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
    return PageHeader(
        identity=Identity.parse(header[identity_offset:key_offset]),
        key=key,
        layout=layout,
        codecs=codecs,
        stored_bytes=tuple(table["stored_bytes"].tolist()),
        checksums=tuple(table["checksum"].tolist()),
        extensions=_parse_extensions(header[extension_offset:end]),
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
    if (table["table"] != 0).any() or (table["side_bytes"] != 0).any():
        raise UnsupportedPage("section", "a coding table or side information", "none")
    codecs: list[SectionCodec] = [RAW] * len(table)
    for index, stream in enumerate(layout.streams):
        rows = table[index :: len(layout.streams)]
        settings = rows[["kind", "bits", "options", "group_size", "stored_bytes"]].tolist()
        known = {row: _row_codec(layout, stream, *row) for row in set(settings)}
        codecs[index :: len(layout.streams)] = [known[row] for row in settings]
    total = header_bytes + sum(pad64(size) for size in table["stored_bytes"].tolist())
    if total != page_bytes:
        _corrupt("length", f"header and sections take {total} bytes, the page says {page_bytes}")
    return tuple(codecs)


@lru_cache(maxsize=256)
def _row_codec(
    layout: PageLayout,
    stream: Stream,
    kind: int,
    bits: int,
    options: int,
    group_size: int,
    stored_bytes: int,
) -> SectionCodec:
    if kind not in (Kind.RAW, Kind.INT):
        raise UnsupportedPage("section_kind", kind, "0 (raw), 1 (int)")
    if options & ~(_ASYMMETRIC | _CHANNEL):
        raise UnsupportedPage("reserved", f"section options {options:#x}", "bits 0 and 1")
    if kind == Kind.RAW:
        codec = RAW
    else:
        axis = Axis.CHANNEL if options & _CHANNEL else Axis.TOKEN
        length = layout.token_count if axis is Axis.CHANNEL else stream.head_size
        if bits not in (2, 4, 8) or not 1 <= group_size <= length:
            _corrupt(
                "section", f"int section with {bits} bits and groups of {group_size} along {length}"
            )
        codec = SectionCodec(Kind.INT, bits, bool(options & _ASYMMETRIC), axis, group_size)
    try:
        row = section_row(layout, stream, codec)
    except ConfigError as error:
        raise CorruptPage("section", str(error)) from error
    if (row[1], row[2], row[4], row[5]) != (bits, options, group_size, stored_bytes):
        _corrupt(
            "section",
            f"a section entry says {bits} bits, options {options:#x}, {stored_bytes} bytes; "
            f"wanted {row}",
        )
    return codec


def _parse_extensions(record: bytes) -> tuple[Extension, ...]:
    if len(record) > MAX_EXTENSION_BYTES or len(record) % 8:
        _corrupt("extensions", f"extensions of {len(record)} bytes")
    extensions: list[Extension] = []
    at = 0
    while at < len(record):
        kind, flags, size = _EXTENSION.unpack_from(record, at)
        end = at + _EXTENSION.size + size
        padded = -(-end // 8) * 8
        if padded > len(record) or any(record[end:padded]):
            _corrupt("extensions", "an extension runs past the end or has padding that is not zero")
        if flags & ~1:
            raise UnsupportedPage("reserved", f"extension flags {flags:#x}", "bit 0")
        if extensions and kind <= extensions[-1].type:
            _corrupt("extensions", f"extension {kind} is out of order")
        if flags & 1:
            raise UnsupportedPage("extension", kind, "none that is critical")
        extensions.append(Extension(kind, record[at + _EXTENSION.size : end]))
        at = padded
    return tuple(extensions)
