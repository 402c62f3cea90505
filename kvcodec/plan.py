"""Plans: where everything lies in the pages of one namespace, codec and key length; and whether
a spec can be honoured for them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import xxhash

from kvcodec.derotation import ROTARY_EXTENSION, ROTATED_ROLES, rotary_of_page, settled_codecs
from kvcodec.errors import ConfigError
from kvcodec.format import (
    CHECKSUM_BYTES,
    FIXED,
    MAGIC,
    MAJOR,
    MAX_HEADER_BYTES,
    MINOR,
    PAGE_BYTES_OFFSET,
    PAGE_BYTES_SIZE,
    SECTION,
    SIZE_BYTES,
    STREAM,
    Extension,
    PageHeader,
    extension_record,
    pad64,
    section_row,
    section_stored_bytes,
)
from kvcodec.identity import MAX_KEY_BYTES, Namespace, encode_key, layout_record
from kvcodec.layout import PageLayout, Stream
from kvcodec.profile import PROFILE_EXTENSION
from kvcodec.rotary import Rotary
from kvcodec.section import Kind, SectionCodec, Transform
from kvcodec.spec import CodecSpec

__all__ = ["PagePlan", "check_spec"]

#: A coded section is cut into tiles of one head (FORMAT.md 3.5). One below the smallest does not
#: pay for its states.
_MAX_TILE_TOKENS = 64
_MAX_TILE_ELEMENTS = 256
_MIN_CODED_TILE = 512


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PagePlan:
    """Where everything lies in the pages of one namespace, codec and key length.

    `header` is a finished header but for the key, the section checksums and the header checksum,
    which are zero. Where a section is coded its size and the size of the page are zero there too,
    and `stored_bytes`, `section_offsets` and `page_bytes` are upper bounds.
    """

    layout: PageLayout
    codecs: tuple[SectionCodec, ...]
    header: bytes
    key_offset: int
    key_bytes: int
    stored_bytes: npt.NDArray[np.uint64]
    section_offsets: npt.NDArray[np.uint64]
    checksum_offsets: npt.NDArray[np.uint64]
    size_offsets: npt.NDArray[np.uint64]
    page_bytes: int
    rotary: Rotary | None = None

    @property
    def is_fixed(self) -> bool:
        """Whether every page has exactly `page_bytes`."""
        return not self.size_offsets.any()

    @classmethod
    def build(
        cls,
        namespace: Namespace,
        codecs: Sequence[SectionCodec],
        key_bytes: int,
        extensions: Sequence[Extension] = (),
        rotary: Rotary | None = None,
    ) -> PagePlan:
        """Plan pages to be written. `codecs` holds one codec per section; raises `ConfigError`
        beyond a limit.

        With `rotary`, keys in `ecq` per channel may be stored with their rotation taken out, and
        derotated ones are, which the pages then say in an extension. Where nothing can use it, it
        is ignored; without it, derotated codecs are plain.
        """
        layout = namespace.layout
        if len(codecs) != layout.section_count:
            raise ConfigError(f"{len(codecs)} codecs for {layout.section_count} sections")
        if not 1 <= key_bytes <= MAX_KEY_BYTES:
            raise ConfigError(f"a page key of {key_bytes} bytes; allowed is 1 to {MAX_KEY_BYTES}")
        streams = layout.streams * layout.layer_count
        resolved = tuple(
            codec.resolved(stream.head_size, layout.token_count)
            for codec, stream in zip(settled_codecs(codecs, layout, rotary), streams, strict=True)
        )
        rows = [
            section_row(layout, stream, codec)
            for codec, stream in zip(resolved, streams, strict=True)
        ]
        if rotary is not None and any(map(_may_derotate, resolved, streams)):
            extensions = [*extensions, Extension(ROTARY_EXTENSION, rotary.record)]
            extensions.sort(key=lambda extension: extension.type)
        else:
            rotary = None
        plan = cls._assemble(
            namespace, resolved, np.array(rows, SECTION), key_bytes, tuple(extensions)
        )
        return replace(plan, rotary=rotary)

    @classmethod
    def for_spec(
        cls,
        namespace: Namespace,
        spec: CodecSpec,
        key_bytes: int,
        rotary: Rotary | None = None,
        *,
        codecs: Sequence[SectionCodec] | None = None,
    ) -> PagePlan:
        """Plan pages to be written as `spec` says; they name the profile it comes from, if any.
        `codecs` take the place of its own, as a byte budget lowers them.
        """
        named = () if spec.profile is None else (spec.profile.digest,)
        return cls.build(
            namespace,
            spec.section_codecs(namespace.layout) if codecs is None else codecs,
            key_bytes,
            [Extension(PROFILE_EXTENSION, digest) for digest in named],
            rotary,
        )

    @classmethod
    def _assemble(
        cls,
        namespace: Namespace,
        codecs: tuple[SectionCodec, ...],
        table: npt.NDArray[np.void],
        key_bytes: int,
        extensions: tuple[Extension, ...],
    ) -> PagePlan:
        fixed, streams = layout_record(namespace.layout)
        identity = namespace.identity.record
        extras = extension_record(extensions)
        table_offset = FIXED.size + len(streams)
        key_offset = table_offset + table.nbytes + len(identity)
        end = key_offset + key_bytes + len(extras) + CHECKSUM_BYTES
        header_bytes = pad64(end)
        if header_bytes > MAX_HEADER_BYTES:
            raise ConfigError(
                f"the header would take {header_bytes} bytes, allowed is {MAX_HEADER_BYTES}"
            )
        places = _places(namespace.layout, codecs, header_bytes, table_offset)
        page_bytes = places["page_bytes"] if not places["size_offsets"].any() else 0
        start = FIXED.pack(
            MAGIC,
            MAJOR,
            MINOR,
            header_bytes,
            page_bytes,
            0,
            0,
            fixed,
            len(table),
            len(identity),
            key_bytes,
            len(extras),
            bytes(8),
        )
        body = start + streams + table.tobytes() + identity + bytes(key_bytes) + extras
        return cls(
            layout=namespace.layout,
            codecs=codecs,
            header=body.ljust(header_bytes, b"\0"),
            key_offset=key_offset,
            key_bytes=key_bytes,
            **places,
        )

    @classmethod
    def of_page(cls, header: PageHeader, data: memoryview) -> PagePlan:
        """The plan under which a page was written; `data` starts with its (verified) header.

        Raises `CorruptPage` if its rotary parameters are none.
        """
        raw = bytearray(data[: header.header_bytes])
        fixed = FIXED.unpack_from(raw)
        streams_bytes = len(header.layout.streams) * STREAM.size
        table_offset = FIXED.size + streams_bytes
        key_offset = table_offset + len(header.codecs) * SECTION.itemsize + fixed[9]
        key_bytes = fixed[10]
        places = _places(header.layout, header.codecs, header.header_bytes, table_offset)
        holes = [(offset, CHECKSUM_BYTES) for offset in places["checksum_offsets"].tolist()]
        holes += [(offset, SIZE_BYTES) for offset in places["size_offsets"].tolist() if offset]
        holes += [(header.header_bytes - CHECKSUM_BYTES, CHECKSUM_BYTES), (key_offset, key_bytes)]
        if places["size_offsets"].any():
            holes.append((PAGE_BYTES_OFFSET, PAGE_BYTES_SIZE))
        for offset, size in holes:
            raw[offset : offset + size] = bytes(size)
        return cls(
            layout=header.layout,
            codecs=header.codecs,
            header=bytes(raw),
            key_offset=key_offset,
            key_bytes=key_bytes,
            rotary=_rotary(header),
            **places,
        )

    def finished_header(
        self, key: str, checksums: Sequence[int], stored_bytes: Sequence[int] | None = None
    ) -> bytes:
        """The header of one page, given the checksums of its sections, and their lengths where they
        are not all those of the plan.
        """
        raw = bytearray(self.header)
        raw[self.key_offset : self.key_offset + self.key_bytes] = encode_key(key)
        sizes = self.stored_bytes.tolist() if stored_bytes is None else stored_bytes
        for offset, size in zip(self.size_offsets.tolist(), sizes, strict=True):
            if offset:
                struct.pack_into("<I", raw, offset, size)
        struct.pack_into("<Q", raw, PAGE_BYTES_OFFSET, len(raw) + sum(map(pad64, sizes)))
        for offset, checksum in zip(self.checksum_offsets.tolist(), checksums, strict=True):
            struct.pack_into("<Q", raw, offset, checksum)
        struct.pack_into(
            "<Q", raw, len(raw) - CHECKSUM_BYTES, xxhash.xxh3_64_intdigest(raw[:-CHECKSUM_BYTES])
        )
        return bytes(raw)


def _may_derotate(codec: SectionCodec, stream: Stream) -> bool:
    if codec.transform is Transform.DEROTATED:
        return True
    return codec.kind is Kind.ECQ and bool(codec.axis) and stream.role in ROTATED_ROLES


def _rotary(header: PageHeader) -> Rotary | None:
    """What the pages say of the rotation of their keys, where a section may have used it."""
    streams = header.layout.streams * header.layout.layer_count
    if not any(map(_may_derotate, header.codecs, streams)):
        return None
    return rotary_of_page(header.extensions)


class _Places(TypedDict):
    stored_bytes: npt.NDArray[np.uint64]
    section_offsets: npt.NDArray[np.uint64]
    checksum_offsets: npt.NDArray[np.uint64]
    size_offsets: npt.NDArray[np.uint64]
    page_bytes: int


def _places(
    layout: PageLayout, codecs: Sequence[SectionCodec], header_bytes: int, table_offset: int
) -> _Places:
    """Where sections, their checksums and their sizes lie."""
    streams = layout.streams * layout.layer_count
    stored = [
        section_stored_bytes(layout.dtype, stream, layout.token_count, codec)
        for stream, codec in zip(streams, codecs, strict=True)
    ]
    offsets = list(accumulate(map(pad64, stored), initial=header_bytes))
    rows = table_offset + np.arange(len(codecs)) * SECTION.itemsize
    assert SECTION.fields is not None
    coded = np.array([codec.kind.is_coded for codec in codecs])
    return {
        "stored_bytes": np.array(stored, np.uint64),
        "section_offsets": np.array(offsets[:-1], np.uint64),
        "checksum_offsets": (rows + SECTION.fields["checksum"][1]).astype(np.uint64),
        "size_offsets": np.where(coded, rows + SECTION.fields["stored_bytes"][1], 0).astype(
            np.uint64
        ),
        "page_bytes": offsets[-1],
    }


def check_spec(spec: CodecSpec, layout: PageLayout, minimum_bits: int) -> None:
    """Raise `ConfigError` for a section that would not shrink, a layer that is not there, too few
    bits, or the profile of another model.
    """
    if spec.profile is not None:
        spec.profile.check(layout)
    layers = [layer for layer, _, _ in spec.layers]
    if layers and not any(
        layout.layer_start <= layer < layout.layer_start + layout.layer_count for layer in layers
    ):
        raise ConfigError(
            f"the layer table names layers {layers[0]} to {layers[-1]}; this rank has "
            f"{layout.layer_start} to "
            f"{layout.layer_start + layout.layer_count - 1}"
        )
    for index, codec in enumerate(spec.section_codecs(layout)):
        if codec.kind is Kind.RAW:
            continue
        stream = layout.streams[index % len(layout.streams)]
        stored = section_stored_bytes(layout.dtype, stream, layout.token_count, codec)
        raw = layout.section_raw_bytes(stream)
        tile = min(layout.token_count, _MAX_TILE_TOKENS) * min(stream.head_size, _MAX_TILE_ELEMENTS)
        if codec.kind.is_coded and tile < _MIN_CODED_TILE:
            raise ConfigError(
                f"{codec.text} needs {_MIN_CODED_TILE} elements of a head in a page, "
                f"{layout.token_count} tokens have {tile}: use pages of more tokens"
            )
        if stored >= raw and not codec.kind.is_coded:
            raise ConfigError(
                f"{codec.text} turns a {stream.role.text} section of {raw} bytes into {stored}: "
                f"use pages of more than {layout.token_count} tokens, or larger or per-token groups"
            )
        if codec.nominal_bits is not None and codec.nominal_bits < minimum_bits:
            raise ConfigError(
                f"minimum_bits is {minimum_bits}, but the spec itself stores {codec.text}"
            )
