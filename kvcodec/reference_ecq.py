"""Sections of kind ecq in plain numpy, laid out like 3.5 to 3.7 and 3.10 of proto/FORMAT.md: slow,
and the oracle of the tests.

Rows are arrays of element bits (heads, tokens, head_size) as in `kvcodec.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcodec._reference_choice import (
    EMPTY,
    Groups,
    Statistics,
    Steps,
    choose_reference,
    choose_scales,
    measure,
    power,
)
from kvcodec._reference_elements import from_float32, to_float32
from kvcodec._reference_stream import (
    LANES,
    TILE_TOKENS,
    CodedParts,
    DamagedSection,
    Integers,
    StreamReader,
    Symbols,
    TileEntry,
    join_parts,
    split_parts,
    tile_slices,
    write_stream,
)
from kvcodec._reference_transform import turned
from kvcodec._reference_trellis import half_steps, search_path
from kvcodec.layout import DType
from kvcodec.rotary import Rotary
from kvcodec.tables import class_parts, code_lengths, path_costs, residual_table

__all__ = [
    "DamagedSection",
    "EcqCodec",
    "QuantizedTiles",
    "decode_ecq",
    "dequantized_tiles",
    "encode_ecq",
    "quantized_tiles",
]

Bits = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

_DOMAIN = np.float32(2.0**31)
_CHOICES = range(0, 33, 4)  # of scale_class and mean_class
_FAMILY_STEPS = 8
_DEROTATION_TOKENS = 4


@dataclass(frozen=True)
class EcqCodec:
    """`bits` is the nominal number of bits per element times 16, from 24 to 97.

    With `rotary` a section per channel may be derotated.
    """

    bits: int
    per_channel: bool
    rotary: Rotary | None = None

    @property
    def steps(self) -> Steps:
        """The steps of its groups."""
        return Steps(self.bits, self.per_channel)

    def may_derotate(self, head_size: int) -> bool:
        """Whether a section of that head size may be stored derotated."""
        if self.rotary is None or not self.per_channel:
            return False
        return self.rotary.size <= head_size <= 256

    def groups(self, tokens: int, channels: int, derotated: bool) -> Groups:
        """The groups of a tile."""
        pairs = self.rotary.pairs if derotated and self.rotary is not None else None
        return Groups.of(tokens, channels, self.per_channel, pairs)


@dataclass(frozen=True)
class _Batch:
    """Tiles of one shape: their place in the directory and in the rows, and their elements."""

    index: Sequence[int]
    slices: Sequence[tuple[int, slice, slice]]
    values: Float32  # (tiles, tokens, channels)

    @property
    def tokens(self) -> int:
        return self.values.shape[1]

    @property
    def channels(self) -> int:
        return self.values.shape[2]

    @property
    def first_tokens(self) -> list[int]:
        return [tokens.start for _, tokens, _ in self.slices]


def _batches(values: Float32) -> list[_Batch]:
    found: dict[tuple[int, int], list[tuple[int, tuple[int, slice, slice]]]] = {}
    for index, place in enumerate(tile_slices(values.shape)):
        shape = values[place].shape
        found.setdefault((shape[0], shape[1]), []).append((index, place))
    return [
        _Batch(
            [index for index, _ in tiles],
            [place for _, place in tiles],
            np.stack([values[place] for _, place in tiles]),
        )
        for tiles in found.values()
    ]


@dataclass(frozen=True)
class QuantizedTiles:
    """Tiles of one shape as integers, (tiles, ...)."""

    groups: Groups
    reference: Integers  # r
    scales: Integers  # (tiles, groups)
    means: Integers  # (tiles, sequences), in the order of the sequences
    indices: Integers  # (tiles, sequences, elements)


def _by_step(sequences: Integers) -> Integers:
    """(tiles, steps, lanes) of (tiles, sequences, elements)."""
    tiles, count, length = sequences.shape
    padded = np.zeros((tiles, count, -(-length // LANES) * LANES), sequences.dtype)
    padded[..., :length] = sequences
    return padded.reshape(tiles, -1, LANES)


def _by_sequence(steps: Integers, shape: tuple[int, ...]) -> Integers:
    """Inverse of `_by_step`."""
    return steps.reshape(shape[0], shape[1], -1)[..., : shape[2]]


def _active(groups: Groups, scales: Integers, length: int) -> npt.NDArray[np.bool_]:
    """Which lanes of which steps hold an element."""
    full = (scales != EMPTY)[:, groups.group, None].astype(np.int64)
    return _by_step(np.repeat(full, length, axis=2)) > 0


def _quantize(
    sequences: Float32, found: Statistics, groups: Groups, steps: Steps
) -> QuantizedTiles:
    """Steps 5 to 8."""
    reference = choose_reference(found, groups)
    scales = choose_scales(found, reference, steps)
    inverse = power(16 - steps.exponent(reference[:, None], scales))[:, groups.group]
    means = np.rint(found.mean * inverse)
    means[(scales == EMPTY)[:, groups.group]] = 0
    gains = steps.gains(scales)[:, groups.group]
    products = sequences * (inverse * gains)[..., None]
    # In binary64 nothing is rounded before the end.
    numbers = np.rint(products.astype(np.float64) - (gains * means)[..., None]).astype(np.int64)
    length = sequences.shape[-1]
    numbers[(scales == EMPTY)[:, groups.group]] = 0
    per_class = np.stack([path_costs(index) for index in range(33)])
    costs = per_class[steps.classes(scales)][:, groups.group]
    costs = np.repeat(costs, -(-length // LANES), axis=1)
    path = search_path(_by_step(numbers), _active(groups, scales, length), costs)
    indices = _by_sequence(path, sequences.shape)
    return QuantizedTiles(groups, reference, scales, means.astype(np.int64), indices)


def dequantized_tiles(
    tiles: QuantizedTiles, first: Sequence[int], codec: EcqCodec, turn: bool
) -> Float32:
    """Numbers (tiles, tokens, channels) of tiles whose first tokens are `first`."""
    exponent = codec.steps.exponent(tiles.reference[:, None], tiles.scales)
    half = power(exponent - 16)[:, tiles.groups.group, None]
    shape = tiles.indices.shape
    u = half_steps(_by_step(tiles.indices), _active(tiles.groups, tiles.scales, shape[-1]))
    sums = (tiles.means[..., None] + _by_sequence(u, shape)).astype(np.float32)
    values = tiles.groups.tiles(sums * half)
    return turned(values, codec.rotary, first, 1) if turn and codec.rotary else values


def _length(values: Integers, family: int, index: int) -> int:
    return int(code_lengths(family, index)[values + 2048].sum())


def _sampled_length(indices: Integers, full: Integers, classes: Integers, family: int) -> int:
    """Of every eighth step of a tile."""
    steps = [
        (indices[i, start : start + LANES], classes[i])
        for i in full
        for start in range(0, indices.shape[1], LANES)
    ]
    return sum(_length(values, family, index) for values, index in steps[::_FAMILY_STEPS])


def _tile_stream(tiles: QuantizedTiles, at: int, steps: Steps) -> tuple[TileEntry, bytes]:
    """Step 9 and the stream of one tile."""
    groups, scales = tiles.groups, tiles.scales[at]
    means = np.empty_like(tiles.means[at])
    means[groups.order] = tiles.means[at]
    classes = steps.classes(scales)[groups.group]
    full = np.flatnonzero((scales != EMPTY)[groups.group])
    by_family = [_sampled_length(tiles.indices[at], full, classes, family) for family in (0, 1)]
    family = int(by_family[1] < by_family[0])
    scale_class = min(_CHOICES, key=lambda index: _length(scales, 0, index))
    mean_class = min(_CHOICES, key=lambda index: _length(means, 0, index))
    side = [(scales, scale_class), (means, mean_class)]
    if not groups.per_channel:
        mean_class = 0
        del side[1]
    sequences = [_symbols(values, 0, index) for values, index in side]
    sequences += [_symbols(tiles.indices[at, i], family, classes[i]) for i in full]
    entry = TileEntry(int(tiles.reference[at]) + 160, scale_class, mean_class, family)
    return entry, write_stream(sequences)


def _symbols(values: Integers, family: int, index: int) -> Symbols:
    number, shift = class_parts(index)
    return Symbols(residual_table(family, number), shift, values)


def _choose_turn(values: Float32, codec: EcqCodec) -> bool:
    """Step 4: whether derotation makes the groups narrower."""
    if codec.rotary is None or not codec.may_derotate(values.shape[2]):
        return False
    costs = [0, 0]
    for batch in _batches(values):
        every = _DEROTATION_TOKENS if batch.tokens == TILE_TOKENS else 1
        for turn in (False, True):
            groups = codec.groups(batch.tokens, batch.channels, turn)
            tiles = batch.values
            if turn:
                tiles = turned(tiles, codec.rotary, batch.first_tokens, -1)
            tiles = tiles[:, ::every]
            found = measure(groups.sequences(tiles), groups)
            exponent = np.where(found.empty, -252, found.exponent)
            costs[turn] += int((exponent * groups.sizes).sum())
    channels = sum(len(batch.index) * batch.channels for batch in _batches(values))
    return 4 * costs[1] < 4 * costs[0] + channels


def quantized_tiles(
    values: Float32, codec: EcqCodec
) -> tuple[bool, list[tuple[_Batch, QuantizedTiles]]]:
    """Whether the section is derotated, and its tiles as integers."""
    turn = _choose_turn(values, codec)
    out = []
    for batch in _batches(values):
        groups = codec.groups(batch.tokens, batch.channels, turn)
        tiles = batch.values
        if turn and codec.rotary is not None:
            tiles = turned(tiles, codec.rotary, batch.first_tokens, -1)
        sequences = groups.sequences(tiles)
        out.append((batch, _quantize(sequences, measure(sequences, groups), groups, codec.steps)))
    return turn, out


def encode_ecq(rows: Bits, dtype: DType, codec: EcqCodec) -> bytes:
    """The stored bytes of a section without padding; the raw elements where coding does not pay."""
    raw = np.ascontiguousarray(rows).tobytes()
    values = to_float32(rows, dtype)
    if not (np.abs(values) < _DOMAIN).all():
        return raw
    turn, batches = quantized_tiles(values, codec)
    coded: dict[int, tuple[TileEntry, bytes]] = {}
    for batch, tiles in batches:
        for at, index in enumerate(batch.index):
            coded[index] = _tile_stream(tiles, at, codec.steps)
    entries, streams = zip(*(coded[index] for index in range(len(coded))), strict=True)
    stored = join_parts(CodedParts(int(turn), entries, b"", streams))
    return stored if len(stored) < len(raw) else raw


def _read_tile(
    entry: TileEntry, stream: bytes, codec: EcqCodec, groups: Groups, length: int
) -> QuantizedTiles:
    reader = StreamReader(stream)
    number, shift = class_parts(entry.scale_class)
    scales = reader.read(residual_table(0, number), shift, len(groups.sizes))
    scales = (scales + 128 & 255) - 128
    means = np.zeros(len(groups.order), np.int64)
    if groups.per_channel:
        number, shift = class_parts(entry.mean_class)
        means = reader.read(residual_table(0, number), shift, len(means))[groups.order]
        means = (means + 32768 & 65535) - 32768
    reference = np.array(entry.reference - 160)
    classes = codec.steps.classes(scales)[groups.group]
    indices = np.zeros((len(groups.order), length), np.int64)
    for at, index in enumerate(classes.tolist()):
        if scales[groups.group[at]] != EMPTY:
            number, shift = class_parts(index)
            indices[at] = reader.read(residual_table(entry.family, number), shift, length)
    reader.finish()
    return QuantizedTiles(groups, reference[None], scales[None], means[None], indices[None])


def decode_ecq(stored: bytes, shape: tuple[int, int, int], dtype: DType, codec: EcqCodec) -> Bits:
    """The rows (heads, tokens, head_size) of a section. DamagedSection if it is none."""
    out: Bits = np.zeros(shape, np.uint32 if dtype is DType.FP32 else np.uint16)
    if len(stored) == out.nbytes:
        return np.frombuffer(stored, out.dtype).reshape(shape).copy()
    places = list(tile_slices(shape))
    parts = split_parts(stored, len(places), 0, int(codec.may_derotate(shape[2])))
    turn = bool(parts.flags & 1)
    for place, entry, stream in zip(places, parts.entries, parts.streams, strict=True):
        _, token, channel = place
        groups = codec.groups(token.stop - token.start, channel.stop - channel.start, turn)
        length = token.stop - token.start if codec.per_channel else channel.stop - channel.start
        tiles = _read_tile(entry, stream, codec, groups, length)
        values = dequantized_tiles(tiles, [token.start], codec, turn)
        out[place] = from_float32(values[0], dtype)
    return out
