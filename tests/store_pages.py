"""Batches of small pages for the tests of `PageStore`, and a clock for its calls."""

from __future__ import annotations

import time

import numpy as np

from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.store import StoreOptions

LAYOUT = PageLayout.mha(dtype=DType.BF16, token_count=16, layer_count=3, head_count=2, head_size=64)
NAMESPACE = Namespace(Identity.of(model="tiny", tp_rank=0), LAYOUT)
OPTIONS = StoreOptions(
    buffer_bytes=8 << 20,
    exists_timeout_seconds=30.0,
    prefetch_timeout_seconds=30.0,
    backup_timeout_seconds=30.0,
    breaker_failures=0,
)


def keys_of(count: int, start: int = 0) -> list[str]:
    return [f"{index:064x}" for index in range(start, start + count)]


def random_pages(
    count: int, seed: int = 0, layout: PageLayout = LAYOUT
) -> tuple[list[np.ndarray], PageViews]:
    """Pages of bf16 normal numbers: arrays (pages, layers, heads, tokens, head_size) of bits, and
    views of them.
    """
    rng = np.random.default_rng(seed)
    arrays = []
    for stream in layout.streams:
        shape = (count, layout.layer_count, stream.head_count, layout.token_count, stream.head_size)
        values = rng.standard_normal(shape).astype(np.float32)
        arrays.append((values.view(np.uint32) >> 16).astype(np.uint16))
    return arrays, PageViews.of_arrays(layout, arrays)


def empty_pages(count: int, layout: PageLayout = LAYOUT) -> tuple[list[np.ndarray], PageViews]:
    arrays, _ = random_pages(count, layout=layout)
    for array in arrays:
        array[...] = 0x7F7F
    return arrays, PageViews.of_arrays(layout, arrays)


def numbers(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def timed(call: object, *arguments: object) -> tuple[object, float]:
    start = time.monotonic()
    result = call(*arguments)  # type: ignore[operator]
    return result, time.monotonic() - start
