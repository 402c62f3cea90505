"""How fast a codec is: encode and decode against memcpy of the same raw bytes, in turns.

The pages have the geometry of Qwen2.5-7B, 64 tokens, and lie in memory that is in no cache. A round
copies a few of them, encodes the next few, copies the next, and decodes what was encoded some
rounds ago; a ratio is taken within a round, and medians over rounds are reported. Times are CPU
time of the process, which runs one thread: waiting for a processor does not change them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from synthetic_kv import QWEN_7B, SyntheticLayer

from kvcodec.cli.bench_memory import Memory, layout_of
from kvcodec.cli.bench_traffic import MEMCPY, run_traffic
from kvcodec.codec import Codec
from kvcodec.identity import Identity, Namespace
from kvcodec.plan import PagePlan
from kvcodec.spec import CodecSpec
from peers.base import Peer

GEOMETRY, PAGE_TOKENS = "qwen2.5-7b", 64
_PAGES, _CHUNK = 32, 4
_KEY_BYTES = 64
#: Chunks between encoding and decoding: more bytes than any cache here holds.
_LAG = 5
_DISTINCT_LAYERS, _DISTINCT_PAGES = 7, 16
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 60

#: Encodes or decodes the pages of a chunk.
Operation = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians and quartiles over rounds; ratios are above 1 where memcpy is slower."""

    encode_ratio: float
    encode_p25: float
    encode_p75: float
    decode_ratio: float
    decode_p25: float
    decode_p75: float
    encode_gb_per_s: float
    decode_gb_per_s: float
    memcpy_gb_per_s: float
    rounds: int

    def as_json(self) -> dict[str, float]:
        """One row, with as many digits as mean something."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


@cache
def memory() -> Memory:
    """Pages of synthetic keys and values, all distinct within a page."""
    layout = layout_of(GEOMETRY, PAGE_TOKENS)
    found = Memory.allocate(layout, _PAGES * layout.raw_bytes, _CHUNK * layout.raw_bytes)
    caches = [
        SyntheticLayer(QWEN_7B, seed).cache(_DISTINCT_PAGES * PAGE_TOKENS)
        for seed in range(_DISTINCT_LAYERS)
    ]
    source = _pages(found)
    for page in range(_PAGES):
        for layer in range(layout.layer_count):
            at = (page + 3 * (layer // _DISTINCT_LAYERS)) % _DISTINCT_PAGES * PAGE_TOKENS
            for kind, rows in enumerate(caches[layer % _DISTINCT_LAYERS]):
                source[kind, page, layer] = rows[:, at : at + PAGE_TOKENS]
    return found


def _pages(found: Memory) -> np.ndarray:
    """(keys and values, pages, layers, heads, tokens, head size) of the source, as 16 bits."""
    layout = found.layout
    stream = layout.streams[0]
    shape = (layout.layer_count, stream.head_count, layout.token_count, stream.head_size)
    return found.source.view(np.uint16).reshape(2, found.page_count, *shape)


def of_spec(text: str, seconds: float) -> Speed:
    """This project's codec, with the rotation of the keys known to it; a batch for every chunk."""
    found, codec = memory(), Codec(1)
    spec = CodecSpec.parse(text)
    namespace = Namespace(Identity.of(model="peers"), found.layout)
    sections = spec.section_codecs(found.layout)
    plan = PagePlan.build(namespace, sections, _KEY_BYTES, rotary=QWEN_7B.rotary)
    keys = [f"{page:0{_KEY_BYTES}x}".encode() for page in range(_PAGES)]
    slots, sizes = found.slots(plan.page_bytes), [0] * _PAGES
    source, target = (found.views(m, "canonical") for m in (found.source, found.decoded))

    def encode(chunk: int) -> None:
        part = _slice(found, chunk)
        encoded = codec.encode_into(plan, keys[part], source.select(part), slots[part])
        sizes[part] = encoded.page_bytes.tolist()

    def decode(chunk: int) -> None:
        part = _slice(found, chunk)
        pages = [slot[:size] for slot, size in zip(slots[part], sizes[part], strict=True)]
        errors = codec.decode_into(namespace, plan, keys[part], pages, target.select(part))
        if any(errors):
            raise RuntimeError(f"{text} does not decode what it encoded: {errors}")

    try:
        return _measured(encode, decode, seconds)
    finally:
        codec.close()


def of_peer(peer: Peer, seconds: float) -> Speed:
    """A peer, a page at a time, from and to tensors of bf16."""
    found = memory()
    pages = torch.from_numpy(_pages(found).view(np.int16)).view(torch.bfloat16)
    stored: dict[int, Any] = {}

    def encode(chunk: int) -> None:
        for page in found.pages_of(chunk):
            stored[page] = peer.encode(pages[0, page], pages[1, page]).payload

    def decode(chunk: int) -> None:
        for page in found.pages_of(chunk):
            keys, values = peer.decode(stored[page])
            keys.to(torch.bfloat16)
            values.to(torch.bfloat16)

    return _measured(encode, decode, seconds)


def _slice(found: Memory, chunk: int) -> slice:
    pages = found.pages_of(chunk)
    return slice(pages.start, pages.stop)


def _cpu_seconds(operation: Operation, chunk: int) -> float:
    before = time.process_time_ns()
    operation(chunk)
    return (time.process_time_ns() - before) / 1e9


def _measured(encode: Operation, decode: Operation, seconds: float) -> Speed:
    found = memory()
    raw, count = found.layout.raw_bytes, found.chunk_count
    ranges = [found.ranges(c, found.source, raw, found.decoded, raw) for c in range(count)]

    def memcpy(chunk: int) -> float:
        return run_traffic(MEMCPY, ranges[chunk % count], 1).cpu_seconds

    encode(0)
    decode(0)
    end = time.monotonic() + seconds
    samples: list[tuple[float, float, float, float]] = []
    while len(samples) < _FEWEST_ROUNDS or (time.monotonic() < end and len(samples) < _MOST_ROUNDS):
        at = len(samples)
        first = memcpy(at + 2)
        encoding = _cpu_seconds(encode, at % count)
        second = memcpy(at + 3)
        decoding = _cpu_seconds(decode, max(at - _LAG, 0) % count)
        samples.append((first, encoding, second, decoding))
    size = raw * found.chunk_pages / 1e9
    first, encoding, second, decoding = (np.array(column) for column in zip(*samples, strict=True))
    encode_quartiles = np.percentile(first / encoding, [50, 25, 75]).tolist()
    decode_quartiles = np.percentile(second / decoding, [50, 25, 75]).tolist()
    return Speed(
        *encode_quartiles,
        *decode_quartiles,
        encode_gb_per_s=size / statistics.median(encoding),
        decode_gb_per_s=size / statistics.median(decoding),
        memcpy_gb_per_s=size / statistics.median([*first, *second]),
        rounds=len(samples),
    )
