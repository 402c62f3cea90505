"""Keys, values and queries that look like a model's, made from published statistics alone.

    python tools/synthetic_kv.py [--bias 100] [--tokens 1024] [--seed 1]

prints bits per element, the divergence of the attention and the error of its output for the coded
sections and for plain 4-bit groups. Nothing here was measured on a model: a few key channels a
head are ten times as large as the others and lie in slow rotary pairs, gains are log-normal,
spectra fall with a power, neighbours in time are correlated, tokens have heavy tails, some tokens
are small, and the first one is an attention sink with hardly a value. Differences between codecs
of single elements follow from theory and carry over; the sizes of errors are assumptions.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from kvcodec.layout import DType  # noqa: E402
from kvcodec.reference import decode_section, encode_section, to_float32  # noqa: E402
from kvcodec.reference_ecq import EcqCodec, decode_ecq, encode_ecq  # noqa: E402
from kvcodec.reference_lossless import encode_lossless  # noqa: E402
from kvcodec.rotary import SPLIT, Rotary  # noqa: E402
from kvcodec.spec import SectionCodec  # noqa: E402

Numbers = npt.NDArray[np.float64]
Bits = npt.NDArray[Any]

PAGE = 64
SINK_SHARE = 0.3


@dataclass(frozen=True)
class Geometry:
    """Heads of keys and values, query heads for each, channels of a head, base of the rotation."""

    heads: int
    queries: int
    size: int
    theta: float

    @property
    def rotary(self) -> Rotary:
        """The rotation of its keys."""
        exponents = np.arange(0, self.size, 2) / self.size
        frequencies = (self.theta**-exponents).astype(np.float32)
        return Rotary(self.size, SPLIT, tuple(frequencies.astype(float).tolist()))


QWEN_7B = Geometry(4, 7, 128, 1e6)
LLAMA_8B = Geometry(8, 4, 128, 5e5)


def to_bf16(values: Numbers) -> Bits:
    """Bits of the nearest bf16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Bits) -> Numbers:
    """The numbers."""
    return to_float32(bits, DType.BF16).astype(np.float64)


