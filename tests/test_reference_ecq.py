"""The reference codec of ecq sections against a decoder and an encoder that do one element at a
time, as FORMAT.md says, and share no code with it; and what the codec promises.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvcodec import tables
from kvcodec._reference_trellis import search_path
from kvcodec.layout import DType
from kvcodec.reference import from_float32, to_float32
from kvcodec.reference_ecq import DamagedSection, EcqCodec, decode_ecq, encode_ecq
from kvcodec.rotary import INTERLEAVED, SPLIT, Rotary

F32 = np.float32
Bits = npt.NDArray[Any]
QUANTIZABLE = [dtype for dtype in DType if dtype.is_quantizable]
POWERS = [F32(2.0 ** (i / 16)) for i in range(16)]


def rotary_of(size: int, style: int = SPLIT, theta: float = 1e4) -> Rotary:
    frequencies = np.array([theta ** (-i / size) for i in range(0, size, 2)], np.float32)
    return Rotary(size, style, tuple(frequencies.astype(float).tolist()))


def rows_of(values: npt.NDArray[Any], dtype: DType) -> Bits:
    return from_float32(values.astype(np.float32), dtype)


def gaussian(shape: tuple[int, int, int], seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def power(n: int) -> np.float32:
    return F32(math.ldexp(float(POWERS[n % 16]), n // 16))


# --- a decoder that goes element by element


def tiles_of(shape: tuple[int, int, int]) -> list[tuple[int, range, range]]:
    heads, tokens, size = shape
    return [
        (head, range(t, min(t + 64, tokens)), range(c, min(c + 256, size)))
        for head in range(heads)
        for t in range(0, tokens, 64)
        for c in range(0, size, 256)
    ]


def group_lines(codec: EcqCodec, tokens: int, channels: int, turned: bool) -> list[list[int]]:
    """The sequences (channels or tokens) of each group."""
    if not codec.per_channel:
        return [[token] for token in range(tokens)]
    if not turned or codec.rotary is None:
        return [[channel] for channel in range(channels)]
    half = codec.rotary.size // 2
    split = codec.rotary.style == SPLIT
    pairs = [[i, i + half] if split else [2 * i, 2 * i + 1] for i in range(half)]
    return pairs + [[channel] for channel in range(2 * half, channels)]


class NaiveStream:
    def __init__(self, data: bytes) -> None:
        self.states = [int.from_bytes(data[2 * i : 2 * i + 2], "little") for i in range(32)]
        self.data, self.at = data, 64

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def sequence(self, table: tables.CodingTable, shift: int, count: int) -> list[int]:
        out: list[int] = []
        for start in range(0, count, 32):
            lanes = range(min(32, count - start))
            symbols = []
            for lane in lanes:
                x = self.states[lane]
                slot, j, before = x % 256, 0, 0
                while slot >= before + table.frequencies[j]:
                    before += table.frequencies[j]
                    j += 1
                self.states[lane] = table.frequencies[j] * (x // 256) + slot - before
                symbols.append(j)
            for lane in lanes:
                if self.states[lane] < 256:
                    self.states[lane] = self.states[lane] * 256 + self.byte()
            values = []
            for j in symbols:
                escaped = j == len(table.frequencies) - 1
                byte = self.byte() if escaped else 0
                values.append((byte ^ 128) - 128 if escaped else table.first + j)
            words = [
                int.from_bytes(bytes(self.byte() for _ in range(4)), "little") for _ in range(shift)
            ]
            for lane in lanes:
                low = sum((word >> lane & 1) << plane for plane, word in enumerate(words))
                out.append(values[lane] * 2**shift + low)
        return out


def class_table(index: int, family: int) -> tuple[tables.CodingTable, int]:
    shift = 0 if index <= 16 else math.ceil((index - 16) / 4)
    return tables.residual_table(family, index - 4 * shift), shift


def step_of(codec: EcqCodec, reference: int, scale: int) -> tuple[int, int]:
    """d, and the class of the elements."""
    sharp = min(-(2 if codec.per_channel else 1) * scale - (35 - codec.bits), 62)
    return 4 * (reference - scale) - sharp, min(max((sharp + 2) // 4 + 10, 0), 32)


def naive_decode(stored: bytes, shape: tuple[int, int, int], dtype: DType, codec: EcqCodec) -> Bits:
    out = np.zeros(shape, np.float32)
    tiles = tiles_of(shape)
    turned = stored[0] == 1
    at = math.ceil((8 + 6 * len(tiles)) / 64) * 64
    for number, (head, tokens, channels) in enumerate(tiles):
        entry = stored[8 + 6 * number : 14 + 6 * number]
        size = entry[0] + 256 * entry[1]
        stream = NaiveStream(stored[at : at + size])
        at += size
        reference = entry[2] - 160
        groups = group_lines(codec, len(tokens), len(channels), turned)
        scales = stream.sequence(*class_table(entry[3], 0), len(groups))
        means = [0] * len(channels)
        if codec.per_channel:
            means = stream.sequence(*class_table(entry[4], 0), len(channels))
        trellis = [(0, 0)] * 32
        for lines, scale in zip(groups, scales, strict=True):
            d, index = step_of(codec, reference, scale)
            half = power(d - 16)
            for line in lines:
                length = len(tokens) if codec.per_channel else len(channels)
                empty = scale == 127
                found = [] if empty else stream.sequence(*class_table(index, entry[5]), length)
                for i in range(length):
                    u = 0
                    if not empty:
                        o, q = trellis[i % 32]
                        u = 2 * found[i] + o
                        trellis[i % 32] = (q ^ (found[i] & 1), o)
                    token, channel = (i, line) if codec.per_channel else (line, i)
                    value = F32(means[channel] + u) * half
                    out[head, tokens[token], channels[channel]] = value
        assert stream.at == size
        assert stream.states == [256] * 32
    assert stored[at:] == bytes(64)
    if turned and codec.rotary is not None:
        table = codec.rotary.table(shape[1])
        for pair, (left, right) in enumerate(
            group_lines(codec, 1, shape[2], True)[: table.shape[1]]
        ):
            for head, token in itertools.product(range(shape[0]), range(shape[1])):
                cos, sin = table[token, pair]
                a, b = out[head, token, left], out[head, token, right]
                out[head, token, left] = a * cos - b * sin
                out[head, token, right] = b * cos + a * sin
    return from_float32(out, dtype)


# --- an encoder of one group that goes element by element


@dataclass
class NaiveGroup:
    lines: list[list[np.float32]]
    means: list[np.float32]
    largest: np.float32
    top: np.float32
    exponent: int

    @property
    def empty(self) -> bool:
        return self.largest == 0 and self.top == 0


def naive_group(lines: list[list[np.float32]], per_channel: bool) -> NaiveGroup:
    energy, means, largest = F32(0), [], F32(0)
    for number, line in enumerate(lines):
        mean = F32(0)
        if per_channel:
            for x in line:
                mean = mean + x
            mean = mean / F32(len(line))
            own = F32(0)
            for x in line:
                own = own + (x - mean) * (x - mean)
        else:
            sums = [F32(0)] * 16
            for i, x in enumerate(line):
                sums[i // 2 % 16] = sums[i // 2 % 16] + x * x
            for half in (8, 4, 2, 1):
                sums = [sums[i] + sums[i + half] for i in range(half)]
            own = sums[0]
        energy = own if number == 0 else energy + own
        means.append(mean)
        largest = max(largest, *(abs(x - mean) for x in line))
    top = max(abs(mean) for mean in means)
    square = energy / F32(len(lines) * len(lines[0]))
    exponent = -252
    if square >= F32(2.0**-126):
        fraction, e = math.frexp(float(square))
        exponent = 2 * (e - 1) + (fraction * 2 >= 2**0.25) + (fraction * 2 >= 2**0.75)
    if top > 0:
        exponent = max(exponent, 4 * (max(math.frexp(float(top))[1] - 1, -127)) - 32)
    return NaiveGroup(lines, means, largest, top, exponent)


def naive_numbers(
    groups: list[NaiveGroup], codec: EcqCodec
) -> tuple[int, list[int], list[list[int]]]:
    """r, the scales, and the means of each group's sequences."""
    full = [group for group in groups if not group.empty]
    reference = -160
    if full:
        highest = max(group.exponent for group in full)
        weight = sum(len(group.lines) for group in full)
        total = sum(len(g.lines) * max(g.exponent, highest - 48) for g in full)
        reference = min(max((2 * total + weight) // (2 * weight), -160), 95)
    scales, means = [], []
    for group in groups:
        e = group.exponent
        if not codec.per_channel and e >= reference - 4:
            e -= min(e - reference, 4) // 2
        e = max(e, reference - 126)
        while True:
            d, found = step_of(codec, reference, reference - e)
            inverse = power(16 - d)
            factor = inverse * F32(64 + max(0, (17 - found) // 2))
            if group.largest * factor <= F32(7952) and group.top * inverse <= F32(2000):
                break
            e += 1
        scales.append(127 if group.empty else reference - e)
        means.append([0 if group.empty else round(float(m * inverse)) for m in group.means])
    return reference, scales, means


def stored_numbers(
    stored: bytes, shape: tuple[int, int, int], codec: EcqCodec
) -> tuple[int, list[int], list[int]]:
    """r, scales and means of a section of one tile."""
    assert len(tiles_of(shape)) == 1
    stream = NaiveStream(stored[64 : 64 + int.from_bytes(stored[8:10], "little")])
    groups = group_lines(codec, shape[1], shape[2], stored[0] == 1)
    scales = stream.sequence(*class_table(stored[11], 0), len(groups))
    means = []
    if codec.per_channel:
        means = stream.sequence(*class_table(stored[12], 0), shape[2])
    return stored[10] - 160, scales, means


# --- strategies


@st.composite
def sections(draw: st.DrawFn, tokens: int = 70, size: int = 40) -> tuple[Bits, DType, EcqCodec]:
    """Rows whose channels and tokens differ in width and offset, and a codec that suits them."""
    dtype = draw(st.sampled_from(QUANTIZABLE))
    shape = (
        draw(st.integers(1, 2)),
        draw(st.integers(16, tokens) | st.integers(1, tokens)),
        draw(st.integers(16, size) | st.integers(1, size)),
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.0, 1.0, 3.0]))
    values = random.standard_normal(shape) * 2 ** (
        spread * random.standard_normal((shape[0], 1, shape[2]))
        + spread * random.standard_normal((shape[0], shape[1], 1))
        + draw(st.sampled_from([-20, 0, 8]))
    )
    offset = draw(st.sampled_from([0.0, 1.0, 100.0]))
    values = values + offset * random.standard_normal((shape[0], 1, shape[2]))
    values *= random.random((shape[0], shape[1], 1)) >= draw(st.sampled_from([0.0, 0.2]))
    values *= random.random((shape[0], 1, shape[2])) >= draw(st.sampled_from([0.0, 0.2]))
    rotary = None
    if shape[2] >= 2 and draw(st.booleans()):
        pairs = draw(st.integers(1, shape[2] // 2))
        rotary = rotary_of(2 * pairs, draw(st.sampled_from([SPLIT, INTERLEAVED])))
    codec = EcqCodec(draw(st.sampled_from([24, 40, 48, 64, 112])), draw(st.booleans()), rotary)
    return rows_of(values, dtype), dtype, codec


def is_raw(stored: bytes, rows: Bits) -> bool:
    return len(stored) == rows.nbytes


@settings(max_examples=40, deadline=None)
@given(sections())
def test_section_decodes_as_the_document_says(section: tuple[Bits, DType, EcqCodec]):
    """Every state ends where it must, every byte is used, and every element agrees."""
    rows, dtype, codec = section
    stored = encode_ecq(rows, dtype, codec)
    found = decode_ecq(stored, rows.shape, dtype, codec)
    if is_raw(stored, rows):
        assert (found == rows).all()
    else:
        assert len(stored) < rows.nbytes
        assert (found == naive_decode(stored, rows.shape, dtype, codec)).all()


@settings(max_examples=40, deadline=None)
@given(sections(tokens=64))
def test_encoder_chooses_as_the_document_says(section: tuple[Bits, DType, EcqCodec]):
    """Reference, scales and means of a tile are those of element-by-element arithmetic."""
    rows, dtype, codec = section
    rows = rows[:1]
    stored = encode_ecq(rows, dtype, codec)
    assume(not is_raw(stored, rows))
    values = to_float32(rows, dtype)[0]
    turned = stored[0] == 1
    lines = group_lines(codec, *values.shape, turned)
    if turned and codec.rotary is not None:
        table = codec.rotary.table(len(values))
        cos, sin = table[..., 0], table[..., 1]
        left, right = np.array(lines[: table.shape[1]]).T
        a, b = values[:, left].copy(), values[:, right].copy()
        values[:, left], values[:, right] = a * cos + b * sin, b * cos - a * sin
    table_of = values.T if codec.per_channel else values
    groups = [naive_group([list(table_of[i]) for i in group], codec.per_channel) for group in lines]
    reference, scales, means = naive_numbers(groups, codec)
    by_channel = {
        c: m
        for group, own in zip(lines, means, strict=True)
        for c, m in zip(group, own, strict=True)
    }
    wanted = [by_channel[c] for c in range(values.shape[1])] if codec.per_channel else []
    assert stored_numbers(stored, rows.shape, codec) == (reference, scales, wanted)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bits", [2, 2.5, 3, 4])
def test_what_is_decoded_is_as_large_as_what_was_encoded(bits: float, per_channel: bool):
    """Products of both add up to the squares: neither logits nor values shrink with the bits."""
    random = np.random.default_rng(int(10 * bits))
    values = random.standard_normal((1, 256, 128)) + 10 * per_channel
    rows = rows_of(values, DType.BF16)
    codec = EcqCodec(int(16 * bits), per_channel)
    found = decode_ecq(encode_ecq(rows, DType.BF16, codec), rows.shape, DType.BF16, codec)
    x, y = (to_float32(each, DType.BF16).astype(float) for each in (rows, found))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    assert 0.96 < (x * y).sum() / np.square(x).sum() < 1.015


# --- the trellis


@pytest.mark.parametrize("seed", range(4))
def test_path_is_the_cheapest_of_all(seed: int):
    """Against every sequence of indices near the numbers, prices included."""
    random = np.random.default_rng(seed)
    numbers = random.integers(-240, 240, 4)
    index = int(random.integers(6, 20))
    costs = tables.path_costs(index)

    def price(path: tuple[int, ...]) -> int:
        o = q = total = 0
        for k, v in zip(path, numbers.tolist(), strict=True):
            distance = abs(v + 0.5 - 64 * (2 * k + o)) // 4
            square = ((2 * distance + 1) ** 2 + 32) // 64
            total += min(127, square + int(costs[k + 32]))
            o, q = q ^ (k & 1), o
        return total

    best = min(price(path) for path in itertools.product(range(-3, 4), repeat=4))
    lanes = np.zeros((1, 4, 32), np.int64)
    lanes[0, :, 7] = numbers
    active = np.zeros((1, 4, 32), np.bool_)
    active[0, :, 7] = True
    found = search_path(lanes, active, np.broadcast_to(costs, (1, 4, 64)))
    assert price(tuple(found[0, :, 7].tolist())) == best
    assert not found[0, :, :7].any()
    assert not found[0, :, 8:].any()


# --- what the codec promises


def measured(codec: EcqCodec, values: npt.NDArray[Any], dtype: DType) -> tuple[float, float]:
    """Bits per element, everything counted, and mean square error."""
    rows = rows_of(values, dtype)
    stored = encode_ecq(rows, dtype, codec)
    found = to_float32(decode_ecq(stored, rows.shape, dtype, codec), dtype)
    return 8 * len(stored) / rows.size, float(((found - to_float32(rows, dtype)) ** 2).mean())


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [40, 48, 64, 96])
def test_distance_to_the_bound_on_gaussian_data(bits: int, per_channel: bool):
    """Bits are close to the nominal ones, and 0.3 bit above what any code needs for the error."""
    rate, error = measured(EcqCodec(bits, per_channel), gaussian((8, 64, 128)), DType.FP32)
    assert abs(rate - bits / 16) < 0.1
    assert rate - math.log2(1 / error) / 2 < 0.3


def test_more_bits_less_error():
    """In every sixteenth, and the option is not ignored."""
    sizes, errors = zip(
        *(
            measured(EcqCodec(bits, True), gaussian((2, 64, 64)), DType.BF16)
            for bits in range(24, 97, 8)
        ),
        strict=True,
    )
    assert list(sizes) == sorted(sizes)
    assert list(errors) == sorted(errors, reverse=True)


def test_an_offset_of_channels_costs_nothing_per_channel():
    """Means take it for a sixth of a bit; per token it spoils the rest."""
    values = gaussian((8, 64, 128))
    offset = 40 * gaussian((8, 1, 128), seed=1)
    rate, error = measured(EcqCodec(48, True), values, DType.FP32)
    moved, same = measured(EcqCodec(48, True), values + offset, DType.FP32)
    assert moved < rate + 0.2
    assert same < error * 1.05
    assert measured(EcqCodec(48, False), values + offset, DType.FP32)[1] > 20 * error


@pytest.mark.parametrize("style", [SPLIT, INTERLEAVED])
def test_derotation_removes_a_rotating_offset(style: int):
    """A bias in fast pairs makes channels a hundred times as wide, unless they are turned back,
    wherever the page begins.
    """
    rotary = rotary_of(128, style)
    values = gaussian((4, 64, 128))
    bias = np.zeros((4, 1, 64), np.complex128)
    bias[:, :, 2:6] = 100 * np.exp(1j)
    angle = np.array(rotary.frequencies) * (4711 + np.arange(64))[:, None]
    turned = bias * np.exp(1j * angle)
    left, right = rotary.pairs.T
    values[..., left] += turned.real
    values[..., right] += turned.imag
    rate, error = measured(EcqCodec(48, True, rotary), values, DType.FP32)
    plain_rate, plain_error = measured(EcqCodec(48, True), values, DType.FP32)
    assert rate < plain_rate + 0.05
    assert error * 5 < plain_error
    unmoved, _ = measured(EcqCodec(48, True, rotary), gaussian((4, 64, 128)), DType.FP32)
    assert rate < unmoved + 0.1


def test_flag_of_derotation_needs_the_rotation():
    """Per token, without rotary parameters, or with more rotated channels than there are, a section
    that says derotated is damage.
    """
    rotary = rotary_of(64)
    rows = rows_of(gaussian((1, 64, 64)), DType.BF16)
    for codec in (
        EcqCodec(48, False, rotary),
        EcqCodec(48, True),
        EcqCodec(48, True, rotary_of(66)),
    ):
        stored = bytearray(encode_ecq(rows, DType.BF16, codec))
        assert stored[0] == 0
        stored[0] = 1
        with pytest.raises(DamagedSection):
            decode_ecq(bytes(stored), rows.shape, DType.BF16, codec)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**31, -(2.0**31)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_section_outside_the_domain_is_raw(bad: float, per_channel: bool):
    values = gaussian((2, 64, 64))
    values[1, 3, 5] = bad
    rows = rows_of(values, DType.BF16)
    rows[1, 3, 5] = int(F32(bad).view(np.uint32)) >> 16
    stored = encode_ecq(rows, DType.BF16, EcqCodec(48, per_channel))
    assert stored == rows.tobytes()
    assert (decode_ecq(stored, rows.shape, DType.BF16, EcqCodec(48, per_channel)) == rows).all()


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.140625, 2.0**30, 2.0**-100, -(2.0**-133)])
def test_constant_section(value: float, per_channel: bool):
    """Zeros are exact and nearly free; else the error is one of elements of that size."""
    rows = rows_of(np.full((4, 64, 128), value), DType.BF16)
    codec = EcqCodec(48, per_channel)
    stored = encode_ecq(rows, DType.BF16, codec)
    found = to_float32(decode_ecq(stored, rows.shape, DType.BF16, codec), DType.BF16)
    if value == 0:
        assert not found.any()
        assert len(stored) < 4 * 64 * 128 / 20
    else:
        limit = abs(value) * (2.0**-7 if per_channel else 0.6) + 2.0**-60
        assert np.abs(found - value).max() <= limit


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_numbers_survive(data: st.DataObject):
    """Whatever the bits of the elements: the section decodes, and finite numbers stay finite."""
    dtype = data.draw(st.sampled_from(QUANTIZABLE))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = (1, data.draw(st.integers(8, 64)), data.draw(st.integers(8, 40)))
    rows = random.integers(0, 1 << (32 if dtype is DType.FP32 else 16), shape, np.uint32)
    rows = rows.astype(np.uint32 if dtype is DType.FP32 else np.uint16)
    values = to_float32(rows, dtype)
    with np.errstate(invalid="ignore"):
        rows[~(np.abs(values) < 2.0**31)] = 0
    rotary = rotary_of(8) if data.draw(st.booleans()) else None
    codec = EcqCodec(data.draw(st.integers(24, 112)), data.draw(st.booleans()), rotary)
    found = decode_ecq(encode_ecq(rows, dtype, codec), shape, dtype, codec)
    assert np.isfinite(to_float32(found, dtype)).all()


@pytest.mark.parametrize("per_channel", [False, True])
def test_damage_is_found_or_harmless(per_channel: bool):
    """Cut, extended or flipped at any place: DamagedSection, or elements; never anything else."""
    codec = EcqCodec(40, per_channel, rotary_of(16))
    rows = rows_of(gaussian((2, 20, 40)), DType.BF16)
    stored = encode_ecq(rows, DType.BF16, codec)
    assert not is_raw(stored, rows)
    found = 0
    random = np.random.default_rng(5)
    for at in range(0, len(stored), 3):
        flipped = bytearray(stored)
        flipped[at] ^= 1 << int(random.integers(8))
        try:
            decode_ecq(bytes(flipped), rows.shape, DType.BF16, codec)
        except DamagedSection:
            found += 1
    assert found > 0.3 * len(stored)
    for size in (0, 1, 63, 64, 80, 127, len(stored) - 1, len(stored) + 1):
        with pytest.raises(DamagedSection):
            decode_ecq((stored + b"\0")[:size], rows.shape, DType.BF16, codec)
