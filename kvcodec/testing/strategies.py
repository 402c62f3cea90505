"""Hypothesis strategies: layouts, specs, identities, and raw pages that lie in memory anyhow.

    from kvcodec.testing import strategies

Shapes stay small enough that a case takes about a millisecond, and favour the odd ones: one token,
one element, rows that are no multiple of a block or a group, keys and values of unequal size.
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews, Role, Stream, StreamStrides
from kvcodec.spec import Axis, CodecSpec, SectionCodec

__all__ = [
    "RawPages",
    "codec_specs",
    "element_bits",
    "head_sizes",
    "identities",
    "namespaces",
    "page_keys",
    "page_layouts",
    "raw_pages",
    "section_codecs",
]

Rows = npt.NDArray[np.unsignedinteger]

_ItemType = np.dtype[np.unsignedinteger]
_BYTES: _ItemType = np.dtype(np.uint8)
_ELEMENT_BITS: dict[DType, _ItemType] = {
    DType.BF16: np.dtype(np.uint16),
    DType.FP16: np.dtype(np.uint16),
    DType.FP32: np.dtype(np.uint32),
}
_KINDS = ("normal", "constant", "offset", "outlier", "tiny", "huge", "zeros")
_COMMON_HEAD_SIZES = (64, 80, 96, 128, 192, 256, 512, 576)


def head_sizes(max_size: int = 300) -> st.SearchStrategy[int]:
    """Elements of a row: any number, and those of known models."""
    common = [size for size in _COMMON_HEAD_SIZES if size <= max(max_size, 576)]
    return st.one_of(st.integers(1, max_size), st.sampled_from(common))


def section_codecs() -> st.SearchStrategy[SectionCodec]:
    """Every codec whose sections have a fixed size: raw, fp8, or 2, 4 or 8 bits on either axis, in
    groups of any size.
    """
    groups = st.one_of(
        st.just(-1), st.sampled_from([1, 2, 3, 8, 16, 32, 64, 128]), st.integers(1, 1 << 30)
    )
    integers = st.builds(
        SectionCodec.integer,
        st.sampled_from([2, 4, 8]),
        asymmetric=st.booleans(),
        axis=st.sampled_from(Axis),
        group_size=groups,
    )
    plain = st.sampled_from([SectionCodec(), SectionCodec.parse("fp8")])
    return st.one_of(plain, integers, integers, integers)


@st.composite
def codec_specs(draw: st.DrawFn) -> CodecSpec:
    """Any spec, with and without overrides of layers."""
    layers = draw(st.lists(st.integers(0, 100), unique=True, max_size=4))
    codecs = section_codecs()
    return CodecSpec(
        key=draw(codecs),
        value=draw(codecs),
        rope=draw(st.none() | codecs),
        layers=tuple((layer, draw(codecs), draw(codecs)) for layer in sorted(layers)),
    )


@st.composite
def page_layouts(
    draw: st.DrawFn, *, dtypes: st.SearchStrategy[DType] | None = None, max_elements: int = 1 << 14
) -> PageLayout:
    """Attention of all kinds: keys and values of equal or unequal heads, MLA, opaque bytes.

    A stream of a layer has at most about `max_elements` elements.
    """
    dtype = draw(st.sampled_from(DType) if dtypes is None else dtypes)
    kind = draw(st.sampled_from(["mha", "mha", "mha", "mla", "opaque", "any"]))
    layer_count = draw(st.integers(1, 3))
    layer_start = draw(st.integers(0, 70))
    if kind == "opaque":
        return PageLayout.opaque(
            page_bytes=draw(st.integers(1, 2000)) * dtype.itemsize, dtype=dtype
        )
    head_count = draw(st.integers(1, 8))
    head_size = draw(head_sizes())
    token_limit = max(1, min(256, max_elements // (head_count * head_size)))
    token_count = draw(st.integers(1, token_limit))
    if kind == "mha":
        streams: tuple[Stream, ...] = (
            Stream(Role.KEY, head_count, head_size),
            Stream(Role.VALUE, head_count, draw(st.just(head_size) | head_sizes(64))),
        )
    elif kind == "mla":
        streams = (Stream(Role.LATENT, 1, head_size), Stream(Role.ROPE, 1, draw(head_sizes(64))))
    else:
        roles = draw(st.lists(st.sampled_from(Role), min_size=1, max_size=4, unique=True))
        streams = tuple(
            Stream(role, draw(st.integers(1, 4)), draw(head_sizes(40)), draw(st.integers(0, 64)))
            for role in roles
        )
    return PageLayout(
        dtype=dtype,
        token_count=token_count,
        layer_count=layer_count,
        layer_start=layer_start,
        streams=streams,
    )


def identities() -> st.SearchStrategy[Identity]:
    """Identities of up to five fields with any text in them."""
    names = st.text(string.ascii_lowercase + string.digits + "_", min_size=1, max_size=32)
    values = st.text(st.characters(codec="utf-8"), max_size=40)
    fields = st.dictionaries(names, values, max_size=5)
    return fields.map(lambda drawn: Identity(tuple(sorted(drawn.items()))))


@st.composite
def namespaces(draw: st.DrawFn) -> Namespace:
    """An identity with a layout."""
    return Namespace(draw(identities()), draw(page_layouts()))


def page_keys() -> st.SearchStrategy[str]:
    """Hexadecimal digests as engines make them, and any other text a key may be."""
    digests = st.binary(min_size=16, max_size=32).map(bytes.hex)
    texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=256)
    return st.one_of(digests, texts)


def element_bits(dtype: DType, count: int, *, finite: bool = False) -> st.SearchStrategy[Rows]:
    """`count` elements as bits: like those of a KV cache, of one magnitude, or anything at all.

    With `finite`, no element is NaN, infinite or at least 2^127 in magnitude.
    """
    return st.builds(
        lambda kind, seed: _element_bits(dtype, count, kind, seed, finite),
        st.sampled_from([*_KINDS, "mixed", "bits"]),
        st.integers(0, 2**32 - 1),
    )


def _element_bits(dtype: DType, count: int, kind: str, seed: int, finite: bool) -> Rows:
    random = np.random.default_rng(seed)
    item = _ELEMENT_BITS.get(dtype, _BYTES)
    bits: Rows = random.integers(0, 1 << 8 * item.itemsize, count, dtype=np.uint64).astype(item)
    if dtype not in _ELEMENT_BITS:
        return bits
    if kind == "mixed":
        parts = [_values(name, count, random) for name in _KINDS]
        chosen = np.repeat(random.integers(0, len(parts), -(-count // 8)), 8)[:count]
        bits = _bits_of(np.choose(chosen, parts).astype(np.float32), dtype)
    elif kind != "bits":
        bits = _bits_of(_values(kind, count, random).astype(np.float32), dtype)
    if finite:
        bits[~_is_inside(bits, dtype)] = 0
    return bits


def _values(kind: str, count: int, random: np.random.Generator) -> npt.NDArray[np.float64]:
    values = random.standard_normal(count)
    if kind == "constant":
        values[:] = values[0]
    elif kind == "offset":
        values = values * 1e-3 + 40
    elif kind == "outlier":
        values[random.random(count) < 0.02] *= 300
    elif kind == "tiny":
        values *= 10.0 ** -int(random.integers(5, 45))
    elif kind == "huge":
        values = np.clip(values * 6e4, -65504, 65504)
    elif kind == "zeros":
        values *= 0.0
    return values


def _bits_of(values: npt.NDArray[np.float32], dtype: DType) -> Rows:
    if dtype is DType.FP16:
        half: Rows = values.astype(np.float16).view(np.uint16)
        return half
    if dtype is DType.BF16:
        upper: Rows = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return upper
    single: Rows = values.view(np.uint32)
    return single


def _is_inside(bits: Rows, dtype: DType) -> npt.NDArray[np.bool_]:
    """Whether elements lie in the domain of the int codecs."""
    magnitude = bits & np.array((1 << (8 * bits.itemsize - 1)) - 1, bits.dtype)
    end = {DType.BF16: 0x7F00, DType.FP16: 0x7C00, DType.FP32: 0x7F000000}[dtype]
    return np.asarray(magnitude < end)


@dataclass(frozen=True)
class RawPages:
    """Raw pages in memory that belongs to nobody else.

    `memory` is one buffer. `rows` holds, per stream, element bits (pages, layers, heads, tokens,
    head_size) as arrays over that buffer, and `views` the same for kvcodec. What no row covers is
    filled with a pattern, so that a test sees whether it was written to.
    """

    views: PageViews
    memory: npt.NDArray[np.uint8]
    rows: tuple[Rows, ...]

    def untouched(self) -> npt.NDArray[np.bool_]:
        """Which bytes of `memory` belong to no row."""
        free = np.ones(len(self.memory), np.bool_)
        start = self.memory.__array_interface__["data"][0]
        for rows in self.rows:
            origin = rows.__array_interface__["data"][0] - start
            offsets = np.zeros((1,), np.int64)
            for length, stride in zip(rows.shape, rows.strides, strict=True):
                offsets = (offsets[:, None] + np.arange(length) * stride).reshape(-1)
            for byte in range(rows.itemsize):
                free[origin + offsets + byte] = False
        return free


@st.composite
def raw_pages(
    draw: st.DrawFn, layout: PageLayout, *, page_count: int = 1, finite: bool = False
) -> RawPages:
    """Raw pages of a layout with the axes in any order, gaps between rows, and odd addresses.

    Streams lie one after the other; layer, token, head and page may be nested in any order, as
    layer first, page first and their relatives are, and heads may lie in groups.
    """
    item = _ELEMENT_BITS.get(layout.dtype, _BYTES)
    shift = draw(st.sampled_from([0, 0, item.itemsize, 8, 64 - item.itemsize]))
    plans = []
    total = shift
    for stream in layout.streams:
        gap = draw(st.sampled_from([0, 0, 1, 7, 64]))
        group = draw(_divisors(stream.head_count))
        shape = (
            page_count,
            layout.layer_count,
            stream.head_count // group,
            group,
            layout.token_count,
            stream.head_size + gap,
        )
        order = draw(st.permutations(range(5)))
        plans.append((stream, shape, order, total))
        total += math.prod(shape) * item.itemsize
    memory = np.full(total + 64, 0xA5, np.uint8)
    rows, strides, bases = [], [], []
    start = memory.__array_interface__["data"][0]
    for stream, shape, order, offset in plans:
        steps = [0, 0, 0, 0, 0, item.itemsize]
        step = shape[5] * item.itemsize
        for axis in reversed(order):
            steps[axis] = step
            step *= shape[axis]
        blocks = np.ndarray((*shape[:5], stream.head_size), item, memory.data, offset, steps)
        count = math.prod(blocks.shape)
        blocks[...] = draw(element_bits(layout.dtype, count, finite=finite)).reshape(blocks.shape)
        strides.append(
            StreamStrides(
                layer_bytes=steps[1],
                group_bytes=steps[2],
                head_bytes=steps[3],
                token_bytes=steps[4],
                group_heads=shape[3],
            )
        )
        bases.append(start + offset + np.arange(page_count) * steps[0])
        rows.append(blocks)
    views = PageViews(
        layout=layout,
        strides=tuple(strides),
        bases=np.ascontiguousarray(np.stack(bases, axis=1).astype(np.uint64)),
        owner=memory,
    )
    return RawPages(views, memory, tuple(rows))


def _divisors(number: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in range(number, 0, -1) if number % n == 0])
