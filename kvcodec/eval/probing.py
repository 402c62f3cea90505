"""Runs of a model with coded caches, each kept in a journal: one section alone, or all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcodec.codec import Codec
from kvcodec.errors import ConfigError
from kvcodec.eval.journal import Journal
from kvcodec.eval.metrics import Estimate, divergence, loss_of
from kvcodec.eval.model import CachedModel
from kvcodec.eval.pages import SpecCodec
from kvcodec.eval.runner import Options, Window
from kvcodec.rotary import Rotary
from kvcodec.spec import CodecSpec

__all__ = ["Measured", "Probed", "Runs", "WindowSet", "split_windows"]

#: Tokens (context,) of windows, by where in the text they begin.
WindowSet = Mapping[int, Tensor]


def split_windows(
    tokens: Sequence[int], bos: int | None, options: Options, counts: Sequence[int], seed: int
) -> list[WindowSet]:
    """Sets of as many windows as `counts` say, no token in two of them, drawn by `seed`; each
    behind `bos` if there is one.
    """
    length = options.context - (bos is not None)
    starts = torch.arange(0, len(tokens) - length + 1, length)
    if len(starts) < sum(counts):
        raise ConfigError(
            f"the text has {len(starts)} windows of {options.context} tokens, "
            f"{' + '.join(map(str, counts))} are wanted: give more text, a smaller --context, or "
            "fewer --windows and --held-out"
        )
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))
    drawn = iter(starts[order].tolist())
    head = [] if bos is None else [bos]
    sets: list[WindowSet] = []
    for count in counts:
        chosen = sorted(next(drawn) for _ in range(count))
        sets.append({at: torch.tensor([*head, *tokens[at : at + length]]) for at in chosen})
    return sets


@dataclass(frozen=True, slots=True)
class Probed:
    """Each section alone in one codec, means over windows. `losses`: divergence; `sizes`: bits per
    value of the page; both per section, keys before values, layer by layer. `rest`: bits per value
    of what is in no section.
    """

    losses: tuple[float, ...]
    sizes: tuple[float, ...]
    rest: float


@dataclass(frozen=True, slots=True)
class Measured:
    """All sections in their codecs: bits per value, and a number for each window."""

    bits: float
    divergences: tuple[float, ...]
    increases: tuple[float, ...]

    def as_json(self) -> dict[str, float | None]:
        """Means, and their standard errors over windows."""
        kl, increase = Estimate.of(self.divergences), Estimate.of(self.increases)
        return {
            "bits_per_value": self.bits,
            "kl": kl.mean,
            "kl_se": kl.error,
            "loss_increase": increase.mean,
            "loss_increase_se": increase.error,
        }


class Runs:
    """Runs of one model. Nothing is run whose result the journal has; a window whose results are
    all there is not even recorded.
    """

    def __init__(
        self,
        model: CachedModel,
        codec: Codec,
        rotary: Rotary | None,
        options: Options,
        journal: Journal,
    ) -> None:
        self._model, self._codec, self._rotary = model, codec, rotary
        self._options, self._journal = options, journal

    def probe(
        self,
        windows: WindowSet,
        specs: Sequence[CodecSpec],
        sections: int,
        step: Callable[[str], None],
    ) -> list[Probed]:
        """Put each spec into one section after the other, all others exact."""
        for start, ids in windows.items():
            window: Window | None = None
            for spec in specs:
                names = [f"probe {start} {section} {spec.text}" for section in range(sections)]
                if names[-1] not in self._journal:
                    window = window or Window(self._model, ids, self._options, replays=True)
                    self._sections(window, spec, start, names, step)
                else:
                    for name in names:
                        step(name)
        return [self._probed(windows, spec, sections) for spec in specs]

    def _sections(
        self,
        window: Window,
        spec: CodecSpec,
        start: int,
        names: Sequence[str],
        step: Callable[[str], None],
    ) -> None:
        coded = window.code(self._spec_codec(spec))
        size = [coded.stored_bits, coded.value_count, coded.section_bytes]
        self._journal.put(f"size {start} {spec.text}", size)
        for section, name in enumerate(names):
            if name not in self._journal:
                keys, values = list(window.cache.keys), list(window.cache.values)
                layer, is_value = divmod(section, 2)
                if is_value:
                    values[layer] = coded.values[layer]
                else:
                    keys[layer] = coded.keys[layer]
                loss = divergence(window.exact, window.predict(keys, values, layer))
                self._journal.put(name, loss)
            step(name)

    def _probed(self, windows: WindowSet, spec: CodecSpec, sections: int) -> Probed:
        def mean(section: int) -> float:
            names = (f"probe {start} {section} {spec.text}" for start in windows)
            return math.fsum(self._journal[name] for name in names) / len(windows)

        sizes = [self._journal[f"size {start} {spec.text}"] for start in windows]
        values = sum(count for _, count, _ in sizes)
        shares = [8 * sum(each) / values for each in zip(*(s for _, _, s in sizes), strict=True)]
        rest = math.fsum(stored for stored, _, _ in sizes) / values - math.fsum(shares)
        return Probed(tuple(map(mean, range(sections))), tuple(shares), rest)

    def exact_loss(self, windows: WindowSet) -> Estimate:
        """The loss without a codec, of windows that were measured."""
        return Estimate.of([self._journal[f"exact {start}"] for start in windows])

    def measure(
        self, windows: WindowSet, specs: Sequence[CodecSpec], step: Callable[[str], None]
    ) -> list[Measured]:
        """Run each spec as a whole."""
        for start, ids in windows.items():
            window: Window | None = None
            for spec in specs:
                name = f"run {start} {spec.text}"
                if name not in self._journal:
                    if window is None:
                        window = Window(self._model, ids, self._options)
                        self._journal.put(f"exact {start}", window.loss)
                    self._journal.put(name, self._run(window, spec))
                step(name)
        return [self._measured(windows, spec) for spec in specs]

    def _run(self, window: Window, spec: CodecSpec) -> list[float]:
        coded = window.code(self._spec_codec(spec))
        found = window.predict(coded.keys, coded.values)
        increase = loss_of(found, window.targets) - window.loss
        kl = divergence(window.exact, found)
        return [kl, increase, coded.stored_bits, coded.value_count]

    def _measured(self, windows: WindowSet, spec: CodecSpec) -> Measured:
        results = [self._journal[f"run {start} {spec.text}"] for start in windows]
        kl, increases, stored, values = zip(*results, strict=True)
        return Measured(math.fsum(stored) / sum(values), kl, increases)

    def _spec_codec(self, spec: CodecSpec) -> SpecCodec:
        return SpecCodec(spec, self._codec, rotary=self._rotary)
