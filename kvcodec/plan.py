"""Plans: where everything lies in the pages of one namespace, codec and key length; and whether
a spec can be honoured for them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from kvcodec.errors import ConfigError
from kvcodec.format import (
    CHECKSUM_BYTES,
    FIXED,
    MAGIC,
    MAJOR,
    MAX_HEADER_BYTES,
    MINOR,
    SECTION,
    STREAM,
    Extension,
    PageHeader,
    extension_record,
    pad64,
    section_row,
    section_stored_bytes,
)
from kvcodec.identity import MAX_KEY_BYTES, Namespace, encode_key, layout_record
from kvcodec.layout import PageLayout
from kvcodec.spec import CodecSpec, Kind, SectionCodec

__all__ = ["PagePlan", "check_spec"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PagePlan:
    """Where everything lies in the pages of one namespace, codec and key length.

    `header` is a finished header but for the key, the section checksums and the header checksum,
    which are zero.
    """

    layout: PageLayout
    codecs: tuple[SectionCodec, ...]
    header: bytes
    key_offset: int
    key_bytes: int
    stored_bytes: npt.NDArray[np.uint64]
    section_offsets: npt.NDArray[np.uint64]
    checksum_offsets: npt.NDArray[np.uint64]
    page_bytes: int

    @classmethod
    def build(
        cls,
        namespace: Namespace,
        codecs: Sequence[SectionCodec],
        key_bytes: int,
        extensions: Sequence[Extension] = (),
    ) -> PagePlan:
        """Plan pages to be written. `codecs` holds one codec per section; raises `ConfigError`
        beyond a limit.
        """
        layout = namespace.layout
        if len(codecs) != layout.section_count:
            raise ConfigError(f"{len(codecs)} codecs for {layout.section_count} sections")
        if not 1 <= key_bytes <= MAX_KEY_BYTES:
            raise ConfigError(f"a page key of {key_bytes} bytes; allowed is 1 to {MAX_KEY_BYTES}")
        streams = layout.streams * layout.layer_count
        resolved = tuple(
            codec.resolved(stream.head_size, layout.token_count)
            for codec, stream in zip(codecs, streams, strict=True)
        )
        rows = [
            section_row(layout, stream, codec)
            for codec, stream in zip(resolved, streams, strict=True)
        ]
        return cls._assemble(
            namespace, resolved, np.array(rows, SECTION), key_bytes, tuple(extensions)
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
        stored = table["stored_bytes"].astype(np.uint64)
        padded = (stored + np.uint64(63)) & ~np.uint64(63)
        offsets = np.uint64(header_bytes) + np.concatenate(
            [[np.uint64(0)], np.cumsum(padded)]
        ).astype(np.uint64)
        page_bytes = int(offsets[-1])
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
            stored_bytes=stored,
            section_offsets=offsets[:-1],
            checksum_offsets=_checksum_offsets(table_offset, len(table)),
            page_bytes=page_bytes,
        )

    @classmethod
    def of_page(cls, header: PageHeader, data: memoryview) -> PagePlan:
        """The plan under which a page was written; `data` starts with its (verified) header."""
        raw = bytearray(data[: header.header_bytes])
        fixed = FIXED.unpack_from(raw)
        streams_bytes = len(header.layout.streams) * STREAM.size
        table_offset = FIXED.size + streams_bytes
        key_offset = table_offset + len(header.codecs) * SECTION.itemsize + fixed[9]
        key_bytes = fixed[10]
        checksum_offsets = _checksum_offsets(table_offset, len(header.codecs))
        for offset in [*checksum_offsets.tolist(), header.header_bytes - CHECKSUM_BYTES]:
            raw[offset : offset + CHECKSUM_BYTES] = bytes(CHECKSUM_BYTES)
        raw[key_offset : key_offset + key_bytes] = bytes(key_bytes)
        return cls(
            layout=header.layout,
            codecs=header.codecs,
            header=bytes(raw),
            key_offset=key_offset,
            key_bytes=key_bytes,
            stored_bytes=np.array(header.stored_bytes, np.uint64),
            section_offsets=np.array(header.section_offsets, np.uint64),
            checksum_offsets=checksum_offsets,
            page_bytes=header.page_bytes,
        )

    def finished_header(self, key: str, checksums: Sequence[int]) -> bytes:
        """The header of one page, given the checksums of its sections."""
        raw = bytearray(self.header)
        raw[self.key_offset : self.key_offset + self.key_bytes] = encode_key(key)
        for offset, checksum in zip(self.checksum_offsets.tolist(), checksums, strict=True):
            struct.pack_into("<Q", raw, offset, checksum)
        struct.pack_into(
            "<Q", raw, len(raw) - CHECKSUM_BYTES, xxhash.xxh3_64_intdigest(raw[:-CHECKSUM_BYTES])
        )
        return bytes(raw)


def _checksum_offsets(table_offset: int, section_count: int) -> npt.NDArray[np.uint64]:
    first = table_offset + SECTION.fields["checksum"][1]  # type: ignore[index]
    return (first + np.arange(section_count) * SECTION.itemsize).astype(np.uint64)


def check_spec(spec: CodecSpec, layout: PageLayout, minimum_bits: int) -> None:
    """Raise `ConfigError` for a section that would not shrink, a layer that is not there, or too
    few bits.
    """
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
        if stored >= raw:
            raise ConfigError(
                f"{codec.text} turns a {stream.role.text} section of {raw} bytes into {stored}: "
                f"use pages of more than {layout.token_count} tokens, or larger or per-token groups"
            )
        if codec.bits < minimum_bits:
            raise ConfigError(
                f"minimum_bits is {minimum_bits}, but the spec itself stores {codec.text}"
            )
