"""Layouts of pages, and views of pages in somebody's memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import mha, mla

from kvcodec.errors import ConfigError
from kvcodec.layout import (
    MAX_HEAD_COUNT,
    MAX_HEAD_SIZE,
    MAX_LAYER_COUNT,
    MAX_STREAM_COUNT,
    MAX_TOKEN_COUNT,
    DType,
    PageLayout,
    PageViews,
    Role,
    Stream,
    StreamStrides,
)
from kvcodec.testing.strategies import page_layouts, raw_pages

KEY = Stream(Role.KEY, 1, 1)
SIZES = {
    DType.BF16: 2, DType.FP16: 2, DType.FP32: 4, DType.FP8_E4M3: 1, DType.FP8_E5M2: 1, DType.U8: 1,
}  # fmt: skip


@pytest.mark.parametrize("dtype", DType)
def test_element_sizes(dtype: DType):
    assert dtype.itemsize == SIZES[dtype]
    assert dtype.is_quantizable == (dtype <= DType.FP32)


def test_mha_has_keys_and_values():
    layout = mha(tokens=64, layers=28, heads=4, size=128)
    assert [(s.role, s.head_count, s.head_size) for s in layout.streams] == [
        (Role.KEY, 4, 128),
        (Role.VALUE, 4, 128),
    ]
    assert layout.section_count == 56
    assert layout.raw_bytes == 3_670_016


def test_values_may_have_another_head_size():
    layout = mha(size=192, value_size=128)
    assert [stream.head_size for stream in layout.streams] == [192, 128]


def test_mla_row_is_latent_and_rope():
    """One page of DeepSeek: 576 elements a token and layer, with or without the RoPE part apart."""
    apart, whole = mla(latent=512, rope=64), mla(latent=576, rope=0)
    assert [stream.role for stream in apart.streams] == [Role.LATENT, Role.ROPE]
    assert [stream.role for stream in whole.streams] == [Role.LATENT]
    assert apart.raw_bytes == whole.raw_bytes


def test_opaque_page_is_bytes():
    layout = PageLayout.opaque(page_bytes=1001)
    assert layout.raw_bytes == 1001
    assert layout.streams == (Stream(Role.OPAQUE, 1, 1001),)


def test_opaque_page_loses_no_byte():
    """A size that is no whole number of elements is refused, not cut."""
    with pytest.raises(ConfigError, match="1001"):
        PageLayout.opaque(page_bytes=1001, dtype=DType.BF16)


@pytest.mark.parametrize(
    "sizes",
    [
        (0, 1, 0), (MAX_HEAD_COUNT + 1, 1, 0), (-1, 1, 0),
        (1, 0, 0), (1, MAX_HEAD_SIZE + 1, 0), (1, 1, -1), (1, 1, 2**32),
    ],
)  # fmt: skip
def test_stream_beyond_a_limit_is_refused(sizes: tuple[int, int, int]):
    with pytest.raises(ConfigError, match="allowed is"):
        Stream(Role.KEY, *sizes)


@pytest.mark.parametrize(
    "changes",
    [
        {"token_count": 0}, {"token_count": MAX_TOKEN_COUNT + 1},
        {"layer_count": 0}, {"layer_count": MAX_LAYER_COUNT + 1},
        {"layer_start": -1}, {"layer_start": 2**32},
        {"streams": ()}, {"streams": (KEY, KEY)},
        {"streams": tuple(Stream(role, 1, 1) for role in Role)},
        {"streams": (Stream(Role.KEY, MAX_HEAD_COUNT, MAX_TOKEN_COUNT),)},
        {"streams": (Stream(Role.KEY, 1, MAX_HEAD_SIZE),)},
    ],
)  # fmt: skip
def test_layout_beyond_a_limit_is_refused(changes: dict[str, Any]):
    """Every limit of the format, a role that appears twice, and a section too large to store."""
    assert len(Role) > MAX_STREAM_COUNT
    good = PageLayout(dtype=DType.BF16, token_count=1, layer_count=1, streams=(KEY,))
    with pytest.raises(ConfigError):
        replace(good, **changes)


def test_zero_is_no_head_size_of_values():
    """0 is a number out of range, not a request for the keys' size."""
    with pytest.raises(ConfigError, match="head_size is 0"):
        mha(value_size=0)


