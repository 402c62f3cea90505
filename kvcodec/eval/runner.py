"""The measurement: windows of a text, through a model, with its cache through every codec."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcodec.errors import ConfigError
from kvcodec.eval.metrics import LayerTally, Probe, Tally, loss_of
from kvcodec.eval.model import Cache, CachedModel, Replay
from kvcodec.eval.protocol import AnyCodec, round_trip

__all__ = [
    "Coded",
    "Mode",
    "Options",
    "Result",
    "Window",
    "Windows",
    "check_context",
    "measure",
    "windows_of",
]


class Mode(str, enum.Enum):
    """Which pages of a window went through the codec."""

    CONTEXT = "context"  #: all full ones, those with the scored tokens too
    PREFIX_REUSE = "prefix-reuse"  #: those of the prefix, as when a store gives it back


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How windows are cut and coded. Numbers are tokens, but for `windows`.

    Of every window of `context` tokens the last `score` are scored (0: half of them); windows
    begin `score` apart, so that every token is scored once. `sink_tokens` at the start of each
    window stay as they are, and count as raw. At most `windows` are used, spread over the text;
    0 is all.
    """

    mode: Mode = Mode.CONTEXT
    context: int = 512
    score: int = 0
    page_size: int = 64
    sink_tokens: int = 0
    windows: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("context", 2, 1 << 24),
            ("score", 0, self.context - 1),
            ("page_size", 1, self.context),
            ("sink_tokens", 0, self.context),
            ("windows", 0, 1 << 30),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}, allowed is {low} to {high}")
        if self.sink_tokens >= self.coded_tokens:
            raise ConfigError(
                f"no token is coded: {self.coded_tokens} tokens are in full pages of "
                f"{self.page_size} and {self.sink_tokens} of them are sinks; take a longer "
                "context, smaller pages or fewer scored tokens"
            )

    @property
    def scored_tokens(self) -> int:
        """Tokens of a window whose prediction counts."""
        return self.score or self.context // 2

    @property
    def coded_tokens(self) -> int:
        """Tokens of a window that lie in coded pages.

        The last token before the scored ones predicts the first of them, so an engine runs it even
        if all pages up to there are stored.
        """
        last = self.context
        if self.mode is Mode.PREFIX_REUSE:
            last -= self.scored_tokens + 1
        return last // self.page_size * self.page_size


@dataclass(frozen=True, slots=True)
class Windows:
    """Tokens (windows, context) of a text."""

    ids: Tensor

    def __len__(self) -> int:
        return int(self.ids.shape[0])


def windows_of(tokens: Sequence[int], bos: int | None, options: Options) -> Windows:
    """Cut a text into windows, each behind `bos` if there is one."""
    length = options.context - (bos is not None)
    starts = range(0, len(tokens) - length + 1, options.scored_tokens)
    if not starts:
        raise ConfigError(
            f"the text has {len(tokens)} tokens, fewer than one window of {options.context}: "
            "give a longer text or a smaller --context"
        )
    count = min(options.windows or len(starts), len(starts))
    chosen = [starts[round(i * (len(starts) - 1) / max(count - 1, 1))] for i in range(count)]
    head = [] if bos is None else [bos]
    return Windows(torch.tensor([head + list(tokens[i : i + length]) for i in chosen]))


@dataclass(frozen=True, slots=True)
class Result:
    """What was found of one model: itself, and each codec on it, in the order they were given."""

    loss: float
    perplexity: float
    tokens: int
    rows: dict[str, Tally]


def check_context(model: CachedModel, options: Options) -> None:
    """Raise `ConfigError` for a context that is longer than the model's."""
    if options.context > model.limit:
        raise ConfigError(f"context is {options.context}, the model was made for {model.limit}")


def measure(
    model: CachedModel,
    windows: Windows,
    codecs: Sequence[AnyCodec],
    options: Options,
    progress: Callable[[str], None] = lambda _: None,
) -> Result:
    """Score every window without a codec and with each; `progress` hears of every run."""
    check_context(model, options)
    names = [codec.name for codec in codecs]
    if len(set(names)) != len(names):
        raise ConfigError(f"a codec is named twice among {', '.join(names)}")
    rows = {name: Tally([]) for name in names}
    losses = []
    for ids in windows.ids:
        window = Window(model, ids, options)
        losses.append(window.loss)
        progress("model")
        for codec in codecs:
            window.add(codec, rows[codec.name])
            progress(codec.name)
    loss = math.fsum(losses) / len(losses)
    return Result(loss, math.exp(loss), len(windows) * options.scored_tokens, rows)


