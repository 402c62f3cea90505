"""The shape of a raw page, and where raw pages lie in somebody's memory."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcodec.errors import ConfigError

__all__ = [
    "MAX_HEAD_COUNT",
    "MAX_HEAD_SIZE",
    "MAX_LAYER_COUNT",
    "MAX_SECTION_BYTES",
    "MAX_STREAM_COUNT",
    "MAX_TOKEN_COUNT",
    "DType",
    "PageLayout",
    "PageViews",
    "Role",
    "Stream",
    "StreamStrides",
]

MAX_STREAM_COUNT = 4
MAX_LAYER_COUNT = 1024
MAX_TOKEN_COUNT = 65536
MAX_HEAD_COUNT = 65536
MAX_HEAD_SIZE = 1 << 30
MAX_SECTION_BYTES = (1 << 31) - 1


class DType(enum.IntEnum):
    """Element types of a page; the values are those of the page format."""

    BF16 = 1
    FP16 = 2
    FP32 = 3
    FP8_E4M3 = 4
    FP8_E5M2 = 5
    U8 = 6

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return {DType.BF16: 2, DType.FP16: 2, DType.FP32: 4}.get(self, 1)

    @property
    def is_quantizable(self) -> bool:
        """Whether the int codecs apply; the others are stored raw."""
        return self in (DType.BF16, DType.FP16, DType.FP32)

    @property
    def text(self) -> str:
        """Lower-case name, as in FORMAT.md."""
        return self.name.lower()


class Role(enum.IntEnum):
    """What a stream of rows holds; the values are those of the page format."""

    KEY = 1
    VALUE = 2
    LATENT = 3
    ROPE = 4
    OPAQUE = 5

    @property
    def text(self) -> str:
        """Lower-case name, as in FORMAT.md."""
        return self.name.lower()


def _require(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}, allowed is {low} to {high}")


@dataclass(frozen=True, slots=True)
class Stream:
    """One kind of row that every layer keeps for every token."""

    role: Role
    head_count: int
    head_size: int
    head_start: int = 0

    def __post_init__(self) -> None:
        _require("head_count", self.head_count, 1, MAX_HEAD_COUNT)
        _require("head_size", self.head_size, 1, MAX_HEAD_SIZE)
        _require("head_start", self.head_start, 0, 2**32 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageLayout:
    """The exact shape of one raw page. Another shape is another layout; the axis order in memory is
    not part of it.
    """

    dtype: DType
    token_count: int
    layer_count: int
    streams: tuple[Stream, ...]
    layer_start: int = 0

    def __post_init__(self) -> None:
        _require("token_count", self.token_count, 1, MAX_TOKEN_COUNT)
        _require("layer_count", self.layer_count, 1, MAX_LAYER_COUNT)
        _require("layer_start", self.layer_start, 0, 2**32 - 1)
        _require("number of streams", len(self.streams), 1, MAX_STREAM_COUNT)
        roles = [stream.role for stream in self.streams]
        if len(set(roles)) != len(roles):
            raise ConfigError(f"a role appears twice among the streams {roles}")
        for stream in self.streams:
            raw_bytes = self.section_raw_bytes(stream)
            if raw_bytes > MAX_SECTION_BYTES:
                raise ConfigError(
                    f"a {stream.role.text} section would be {raw_bytes} bytes, allowed is "
                    f"{MAX_SECTION_BYTES}: use a smaller page"
                )

    @classmethod
    def mha(
        cls,
        *,
        dtype: DType,
        token_count: int,
        layer_count: int,
        head_count: int,
        head_size: int,
        value_head_size: int | None = None,
        layer_start: int = 0,
    ) -> PageLayout:
        """Keys and values of multi-head or grouped-query attention."""
        streams = (
            Stream(Role.KEY, head_count, head_size),
            Stream(
                Role.VALUE, head_count, head_size if value_head_size is None else value_head_size
            ),
        )
        return cls(
            dtype=dtype,
            token_count=token_count,
            layer_count=layer_count,
            streams=streams,
            layer_start=layer_start,
        )

    @classmethod
    def mla(
        cls,
        *,
        dtype: DType,
        token_count: int,
        layer_count: int,
        latent_size: int,
        rope_size: int,
        layer_start: int = 0,
    ) -> PageLayout:
        """The latent and RoPE parts of multi-head latent attention."""
        streams: tuple[Stream, ...] = (Stream(Role.LATENT, 1, latent_size),)
        if rope_size:
            streams += (Stream(Role.ROPE, 1, rope_size),)
        return cls(
            dtype=dtype,
            token_count=token_count,
            layer_count=layer_count,
            streams=streams,
            layer_start=layer_start,
        )

    @classmethod
    def opaque(cls, *, page_bytes: int, dtype: DType = DType.U8) -> PageLayout:
        """A page of which only the number of bytes is known."""
        if page_bytes % dtype.itemsize:
            raise ConfigError(f"{page_bytes} bytes are no whole number of {dtype.text} elements")
        stream = Stream(Role.OPAQUE, 1, page_bytes // dtype.itemsize)
        return cls(dtype=dtype, token_count=1, layer_count=1, streams=(stream,))

    @property
    def section_count(self) -> int:
        """Sections of one page: layers times streams."""
        return self.layer_count * len(self.streams)

    def section_raw_bytes(self, stream: Stream) -> int:
        """Bytes of one layer's rows of `stream`."""
        return stream.head_count * stream.head_size * self.token_count * self.dtype.itemsize

    @property
    def raw_bytes(self) -> int:
        """Bytes of the raw page."""
        return self.layer_count * sum(self.section_raw_bytes(s) for s in self.streams)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStrides:
    """Distances in bytes between the rows of one stream.

    Row (layer, head, token) lies at ``base + layer*layer_bytes + (head // group_heads)*group_bytes
    + (head % group_heads)*head_bytes + token*token_bytes``; the elements of a row are contiguous.
    `group_heads` equals the head count where heads have one stride.
    """

    layer_bytes: int
    head_bytes: int
    token_bytes: int
    group_bytes: int = 0
    group_heads: int = MAX_HEAD_COUNT

    def __post_init__(self) -> None:
        _require("group_heads", self.group_heads, 1, MAX_HEAD_COUNT)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PageViews:
    """Raw pages in somebody's memory: one layout, one set of strides, and a base address per page
    and stream.

    `bases` has shape (pages, streams). `owner` keeps the memory alive. Nothing is copied. Nothing
    is decoded into views that are not `writable`.
    """

    layout: PageLayout
    strides: tuple[StreamStrides, ...]
    bases: npt.NDArray[np.uint64]
    owner: object = None
    writable: bool = True

    def __post_init__(self) -> None:
        if self.bases.dtype != np.uint64 or self.bases.ndim != 2:
            raise ConfigError(
                f"bases are {self.bases.dtype} {self.bases.shape}, wanted uint64 (pages, streams)"
            )
        if not len(self.strides) == self.bases.shape[1] == len(self.layout.streams):
            raise ConfigError(
                f"{len(self.layout.streams)} streams, {len(self.strides)} strides, "
                f"{self.bases.shape[1]} base columns: the three numbers must be equal"
            )

    def __len__(self) -> int:
        return int(self.bases.shape[0])

    def select(self, index: slice | Sequence[int]) -> PageViews:
        """The views of some of the pages."""
        return PageViews(
            layout=self.layout,
            strides=self.strides,
            bases=np.ascontiguousarray(self.bases[index]),
            owner=self.owner,
            writable=self.writable,
        )

    @classmethod
    def of_arrays(cls, layout: PageLayout, arrays: Sequence[npt.NDArray[np.generic]]) -> PageViews:
        """Views of numpy arrays, one per stream, each (pages, layers, heads, tokens, head_size) in
        any strides.

        The last axis must be contiguous; the item size must be that of the layout's element type.
        """
        strides = []
        for stream, array in zip(layout.streams, arrays, strict=True):
            shape = (layout.layer_count, stream.head_count, layout.token_count, stream.head_size)
            if (
                array.ndim != 5
                or array.shape[1:] != shape
                or array.itemsize != layout.dtype.itemsize
            ):
                raise ConfigError(
                    f"the {stream.role.text} array is {array.shape} of {array.itemsize}-byte "
                    f"elements, wanted "
                    f"(pages, {', '.join(map(str, shape))}) of {layout.dtype.itemsize}"
                )
            # Of an array of no pages, numpy tells any strides.
            if min(array.size, stream.head_size - 1) and array.strides[4] != array.itemsize:
                raise ConfigError(
                    f"rows of the {stream.role.text} array are not contiguous: their stride is "
                    f"{array.strides[4]}"
                )
            strides.append(
                StreamStrides(
                    layer_bytes=array.strides[1],
                    head_bytes=array.strides[2],
                    token_bytes=array.strides[3],
                )
            )
        page_count = {array.shape[0] for array in arrays}
        if len(page_count) != 1:
            raise ConfigError(f"the arrays hold different numbers of pages: {sorted(page_count)}")
        bases = np.empty((page_count.pop(), len(arrays)), np.uint64)
        for column, array in enumerate(arrays):
            address = array.__array_interface__["data"][0]
            bases[:, column] = address + np.arange(len(array)) * array.strides[0]
        return cls(
            layout=layout,
            strides=tuple(strides),
            bases=bases,
            owner=tuple(arrays),
            writable=all(array.flags.writeable for array in arrays),
        )