def rotated(keys: Numbers, geometry: Geometry) -> Numbers:
    """(heads, tokens, size) turned by the angle of each token."""
    half = geometry.size // 2
    frequency = geometry.theta ** (-np.arange(half) / half)
    angle = np.arange(keys.shape[1])[:, None] * frequency
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = keys[..., :half], keys[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class SyntheticLayer:
    """One layer. `bias` (in deviations) sits in four fast pairs of each head's keys."""

    def __init__(self, geometry: Geometry, seed: int, bias: float = 0) -> None:
        self.geometry = geometry
        self.random = np.random.default_rng(seed)
        heads, size = geometry.heads, geometry.size
        self._key_mixing = [self._mixing(power=1.1) for _ in range(heads)]
        self._value_mixing = [self._mixing(power=0.55) for _ in range(heads)]
        self._gain = np.exp(0.45 * self.random.standard_normal((heads, 1, size)))
        self._offset = 0.5 * self.random.standard_normal((heads, 1, size))
        self._sink = 0.3 * self.random.standard_normal((heads, size))
        half = size // 2
        for head in range(heads):
            for row, count, width in ((self._offset[head, 0], 5, 10.0), (self._sink[head], 4, 8.0)):
                pairs = self.random.choice(np.arange(half * 9 // 16, half), count, replace=False)
                sides = half * self.random.integers(0, 2, count)
                sign = self.random.choice([-1.0, 1.0], count)
                row[pairs + sides] = sign * width * self.random.uniform(0.6, 1.4, count)
            if bias:
                pairs = self.random.choice(np.arange(1, half // 4), 4, replace=False)
                angle = self.random.uniform(0, 2 * math.pi, 4)
                self._offset[head, 0, pairs] += bias * np.cos(angle)
                self._offset[head, 0, pairs + half] += bias * np.sin(angle)

    def _mixing(self, power: float) -> Numbers:
        """Random directions of falling strength."""
        size = self.geometry.size
        basis = np.linalg.qr(self.random.standard_normal((size, size)))[0]
        strength = np.arange(1, size + 1) ** -power
        return basis * np.sqrt(strength / strength.mean())

    def _noise(self, tokens: int, memory: float, freedom: int) -> Numbers:
        """(heads, tokens, size) of unit deviation, tails of a t distribution, AR(1) in time."""
        random, geometry = self.random, self.geometry
        shape = (geometry.heads, tokens, geometry.size)
        scale = np.sqrt((freedom - 2) / random.chisquare(freedom, (1, tokens, 1)))
        noise = random.standard_normal(shape) * scale
        for token in range(1, tokens):
            fresh = math.sqrt(1 - memory * memory) * noise[:, token]
            noise[:, token] = memory * noise[:, token - 1] + fresh
        return noise

    def cache(self, tokens: int) -> tuple[Bits, Bits]:
        """Keys and values, bf16 (heads, tokens, size)."""
        keys = self._noise(tokens, 0.3, 10) @ np.array(self._key_mixing).transpose(0, 2, 1)
        keys = keys * self._gain + self._offset
        keys[:, 0] = self._sink + 0.05 * keys[:, 0]
        values = self._noise(tokens, 0.15, 8) @ np.array(self._value_mixing).transpose(0, 2, 1)
        values *= np.exp(0.35 * self.random.standard_normal((1, tokens, 1)))
        values[:, self.random.random(tokens) < 0.02] *= 0.25
        values[:, 0] *= 0.04
        return to_bf16(rotated(keys, self.geometry)), to_bf16(values)

    def queries(self, keys: Bits, count: int) -> Numbers:
        """(heads, count, size): each attends to between 4 and 400 tokens, and to the sink."""
        random, size = self.random, self.geometry.size
        numbers = from_bf16(keys)
        tokens = numbers.shape[1]
        out = np.zeros((len(numbers), count, size))
        for head, rows in enumerate(numbers):
            mean, deviation = rows[1:].mean(axis=0), rows[1:].std(axis=0)
            centred = rows - mean
            for index in range(count):
                targets = tokens - 1 - (random.random(4) ** 3 * (tokens - 2)).astype(int)
                query = random.random(4) @ (centred[targets] / deviation)
                query += 0.6 * (0.3 + deviation) / deviation.mean() * random.standard_normal(size)
                query *= _sharpened(centred[1:] @ query / math.sqrt(size), random.uniform(1.4, 6))
                scores = centred[1:] @ query / math.sqrt(size)
                wanted = np.log(np.exp(scores - scores.max()).sum()) + scores.max()
                wanted += math.log(SINK_SHARE / (1 - SINK_SHARE)) - centred[0] @ query / math.sqrt(
                    size
                )
                out[head, index] = query + centred[0] * wanted * math.sqrt(size) / (
                    centred[0] @ centred[0]
                )
        return out


def _sharpened(scores: Numbers, entropy: float) -> float:
    """What to multiply scores by so that their softmax has that entropy."""
    low, high = 1e-4, 1e4
    for _ in range(50):
        middle = math.sqrt(low * high)
        weight = np.exp(middle * (scores - scores.max()))
        weight /= weight.sum()
        if -(weight * np.log(weight + 1e-300)).sum() > entropy:
            low = middle
        else:
            high = middle
    return low


def attention(queries: Numbers, keys: Numbers, values: Numbers) -> tuple[Numbers, Numbers]:
    """Weights (heads, queries, tokens) and outputs (heads, queries, size)."""
    scores = queries @ keys.transpose(0, 2, 1) / math.sqrt(keys.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights, weights @ values


@dataclass(frozen=True)
class Loss:
    """Of a codec on one layer. `output`: relative error of the attention's output; `divergence`: of
    its weights, keys alone coded.
    """

    key_bits: float
    value_bits: float
    divergence: float
    output: float

    @property
    def bits(self) -> float:
        """Per element of the whole cache."""
        return (self.key_bits + self.value_bits) / 2


def _pages(rows: Bits) -> list[Bits]:
    return [rows[:, at : at + PAGE] for at in range(0, rows.shape[1], PAGE)]


def ecq(rows: Bits, codec: EcqCodec) -> tuple[float, Bits]:
    """Bits per element of pages of 64 tokens, and what they decode to."""
    size, out = 0, []
    for page in _pages(rows):
        stored = encode_ecq(page, DType.BF16, codec)
        size += len(stored)
        out.append(decode_ecq(stored, page.shape, DType.BF16, codec))
    return 8 * size / rows.size, np.concatenate(out, axis=1)


def plain(rows: Bits, codec: SectionCodec, rotary: Rotary | None = None) -> tuple[float, Bits]:
    """Bits per element of an int or fp8 codec, and what it decodes to."""
    size, out = 0, []
    for page in _pages(rows):
        stored, _ = encode_section(page, DType.BF16, codec, rotary)
        size += len(stored)
        out.append(decode_section(stored, page.shape, DType.BF16, codec, rotary))
    return 8 * size / rows.size, np.concatenate(out, axis=1)


def loss(
    queries: Numbers, cache: tuple[Bits, Bits], keys: tuple[float, Bits], values: tuple[float, Bits]
) -> Loss:
    """Of coded keys and values, each with its bits per element."""
    true_weights, true_output = attention(queries, *map(from_bf16, cache))
    weights, output = attention(queries, from_bf16(keys[1]), from_bf16(values[1]))
    ratio = np.log((true_weights + 1e-30) / (weights + 1e-30))
    divergence = float((true_weights * ratio).sum(axis=-1).mean())
    error = np.linalg.norm(output - true_output, axis=-1) / np.linalg.norm(true_output, axis=-1)
    return Loss(keys[0], values[0], divergence, float(error.mean()))


#: Name -> codecs of keys and values.
PLAIN = {
    "fp8": ("fp8", "fp8"),
    "kivi g64 4 bit": ("int4-channel-asym", "int4-asym-g64"),
    "kivi 4, derotated": ("int4-channel-derotated-asym", "int4-asym-g64"),
    "kivi 2, derotated": ("int2-channel-derotated-asym-g32", "int2-asym-g32"),
    "int4 asym g64": ("int4-asym-g64", "int4-asym-g64"),
    "hadamard int4 asym": ("int4-hadamard-asym", "int4-hadamard-asym"),
    "hadamard int4 g64": ("int4-hadamard-g64", "int4-hadamard-g64"),
}


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--bias", type=float, default=0, help="deviations, in fast pairs")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    for name, geometry in (("qwen", QWEN_7B), ("llama", LLAMA_8B)):
        layer = SyntheticLayer(geometry, arguments.seed, arguments.bias)
        cache = layer.cache(arguments.tokens)
        queries = layer.queries(cache[0], 32)
        ratios = [
            sum(page.nbytes for page in _pages(rows))
            / sum(len(encode_lossless(p, DType.BF16, per_channel=axis)) for p in _pages(rows))
            for rows, axis in zip(cache, (True, False), strict=True)
        ]
        print(f"{name}: lossless keys {ratios[0]:.3f}x, values {ratios[1]:.3f}x")
        rows = []
        for title, (key, value) in PLAIN.items():
            keys = plain(cache[0], SectionCodec.parse(key), geometry.rotary)
            values = plain(cache[1], SectionCodec.parse(value))
            rows.append((title, loss(queries, cache, keys, values)))
        for nominal in (2.5, 3.0, 3.5, 4.0):
            for rotary in (None, geometry.rotary):
                keys = ecq(cache[0], EcqCodec(int(16 * nominal), True, rotary))
                values = ecq(cache[1], EcqCodec(int(16 * nominal), False))
                title = f"ecq {nominal} {'derotated' if rotary else 'plain'}"
                rows.append((title, loss(queries, cache, keys, values)))
        for title, row in rows:
            print(
                f"{name} {title:20} bits {row.key_bits:.3f} {row.value_bits:.3f} = {row.bits:.3f}"
                f"  divergence {row.divergence:.4f}  output {row.output:.4f}"
            )


if __name__ == "__main__":
    main()
