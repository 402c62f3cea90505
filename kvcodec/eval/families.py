"""Codecs to choose among: ecq in steps of a sixteenth of a bit, and KVTuner's ladders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcodec.errors import ConfigError
from kvcodec.eval.allocation import Curve, Frontier
from kvcodec.eval.probing import Probed
from kvcodec.section import ECQ_BITS, Axis, Kind, SectionCodec
from kvcodec.spec import CodecSpec

__all__ = ["ECQ", "LADDERS", "Allocation", "Family", "spec_of_sections"]


#: Bits of ecq that are tried on every section: 2, 3 and 4.5.
_PROBED_SIXTEENTHS = (32, 48, 72)


@dataclass(frozen=True, slots=True)
class Family:
    """Codecs for keys and values, by rising bits. `probed` of them are tried on every section; the
    others are read from curves through these, by their nominal bits.
    """

    name: str
    keys: tuple[SectionCodec, ...]
    values: tuple[SectionCodec, ...]
    probed: tuple[int, ...]

    @property
    def specs(self) -> list[CodecSpec]:
        """Keys and values alike in every layer, for each codec that is probed."""
        return [self.uniform(index) for index in self.probed]

    def uniform(self, index: int) -> CodecSpec:
        """The same codecs in every layer."""
        return CodecSpec(key=self.keys[index], value=self.values[index])

    def of_section(self, section: int) -> tuple[SectionCodec, ...]:
        """The codecs of a section: keys come before values, layer by layer."""
        return self.values if section % 2 else self.keys


class Allocation:
    """The frontier of a family on one model, from what its probed codecs cost each section."""

    def __init__(self, family: Family, probed: Sequence[Probed], largest: float) -> None:
        self.family = family
        self.rest = probed[0].rest
        count = len(probed[0].losses)
        nominal = [family.keys[index].nominal_bits or 16.0 for index in family.probed]
        at = np.array([codec.nominal_bits or 16.0 for codec in family.keys])
        self._sizes, self._losses = [], []
        for section in range(count):
            curve = Curve(
                tuple(nominal),
                tuple(each.losses[section] for each in probed),
                tuple(each.sizes[section] for each in probed),
            )
            self._sizes.append(curve.size(at))
            self._losses.append(curve.loss(at))
        self._frontier = Frontier(self._losses, self._sizes, max(largest - self.rest, 0.0))

    def of_size(self, bits: float) -> tuple[CodecSpec, float]:
        """The best spec of at most so many bits per value, and the divergence to expect of it.

        Raises `ConfigError` where even the smallest one takes more.
        """
        options = self._frontier.of_size(bits - self.rest)
        if options is None:
            least = self.rest + sum(float(sizes.min()) for sizes in self._sizes)
            raise ConfigError(
                f"{bits:g} bits per value cannot be reached: the smallest pages take {least:.3f}"
            )
        return self._spec(options), self._frontier.loss(options)

    def of_loss(self, loss: float) -> tuple[CodecSpec, float] | None:
        """The smallest spec from which at most this divergence is to be expected; None if there
        is none.
        """
        options = self._frontier.of_loss(loss)
        return None if options is None else (self._spec(options), self._frontier.loss(options))

    def uniform_of_size(self, bits: float) -> tuple[CodecSpec, float]:
        """The codecs that, alike in every layer, come nearest to so many bits per value."""
        sizes = np.sum(self._sizes, 0) + self.rest
        index = int(np.abs(sizes - bits).argmin())
        return self.family.uniform(index), float(sum(loss[index] for loss in self._losses))

    def _spec(self, options: Sequence[int]) -> CodecSpec:
        return spec_of_sections(
            [self.family.of_section(section)[option] for section, option in enumerate(options)]
        )


def spec_of_sections(codecs: Sequence[SectionCodec]) -> CodecSpec:
    """The spec that gives each section its codec, keys before values, layer by layer; what most
    layers have stands for all.
    """
    pairs = list(zip(codecs[::2], codecs[1::2], strict=True))
    key, value = Counter(pairs).most_common(1)[0][0]
    layers = tuple((layer, *pair) for layer, pair in enumerate(pairs) if pair != (key, value))
    return CodecSpec(key=key, value=value, layers=layers)


def _ecq() -> Family:
    keys = tuple(SectionCodec(Kind.ECQ, bits, axis=Axis.CHANNEL) for bits in ECQ_BITS)
    values = tuple(SectionCodec(Kind.ECQ, bits) for bits in ECQ_BITS)
    return Family("ecq", keys, values, tuple(map(ECQ_BITS.index, _PROBED_SIXTEENTHS)))


def _ladder(name: str, key: str, value: str) -> Family:
    bits = ("2", "4", "8")
    keys, values = (
        tuple(SectionCodec.parse(text.replace("N", each)) for each in bits) for text in (key, value)
    )
    return Family(name, keys, values, (0, 1, 2))


ECQ = _ecq()
#: KVTuner's two schemes at its 2, 4 and 8 bits: rows of a token, and KIVI's groups of 32.
LADDERS = (
    _ladder("KVTuner, per token", "intN-asym", "intN-asym"),
    _ladder("KVTuner, KIVI", "intN-channel-asym-g32", "intN-asym-g32"),
)
