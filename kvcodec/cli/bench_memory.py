"""The memory a benchmark works in: raw pages as a host pool holds them, and encoded ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcodec.cli.bench_traffic import RANGE
from kvcodec.errors import ConfigError
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.workers import Buffers

__all__ = ["AXES", "GEOMETRIES", "Memory", "available_bytes", "cache_bytes", "fill", "layout_of"]

#: Layers, key-value heads and head size of models in bf16 on one rank.
GEOMETRIES: Mapping[str, tuple[int, int, int]] = {
    "qwen2.5-7b": (28, 4, 128),
    "llama3.1-8b": (32, 8, 128),
}

#: Name of a memory layout -> its order of the canonical axes (page, layer, head, token, element).
#: `page_first` and `layer_first` are those of SGLang's host pools.
AXES: Mapping[str, tuple[int, int, int, int, int]] = {
    "canonical": (0, 1, 2, 3, 4),
    "page_first": (0, 3, 1, 2, 4),
    "layer_first": (1, 0, 3, 2, 4),
}

_SEED = 20240229
_DISTINCT_BYTES = 16 << 20
#: More than the header of any page here. A page that is not shrunk grows by it.
_HEADER_ROOM = 1 << 16

Bytes = npt.NDArray[np.uint8]


def layout_of(geometry: str, page_tokens: int) -> PageLayout:
    """The page of a model."""
    if geometry not in GEOMETRIES:
        raise ConfigError(f"geometry {geometry!r}; known are {', '.join(GEOMETRIES)}")
    layers, heads, size = GEOMETRIES[geometry]
    return PageLayout.mha(
        dtype=DType.BF16,
        token_count=page_tokens,
        layer_count=layers,
        head_count=heads,
        head_size=size,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """Pages in three places, all touched beforehand: `source`, `decoded` and `encoded`.

    `streamed` is `decoded` with some room behind it: where a stream writes as much as an encoder.

    Pages are worked on in chunks, one after the other in a circle, so that a chunk has left the
    caches when its turn comes again.
    """

    layout: PageLayout
    page_count: int
    chunk_pages: int
    source: Bytes
    streamed: Bytes
    encoded: Bytes

    @classmethod
    def allocate(cls, layout: PageLayout, working_set_bytes: int, chunk_bytes: int) -> Memory:
        """Raises `ConfigError` if the machine has not enough memory."""
        chunk_pages = max(1, min(chunk_bytes, working_set_bytes // 2) // layout.raw_bytes)
        chunks = max(2, -(-working_set_bytes // (chunk_pages * layout.raw_bytes)))
        page_count = chunks * chunk_pages
        size = page_count * layout.raw_bytes
        encoded_bytes = size + page_count * _HEADER_ROOM
        wanted = size + 2 * encoded_bytes
        if wanted > available_bytes():
            raise ConfigError(
                f"a working set of {size >> 20} MiB needs {wanted >> 20} MiB of memory and "
                f"{available_bytes() >> 20} MiB are free: choose a smaller --working-set-mb"
            )
        buffers = Buffers(wanted)
        source = buffers.acquire(size, 0)
        streamed, encoded = buffers.acquire(encoded_bytes, 0), buffers.acquire(encoded_bytes, 0)
        assert source is not None and streamed is not None and encoded is not None
        streamed.fill(0)
        encoded.fill(0)
        return cls(layout, page_count, chunk_pages, source, streamed, encoded)

    @property
    def decoded(self) -> Bytes:
        """Raw pages, as `source` holds them."""
        return self.streamed[: len(self.source)]

    @property
    def chunk_count(self) -> int:
        """Chunks in the circle."""
        return self.page_count // self.chunk_pages

    def pages_of(self, chunk: int) -> range:
        """The pages of a chunk."""
        return range(chunk * self.chunk_pages, (chunk + 1) * self.chunk_pages)

    def views(self, memory: Bytes, axes: str) -> PageViews:
        """All pages of `source` or `decoded`, in a memory layout: keys first, then values."""
        arrays = []
        half = memory.view(np.uint16).reshape(2, -1)
        for stream, part in zip(self.layout.streams, half, strict=True):
            layers, heads, tokens = (
                self.layout.layer_count,
                stream.head_count,
                self.layout.token_count,
            )
            canonical = (self.page_count, layers, heads, tokens, stream.head_size)
            order = AXES[axes]
            array = part.reshape([canonical[axis] for axis in order])
            arrays.append(array.transpose(np.argsort(order).tolist()))
        return PageViews.of_arrays(self.layout, arrays)

    def slots(self, page_bytes: int) -> list[Bytes]:
        """The encoded pages, one behind the other."""
        if page_bytes * self.page_count > len(self.encoded):
            raise ConfigError(
                f"this codec makes {page_bytes} bytes of a page of {self.layout.raw_bytes}: use "
                "another one, or a larger --page-tokens"
            )
        starts = range(0, page_bytes * self.page_count, page_bytes)
        return [self.encoded[start : start + page_bytes] for start in starts]

    def ranges(
        self, chunk: int, source: Bytes, read_bytes: int, target: Bytes, write_bytes: int
    ) -> npt.NDArray[np.void]:
        """The traffic of the pages of a chunk, for `run_traffic`."""
        end = self.pages_of(chunk).stop
        assert end * read_bytes <= len(source) and end * write_bytes <= len(target)
        pages = np.arange(self.page_count, dtype=np.uint64)[self.pages_of(chunk)]
        ranges = np.zeros(len(pages), RANGE)
        ranges["source"] = np.uint64(_address(source)) + pages * np.uint64(read_bytes)
        ranges["read_bytes"] = read_bytes
        ranges["target"] = np.uint64(_address(target)) + pages * np.uint64(write_bytes)
        ranges["write_bytes"] = write_bytes
        return ranges


def fill(memory: Memory) -> None:
    """Fill the source with bf16 numbers such as keys and values are: normal, with a scale per
    rotary pair of channels and a few pairs far larger than the others.
    """
    rng = np.random.default_rng(_SEED)
    head_size = memory.layout.streams[0].head_size
    rows = min(_DISTINCT_BYTES, len(memory.source)) // (2 * head_size)
    pairs = head_size // 2
    scales = np.exp(rng.normal(0.0, 0.5, pairs)).astype(np.float32)
    scales[rng.choice(pairs, max(1, pairs // 50), replace=False)] *= 10
    scales = np.tile(scales, 2)
    values = rng.standard_normal((rows, head_size), np.float32) * scales
    block = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).reshape(-1).view(np.uint8)
    for at in range(0, len(memory.source), len(block)):
        part = memory.source[at : at + len(block)]
        part[:] = block[: len(part)]


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_bytes() -> int:
    """The largest cache of the first processor, 0 if it is not known."""
    largest = 0
    for index in range(8):
        path = f"/sys/devices/system/cpu/cpu0/cache/index{index}/size"
        try:
            with open(path, encoding="ascii") as file:
                text = file.read().strip()
        except OSError:
            break
        if text.endswith("K") and text[:-1].isdecimal():
            largest = max(largest, int(text[:-1]) * 1024)
    return largest


def _address(array: Bytes) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
