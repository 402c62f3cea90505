"""What the pages of a batch have in common, as the native library takes it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcodec.errors import NativeError
from kvcodec.native import _library
from kvcodec.native._library import address_of

__all__ = ["Plan", "RotaryPairs", "Section", "StreamRows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRows:
    """One stream of the layout, and the distances in bytes between its rows in host memory.

    `is_rotated`: its rows hold the rotary pairs of the plan.
    """

    head_count: int
    head_size: int
    group_heads: int
    layer_stride: int
    group_stride: int
    head_stride: int
    token_stride: int
    is_rotated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One section: its codec, and where it, its checksum and its size lie in a page. `transform`:
    1 is derotated, 2 Hadamard.

    Of a coded section `stored_bytes` and `offset` are upper bounds, and `size_offset` is where the
    header says how long it is; of others that is 0.
    """

    kind: int
    bits: int
    asymmetric: bool
    channel: bool
    transform: int = 0
    group_size: int
    offset: int
    stored_bytes: int
    checksum_offset: int
    size_offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RotaryPairs:
    """Which elements of a row are rotated together, and by what: `table` has the shape (tokens,
    pairs, 2), float32, with cosine and sine.
    """

    interleaved: bool
    table: npt.NDArray[np.float32]


class Plan:
    """Everything the pages of a batch have in common; immutable.

    `header` is a finished header whose key and checksums are zero, and so are the sizes of what is
    coded; `size_offset` is then where the header says how long the page is. The numbers are checked
    against each other when a batch is submitted.
    """

    def __init__(
        self,
        *,
        dtype: int,
        token_count: int,
        layer_count: int,
        streams: Sequence[StreamRows],
        sections: Sequence[Section],
        header: bytes,
        key_offset: int,
        key_bytes: int,
        page_bytes: int,
        size_offset: int = 0,
        rotary: RotaryPairs | None = None,
    ) -> None:
        self.stream_count = len(streams)
        self.key_bytes = key_bytes
        self.page_bytes = page_bytes
        self._header = header
        stream_rows = [
            (
                s.head_count,
                s.head_size,
                s.group_heads,
                s.is_rotated,
                s.layer_stride,
                s.group_stride,
                s.head_stride,
                s.token_stride,
            )
            for s in streams
        ]
        section_rows = [
            (
                s.kind,
                s.bits,
                s.asymmetric | s.channel << 1 | s.transform << 2,
                0,
                s.group_size,
                s.offset,
                s.stored_bytes,
                s.checksum_offset,
                s.size_offset,
            )
            for s in sections
        ]
        self._streams = np.array(stream_rows, _library.STREAM)
        self._sections = np.array(section_rows, _library.SECTION)
        small = {
            "dtype": dtype,
            "token_count": token_count,
            "layer_count": layer_count,
            "stream_count": len(streams),
            "section_count": len(sections),
            "header_bytes": len(header),
            "key_offset": key_offset,
            "key_bytes": key_bytes,
            "size_offset": size_offset,
        }
        for name, number in small.items():
            if not 0 <= number < 1 << 32:  # ctypes would take it modulo 2^32
                raise NativeError(f"{name} is {number}, which does not fit 32 bits")
        if not 0 <= page_bytes < 1 << 64:
            raise NativeError(f"page_bytes is {page_bytes}, which does not fit 64 bits")
        self._rotary = None if rotary is None else self._rotary_structure(rotary, token_count)
        self.structure = _library.PlanStructure(
            abi_version=_library.ABI_VERSION,
            page_bytes=page_bytes,
            header=address_of(np.frombuffer(header, np.uint8)) if header else None,
            streams=address_of(self._streams),
            sections=address_of(self._sections),
            rotary=None if self._rotary is None else ctypes.addressof(self._rotary),
            **small,
        )

    def _rotary_structure(self, rotary: RotaryPairs, token_count: int) -> _library.RotaryStructure:
        self._table = np.ascontiguousarray(rotary.table, np.float32)
        if self._table.ndim != 3 or len(self._table) < token_count or self._table.shape[2] != 2:
            raise NativeError(f"a rotary table {self._table.shape} for {token_count} tokens")
        return _library.RotaryStructure(
            size=2 * self._table.shape[1],
            interleaved=rotary.interleaved,
            table=address_of(self._table),
        )
