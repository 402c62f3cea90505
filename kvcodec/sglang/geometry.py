"""Where the pages of a host pool lie: from SGLang's pools to page layouts, strides and addresses.

A host pool is one or two large tensors whose axes stand in one of a few orders. The order is looked
up by the pool's class and layout, and everything else follows from the tensors' own strides, once
per pool; a batch of pages then costs one multiplication. Neither sglang nor torch is needed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from kvcodec.errors import ConfigError
from kvcodec.layout import DType, PageLayout, PageViews, Role, Stream, StreamStrides

__all__ = [
    "Buffer",
    "FlatPage",
    "PoolGeometry",
    "class_names",
    "describe_pool",
    "logical_dtype",
    "merged",
    "note_logical_dtype",
    "page_numbers",
]

#: Axes of a pool's tensor, outermost first: c keys or values, l layer, s token slot, n page,
#: p token of the page, g head group, h head (of the group), d element.
_MHA_AXES = {
    "layer_first": "clshd",
    "page_first": "cslhd",
    "page_first_direct": "cnlphd",
    "page_head": "cnhpld",
    "page_unified": "nglcphd",
}
_ONE_STREAM_AXES = {
    "layer_first": "lshd",
    "page_first": "slhd",
    "page_first_direct": "nlphd",
}
_MLA_AXES = _ONE_STREAM_AXES | {"page_unified": "nlpd"}
#: The latent and the RoPE part in a tensor of their own, on Ascend.
_SPLIT_LAYOUT = "page_first_kv_split"
_SPLIT_AXES = "nlphd"

_ELEMENT_TYPES = {
    "torch.bfloat16": DType.BF16,
    "torch.float16": DType.FP16,
    "torch.float32": DType.FP32,
    "torch.float8_e4m3fn": DType.FP8_E4M3,
    "torch.float8_e5m2": DType.FP8_E5M2,
}


class Buffer(Protocol):
    """The little of a torch tensor that is needed: it may be any dense memory."""

    @property
    def shape(self) -> Sequence[int]:
        """Elements along each axis."""

    def stride(self) -> Sequence[int]:
        """Distance in elements along each axis."""

    def element_size(self) -> int:
        """Bytes of one element."""

    def data_ptr(self) -> int:
        """Address of the first element."""


def class_names(pool: object) -> frozenset[str]:
    """Names of a pool's class and its bases: releases move classes, but keep their names."""
    return frozenset(cls.__name__ for cls in type(pool).__mro__)


#: What the elements of a host pool mean, by pool: fp8 pools hold plain bytes.
_LOGICAL_DTYPES: WeakKeyDictionary[object, str] = WeakKeyDictionary()


def note_logical_dtype(pool: object, device_pool: object) -> None:
    """Remember the KV dtype of the device pool that a host pool mirrors."""
    dtype = getattr(device_pool, "dtype", None)
    if dtype is not None:
        _LOGICAL_DTYPES[pool] = str(dtype)


def logical_dtype(pool: object) -> str:
    """Name of the KV dtype of a host pool, that of its storage where nothing better is known."""
    noted = _LOGICAL_DTYPES.get(pool)
    if noted is None:
        device_pool = getattr(pool, "device_pool", None)
        noted = str(getattr(device_pool, "dtype", getattr(pool, "dtype", "unknown")))
    return noted


def _element_type(pool: object) -> DType:
    """What the elements of a pool are; `DType.U8` where that is not known, or they are packed."""
    dtype = _ELEMENT_TYPES.get(logical_dtype(pool), DType.U8)
    itemsize = getattr(getattr(pool, "dtype", None), "itemsize", 1)
    return dtype if dtype.itemsize == itemsize else DType.U8


