"""Sums over windows, and what they say: means, paired standard errors, errors per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcodec.eval.model import Cache, attend

__all__ = ["Estimate", "LayerTally", "Probe", "Tally", "divergence", "loss_of"]

#: Queries per window and layer of which attention is compared; all of them would cost more than
#: the model.
_PROBED = 64


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over windows and its standard error, None of fewer than two."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, samples: Sequence[float]) -> Estimate:
        """Windows are independent, the tokens of one window are not."""
        count = len(samples)
        mean = math.fsum(samples) / count
        if count < 2:
            return cls(mean, None)
        spread = math.fsum((sample - mean) ** 2 for sample in samples) / (count - 1)
        return cls(mean, math.sqrt(spread / count))


@dataclass(slots=True)
class LayerTally:
    """Squared errors and squares of one layer, summed over windows."""

    key_error: float = 0.0
    key_power: float = 0.0
    value_error: float = 0.0
    value_power: float = 0.0
    output_error: float = 0.0
    output_power: float = 0.0
    attention_kl: float = 0.0
    queries: int = 0

    def as_json(self, layer: int) -> dict[str, float]:
        """Relative errors: squared for keys and values, root of squared for attention outputs."""
        return {
            "layer": layer,
            "key_mse": _ratio(self.key_error, self.key_power),
            "value_mse": _ratio(self.value_error, self.value_power),
            "output_error": math.sqrt(_ratio(self.output_error, self.output_power)),
            "attention_kl": self.attention_kl / max(self.queries, 1),
        }


def _ratio(error: float, power: float) -> float:
    return error / power if power else 0.0


class Probe:
    """Attention of one window without a codec, at queries spread over the scored tokens."""

    def __init__(self, cache: Cache, first: int) -> None:
        self._cache = cache
        tokens = cache.keys[0].shape[1]
        self._rows = torch.linspace(first, tokens - 1, min(_PROBED, tokens - first)).long()
        self._rows = self._rows.to(cache.keys[0].device)
        self._exact = [self._attention(layer, key) for layer, key in enumerate(cache.keys)]

    def _attention(self, layer: int, keys: Tensor) -> Tensor:
        query = self._cache.queries[layer][:, self._rows]
        scale, window = self._cache.scales[layer], self._cache.windows[layer]
        return torch.log_softmax(attend(query, keys, scale, self._rows, window)[0], -1)

    def add(
        self,
        tallies: list[LayerTally],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        first: int,
        end: int,
    ) -> None:
        """Add the errors of `keys` and `values`; those of the positions `first` to `end` went
        through a codec.
        """
        exact = self._cache
        for layer, tally in enumerate(tallies):
            pairs = ((exact.keys[layer], keys[layer]), (exact.values[layer], values[layer]))
            (key_error, key_power), (value_error, value_power) = (
                _errors(before[:, first:end], after[:, first:end]) for before, after in pairs
            )
            tally.key_error += key_error
            tally.key_power += key_power
            tally.value_error += value_error
            tally.value_power += value_power
            wanted, found = self._exact[layer], self._attention(layer, keys[layer])
            divergence = (wanted.exp() * (wanted - found)).nan_to_num(0.0).sum()
            tally.attention_kl += float(divergence)
            tally.queries += wanted.shape[0] * wanted.shape[1]
            output = _output(wanted, exact.values[layer])
            tally.output_error += float((_output(found, values[layer]) - output).square().sum())
            tally.output_power += float(output.square().sum())


def _output(weights: Tensor, values: Tensor) -> Tensor:
    return weights.exp() @ values.float().repeat_interleave(weights.shape[0] // values.shape[0], 0)


def _errors(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Squared error, and squared deviation from each channel's mean: an offset carries no meaning
    of its own and would hide the error.
    """
    x = before.double()
    error = float((after.double() - x).square().sum())
    return error, float((x - x.mean(1, keepdim=True)).square().sum())


def divergence(wanted: Tensor, found: Tensor) -> float:
    """Mean of Σ p·ln(p/q) over tokens, from log-probabilities (tokens, vocabulary)."""
    return float((wanted.exp() * (wanted - found)).double().sum(1).mean())


def loss_of(logs: Tensor, targets: Tensor) -> float:
    """Mean of −ln p of the true tokens (tokens,), from log-probabilities (tokens, vocabulary)."""
    return -float(logs.gather(1, targets[:, None]).double().mean())


@dataclass(slots=True)
class Tally:
    """One codec on one model: a number per window, and errors per layer."""

    layers: list[LayerTally]
    loss: list[float] = field(default_factory=list)
    loss_increase: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    stored_bits: float = 0.0
    values: int = 0

    def add_predictions(self, wanted: Tensor, found: Tensor, targets: Tensor) -> None:
        """Log-probabilities (tokens, vocabulary) without and with the codec; the true tokens."""
        loss = loss_of(found, targets)
        self.loss.append(loss)
        self.loss_increase.append(loss - loss_of(wanted, targets))
        self.divergence.append(divergence(wanted, found))
        self.agreement.append((wanted.argmax(1) == found.argmax(1)).double().mean().item())

    def as_json(self) -> dict[str, object]:
        """Means over windows, and over layers."""
        layers = [tally.as_json(index) for index, tally in enumerate(self.layers)]
        bits = self.stored_bits / self.values
        row: dict[str, object] = {"bits_per_value": bits}
        loss = Estimate.of(self.loss).mean
        row |= {"loss": loss, "perplexity": math.exp(loss)}
        for name, samples in (
            ("loss_increase", self.loss_increase),
            ("kl", self.divergence),
            ("top1_agreement", self.agreement),
        ):
            estimate = Estimate.of(samples)
            row |= {name: estimate.mean, f"{name}_se": estimate.error}
        for name in ("key_mse", "value_mse", "output_error", "attention_kl"):
            row[name] = math.fsum(layer[name] for layer in layers) / len(layers)
        return row | {"layers": layers}