@given(page_layouts())
def test_raw_bytes_are_the_sum_of_the_sections(layout: PageLayout):
    elements = sum(s.head_count * s.head_size for s in layout.streams) * layout.token_count
    assert layout.raw_bytes == layout.layer_count * elements * layout.dtype.itemsize
    assert layout.section_count == layout.layer_count * len(layout.streams)
    assert hash(layout) == hash(replace(layout))


# --- views


def test_views_of_arrays_point_at_every_row():
    """Bases and strides lead to the rows, in whatever order the axes lie."""
    layout = mha(tokens=3, layers=2, heads=4, size=8)
    arrays = [
        np.arange(5 * 2 * 4 * 3 * 8, dtype=np.uint16)
        .reshape(3, 4, 5, 2, 8)
        .transpose(2, 3, 1, 0, 4),
        np.zeros((5, 2, 4, 3, 8), np.uint16)[::-1, :, ::-1],
    ]
    views = PageViews.of_arrays(layout, arrays)
    assert len(views) == 5
    for column, array in enumerate(arrays):
        stride = views.strides[column]
        for page, layer, head, token in np.ndindex(*array.shape[:4]):
            address = int(views.bases[page, column])
            address += layer * stride.layer_bytes + head * stride.head_bytes
            address += token * stride.token_bytes
            assert address == array[page, layer, head, token].__array_interface__["data"][0]


@given(st.data())
def test_views_are_selected_without_a_copy_of_the_pages(data: st.DataObject):
    layout = data.draw(page_layouts(max_elements=64))
    pages = data.draw(raw_pages(layout, page_count=3))
    picked = pages.views.select([2, 0])
    assert picked.bases.tolist() == pages.views.bases[[2, 0]].tolist()
    assert picked.strides == pages.views.strides
    assert picked.owner is pages.views.owner
    assert len(pages.views.select(slice(1, 3))) == 2


@pytest.mark.parametrize(
    "arrays",
    [
        [np.zeros((1, 1, 2, 5, 96), np.uint16)],
        [np.zeros((1, 1, 2, 5, 95), np.uint16), np.zeros((1, 1, 2, 5, 96), np.uint16)],
        [np.zeros((1, 1, 2, 5, 96), np.uint8), np.zeros((1, 1, 2, 5, 96), np.uint16)],
        [np.zeros((1, 2, 5, 96), np.uint16), np.zeros((1, 1, 2, 5, 96), np.uint16)],
        [np.zeros((2, 1, 2, 5, 96), np.uint16), np.zeros((1, 1, 2, 5, 96), np.uint16)],
        [np.zeros((1, 1, 2, 5, 192), np.uint16)[..., ::2], np.zeros((1, 1, 2, 5, 96), np.uint16)],
        [np.zeros((1, 1, 2, 5, 96), np.uint16)[..., ::-1], np.zeros((1, 1, 2, 5, 96), np.uint16)],
    ],
)
def test_arrays_of_another_shape_are_refused(arrays: list[np.ndarray]):
    """Streams, sizes, item size, number of pages; and rows have to be contiguous."""
    with pytest.raises((ConfigError, ValueError)):
        PageViews.of_arrays(mha(), arrays)


def test_bases_have_a_row_per_page_and_a_column_per_stream():
    stride = StreamStrides(layer_bytes=1, head_bytes=1, token_bytes=1)
    for bases in (np.zeros((1, 2), np.int64), np.zeros(2, np.uint64), np.zeros((1, 3), np.uint64)):
        with pytest.raises(ConfigError):
            PageViews(layout=mha(), strides=(stride, stride), bases=bases)
    with pytest.raises(ConfigError):
        PageViews(layout=mha(), strides=(stride,), bases=np.zeros((1, 2), np.uint64))


@pytest.mark.parametrize("group_heads", [0, -1])
def test_group_of_no_heads_is_refused(group_heads: int):
    """Heads are divided by the heads of a group."""
    with pytest.raises(ConfigError):
        StreamStrides(layer_bytes=1, head_bytes=1, token_bytes=1, group_heads=group_heads)