@dataclass(frozen=True, slots=True)
class Coded:
    """What a codec made of a window. `keys` and `values` per layer (heads, tokens, head_size), the
    sinks and what is in no page as they were; `stored_bits` with the sinks, of `value_count`
    values; `section_bytes` as in `RoundTrip`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    stored_bits: float
    value_count: int
    section_bytes: tuple[int, ...]


class Window:
    """One window: its exact cache, and the model's predictions from it.

    `exact`: log-probabilities (scored tokens, vocabulary) without a codec. With `replays`, what the
    layers gave for them is kept, for predictions that differ in the cache of few layers.
    """

    def __init__(
        self, model: CachedModel, ids: Tensor, options: Options, *, replays: bool = False
    ) -> None:
        self._model, self._options = model, options
        self._ids = ids.to(model.model.device)
        self.targets = self._ids[-options.scored_tokens :]
        self._end = options.coded_tokens
        # What an engine has computed anew when it scores: all of it, or what the store lacked.
        self._start = self._end if options.mode is Mode.PREFIX_REUSE else 0
        self.cache: Cache = model.record(self._ids)
        # Through the same path as with a codec, so that a codec without loss changes no bit.
        self._replay = Replay(model.model)
        with self._replay.recording() if replays else nullcontext():
            self.exact = self.predict(self.cache.keys, self.cache.values)
        self.loss = loss_of(self.exact, self.targets)
        self._probe: Probe | None = None

    def predict(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], exact_layers: int = 0
    ) -> Tensor:
        """Log-probabilities (scored tokens, vocabulary) when attention reads these, per layer
        (heads, tokens, head_size). Those of the first `exact_layers` are the exact ones.
        """
        count = self._options.scored_tokens
        with self._replay.playing(exact_layers) as first:
            return self._model.logits(self._ids, count, self._start, self._end, keys, values, first)

    def code(self, codec: AnyCodec) -> Coded:
        """Code the pages of the window."""
        cache, sinks = self.cache, self._options.sink_tokens
        coded = round_trip(codec, self._pages(cache.keys), self._pages(cache.values))
        pairs = (*cache.keys, *cache.values)
        return Coded(
            _put(cache.keys, coded.keys, sinks),
            _put(cache.values, coded.values, sinks),
            coded.stored_bits + sum(8 * t[:, :sinks].numel() * t.itemsize for t in pairs),
            sum(t[:, : self._end].numel() for t in pairs),
            tuple(coded.section_bytes),
        )

    def add(self, codec: AnyCodec, tally: Tally) -> None:
        """Code the pages, run the model on what comes back, and add what changed."""
        coded = self.code(codec)
        tally.layers = tally.layers or [LayerTally() for _ in coded.keys]
        found = self.predict(coded.keys, coded.values)
        tally.add_predictions(self.exact, found, self.targets)
        if self._probe is None:
            first = len(self._ids) - self._options.scored_tokens
            self._probe = Probe(self.cache, first)
        sinks = self._options.sink_tokens
        self._probe.add(tally.layers, coded.keys, coded.values, sinks, self._end)
        tally.stored_bits += coded.stored_bits
        tally.values += coded.value_count

    def _pages(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Per layer (pages, heads, page tokens, head_size), in host memory, as a store has them."""
        size = self._options.page_size
        return [torch.stack(t[:, : self._end].cpu().split(size, 1)).contiguous() for t in tensors]


def _put(exact: Sequence[Tensor], pages: Tensor, sinks: int) -> list[Tensor]:
    """Per layer `exact` (heads, tokens, head_size), with what came back as (pages, layers, heads,
    page tokens, head_size) in its place, but for the sinks.
    """
    rows = [layer.transpose(0, 1).flatten(1, 2) for layer in pages.unbind(1)]
    return [
        torch.cat((old[:, :sinks], new[:, sinks:].to(old), old[:, new.shape[1] :]), 1)
        for old, new in zip(exact, rows, strict=True)
    ]