def page_numbers(host_indices: object, page_size: int, page_count: int) -> npt.NDArray[np.int64]:
    """The numbers of the pages at SGLang's host indices, an int64 array of whole pages.

    Raises `ConfigError` unless the indices are pages: aligned, consecutive, inside the pool.
    """
    slots = np.asarray(host_indices)
    if slots.dtype != np.int64 or slots.ndim != 1 or len(slots) % page_size:
        raise ConfigError(
            f"host indices are {slots.dtype} {slots.shape}, wanted int64 in pages of {page_size}"
        )
    pages = slots.reshape(-1, page_size)
    numbers = pages[:, 0] // page_size
    consecutive = (pages == numbers[:, None] * page_size + np.arange(page_size)).all()
    if not consecutive or (numbers < 0).any() or (numbers >= page_count).any():
        raise ConfigError(
            f"host indices are not aligned pages of {page_size} slots in a pool of {page_count}"
        )
    return numbers


@dataclass(frozen=True, slots=True)
class FlatPage:
    """Where the streams lie in a page's own flat tensor, in the pool's order of axes."""

    offsets: npt.NDArray[np.uint64]
    strides: tuple[StreamStrides, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PoolGeometry:
    """Where the pages of one pool lie.

    Page `n` of stream `s` starts at ``bases[s] + n * page_bytes[s]`` (both uint64, one per stream).
    `flat` is None where SGLang has no flat form of these pages.
    """

    layout: PageLayout
    strides: tuple[StreamStrides, ...]
    bases: npt.NDArray[np.uint64]
    page_bytes: npt.NDArray[np.uint64]
    page_count: int
    flat: FlatPage | None
    owner: object

    def views(self, numbers: npt.NDArray[np.int64]) -> PageViews:
        """Views of the pages with these numbers, which must be inside the pool."""
        bases = self.bases + numbers.astype(np.uint64)[:, None] * self.page_bytes
        return PageViews(layout=self.layout, strides=self.strides, bases=bases, owner=self.owner)

    def flat_views(self, addresses: Sequence[int], owner: object) -> PageViews | None:
        """Views of flat pages at these addresses, None where there is no flat form."""
        if self.flat is None:
            return None
        bases = np.array(addresses, np.uint64)[:, None] + self.flat.offsets
        return PageViews(layout=self.layout, strides=self.flat.strides, bases=bases, owner=owner)

    def pieces(self, number: int) -> list[tuple[int, int]]:
        """The address ranges (start, end) of one page, merged and ascending."""
        starts, ends = [], []
        for index, (stream, strides) in enumerate(
            zip(self.layout.streams, self.strides, strict=True)
        ):
            heads = np.arange(stream.head_count)
            within = (heads // strides.group_heads) * strides.group_bytes + (
                heads % strides.group_heads
            ) * strides.head_bytes
            rows = (
                np.arange(self.layout.layer_count)[:, None, None] * strides.layer_bytes
                + within[:, None]
                + np.arange(self.layout.token_count) * strides.token_bytes
            ).ravel()
            base = int(self.bases[index]) + number * int(self.page_bytes[index])
            starts.append(rows + base)
            ends.append(rows + base + stream.head_size * self.layout.dtype.itemsize)
        return merged(np.concatenate(starts), np.concatenate(ends))


def merged(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Touching ranges made one. Ranges that overlap stay apart, as no page's may."""
    order = np.argsort(starts)
    starts, ends = starts[order], ends[order]
    breaks = np.flatnonzero(starts[1:] != ends[:-1]) + 1
    firsts, lasts = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(starts)]]) - 1
    return list(zip(starts[firsts].tolist(), ends[lasts].tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class _Part:
    """One stream in one tensor: `component` along axis c, `element` along axis d."""

    stream: Stream
    buffer: Buffer
    axes: str
    component: int = 0
    element: int = 0

    def place(
        self, shape: Sequence[int], stride: Sequence[int], page_size: int
    ) -> tuple[int, int, StreamStrides]:
        """Offset of page 0, distance of pages, and strides, all in bytes."""
        item = self.buffer.element_size()
        size = dict(zip(self.axes, shape, strict=True))
        step = {axis: item * elements for axis, elements in zip(self.axes, stride, strict=True)}
        page = step["n"] if "n" in step else page_size * step["s"]
        token = step["p"] if "p" in step else step["s"]
        head = step.get("h", 0)
        strides = StreamStrides(
            layer_bytes=step["l"],
            head_bytes=head,
            token_bytes=token,
            group_bytes=step.get("g", 0),
            group_heads=size.get("h", 1) if "g" in step else self.stream.head_count,
        )
        offset = self.component * step.get("c", 0) + self.element * item
        return offset, page, strides

    def flat_shape(self, page_size: int) -> tuple[int, ...]:
        """Shape of one page cut out of the tensor."""
        cut = {"s": page_size, "n": 1}
        return tuple(
            cut.get(axis, length) for axis, length in zip(self.axes, self.buffer.shape, strict=True)
        )

    def check(self, expected: Mapping[str, int]) -> None:
        """Raise `ConfigError` unless the tensor is as its pool says."""
        size = dict(zip(self.axes, self.buffer.shape, strict=True))
        heads = size.get("g", 1) * size.get("h", 1)
        if heads != self.stream.head_count:
            raise ConfigError(
                f"{heads} heads in the pool's tensor, {self.stream.head_count} wanted"
            )
        for axis, length in expected.items():
            if axis in size and size[axis] != length:
                raise ConfigError(
                    f"axis {axis!r} of the pool's tensor is {size[axis]}, not {length}"
                )
        if self.buffer.stride()[-1] != 1:
            raise ConfigError("rows of the pool's tensor are not contiguous")


def _c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for length in reversed(shape[1:]):
        strides.append(strides[-1] * length)
    return tuple(reversed(strides))


def _number(pool: object, name: str) -> int:
    return int(getattr(pool, name))


def _buffer(pool: object, name: str) -> Buffer:
    buffer: Buffer = getattr(pool, name)
    return buffer


def describe_pool(pool: object) -> PoolGeometry | None:
    """The geometry of a host pool, None for a kind of pool that is not known.

    Raises `ConfigError` if the pool is not what its class and layout say.
    """
    names, layout_name = class_names(pool), str(getattr(pool, "layout", ""))
    found: tuple[list[_Part], bool] | None = None
    if "AsymmetricMHATokenToKVPoolHost" in names:
        found = _two_tensors(pool, layout_name)
    elif "MHATokenToKOnlyPoolHost" in names:
        found = _keys_only(pool, layout_name)
    elif "MHATokenToKVPoolHost" in names:
        found = _one_tensor(pool, layout_name)
    elif "MLATokenToKVPoolHost" in names:
        found = _latent(pool, layout_name)
    if found is None:
        return None
    parts, has_flat_form = found
    geometry = _assemble(pool, parts, has_flat_form)
    _compare(pool, geometry)
    return geometry


def _assemble(pool: object, parts: Sequence[_Part], has_flat_form: bool) -> PoolGeometry:
    page_size, slots = _number(pool, "page_size"), _number(pool, "size")
    page_count = slots // page_size
    layer_count = _number(pool, "layer_num")
    dtype = _element_type(pool)
    for part in parts:
        part.check({"l": layer_count, "p": page_size, "n": page_count, "s": slots})
        if part.buffer.element_size() != dtype.itemsize:
            raise ConfigError(
                f"the pool holds {part.buffer.element_size()}-byte elements, {dtype.text} has "
                f"{dtype.itemsize}"
            )
    layout = PageLayout(
        dtype=dtype,
        token_count=page_size,
        layer_count=layer_count,
        layer_start=max(0, int(getattr(pool, "start_layer", 0) or 0)),
        streams=tuple(part.stream for part in parts),
    )
    placed = [part.place(part.buffer.shape, part.buffer.stride(), page_size) for part in parts]
    bases = [part.buffer.data_ptr() + at for part, (at, _, _) in zip(parts, placed, strict=True)]
    flat = None
    if has_flat_form:
        shapes = [part.flat_shape(page_size) for part in parts]
        laid = [
            part.place(shape, _c_strides(shape), page_size)
            for part, shape in zip(parts, shapes, strict=True)
        ]
        flat = FlatPage(
            np.array([offset for offset, _, _ in laid], np.uint64),
            tuple(strides for _, _, strides in laid),
        )
    return PoolGeometry(
        layout=layout,
        strides=tuple(strides for _, _, strides in placed),
        bases=np.array(bases, np.uint64),
        page_bytes=np.array([page for _, page, _ in placed], np.uint64),
        page_count=page_count,
        flat=flat,
        owner=tuple(part.buffer for part in parts),
    )


def _one_tensor(pool: object, layout_name: str) -> tuple[list[_Part], bool] | None:
    """Keys and values of one head size, in one tensor."""
    axes = _MHA_AXES.get(layout_name)
    if axes is None:
        return None
    buffer = _buffer(pool, "kv_buffer")
    heads, size = _number(pool, "head_num"), _number(pool, "head_dim")
    parts = [
        _Part(Stream(role, heads, size), buffer, axes, component=component)
        for component, role in enumerate((Role.KEY, Role.VALUE))
    ]
    return parts, layout_name != "page_unified"


def _two_tensors(pool: object, layout_name: str) -> tuple[list[_Part], bool] | None:
    """Keys and values of different head sizes; SGLang has no flat form of such a page."""
    axes = _ONE_STREAM_AXES.get(layout_name)
    if axes is None:
        return None
    heads = _number(pool, "head_num")
    keys = Stream(Role.KEY, heads, _number(pool, "head_dim"))
    values = Stream(Role.VALUE, heads, _number(pool, "v_head_dim"))
    return [
        _Part(keys, _buffer(pool, "k_buffer"), axes),
        _Part(values, _buffer(pool, "v_buffer"), axes),
    ], False


def _keys_only(pool: object, layout_name: str) -> tuple[list[_Part], bool] | None:
    axes = _ONE_STREAM_AXES.get(layout_name)
    if axes is None:
        return None
    keys = Stream(Role.KEY, _number(pool, "head_num"), _number(pool, "head_dim"))
    return [_Part(keys, _buffer(pool, "k_buffer"), axes)], True


def _latent(pool: object, layout_name: str) -> tuple[list[_Part], bool] | None:
    """Latent and RoPE part, side by side in a row or in two tensors."""
    rank, rope = _number(pool, "kv_lora_rank"), _number(pool, "qk_rope_head_dim")
    if getattr(pool, "dsa_kv_cache_store_fp8", False):
        return None  # a row holds codes, scales and RoPE of another type
    latent, rotated = Stream(Role.LATENT, 1, rank), Stream(Role.ROPE, 1, rope)
    if layout_name == _SPLIT_LAYOUT:
        if getattr(pool, "index_k_buffer", None) is not None:
            return None
        return [
            _Part(latent, _buffer(pool, "k_buffer"), _SPLIT_AXES),
            _Part(rotated, _buffer(pool, "v_buffer"), _SPLIT_AXES),
        ], False
    axes = _MLA_AXES.get(layout_name)
    if axes is None or _number(pool, "kv_cache_dim") != rank + rope:
        return None
    buffer = _buffer(pool, "kv_buffer")
    parts = [_Part(latent, buffer, axes)]
    if rope:
        parts.append(_Part(rotated, buffer, axes, element=rank))
    return parts, layout_name != "page_unified"


def _compare(pool: object, geometry: PoolGeometry) -> None:
    """Raise `ConfigError` unless the pool's own account of its last page names the same bytes."""
    per_token = getattr(pool, "size_per_token", None)
    tokens = geometry.layout.token_count
    if per_token is not None and per_token * tokens != geometry.layout.raw_bytes:
        raise ConfigError(
            f"a page has {geometry.layout.raw_bytes} bytes, the pool says {per_token * tokens}"
        )
    number = geometry.page_count - 1
    try:
        slots = np.arange(number * tokens, (number + 1) * tokens)
        addresses, sizes = pool.get_page_buffer_meta(slots)  # type: ignore[attr-defined]
    except (AssertionError, AttributeError, NotImplementedError, TypeError, ValueError):
        return  # this pool gives no such account of this layout
    starts = np.array(addresses, np.int64)
    if merged(starts, starts + np.array(sizes, np.int64)) != geometry.pieces(number):
        raise ConfigError("the pool keeps its pages at other addresses")
