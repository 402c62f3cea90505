"""Outliers like those of large models, put into a model without changing what it computes.

Small models trained for minutes have even channels; published keys have a few RoPE pairs ten times
as large as the rest, and values have unequal channels. Scaling a pair of the keys by a factor and
the same pair of the queries by its inverse leaves every score as it was, because RoPE rotates
within pairs. An invertible matrix on a value head and its inverse on the output projection leave
the attention's output as it was. What changes is what a codec finds in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvcodec.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["Imprint", "check_same", "imprint"]

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass(frozen=True, slots=True)
class Imprint:
    """`keys`: factor of `pairs` RoPE pairs per head, of the slower half. `values`: spread of the
    natural logarithm of a value channel's gain, in a random basis. 1 and 0 change nothing.
    """

    keys: float = 1.0
    pairs: int = 3
    values: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"keys": (0.01, 1000.0), "pairs": (1, 64), "values": (0, 3.0), "seed": (0, 2**31)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ConfigError(
                    f"imprint: {name} is {getattr(self, name)}, allowed is {low} to {high}"
                )
        if self.keys == 1.0 and self.values == 0.0:
            raise ConfigError("imprint: neither keys nor values are changed; try keys=8,values=0.5")

    @classmethod
    def parse(cls, text: str) -> Imprint:
        """``keys=8,pairs=3,values=0.5,seed=1``; each may be left out."""
        kinds = {"keys": float, "pairs": int, "values": float, "seed": int}
        found: dict[str, Any] = {}
        for word in text.split(","):
            name, equals, value = word.strip().partition("=")
            if not equals or name not in kinds or name in found:
                raise ConfigError(
                    f"imprint {text!r}; wanted words such as keys=8,pairs=3,values=0.5"
                )
            try:
                found[name] = kinds[name](value)
            except ValueError as error:
                raise ConfigError(f"imprint: {name} is {value!r}, wanted a number") from error
        return cls(**found)


def imprint(model: PreTrainedModel, what: Imprint) -> None:
    """Change the weights of `model` in place. Raises `ConfigError` for one whose layers are not
    built of separate query, key, value and output projections.
    """
    generator = torch.Generator().manual_seed(what.seed)
    with torch.no_grad():
        for attention in _attentions(model):
            if what.keys != 1.0:
                _scale_keys(attention, what, generator)
            if what.values:
                _mix_values(attention, what.values, generator)


def _attentions(model: PreTrainedModel) -> Iterator[nn.Module]:
    found = False
    for module in model.modules():
        if all(hasattr(module, f"{name}_proj") for name in "qkvo") and hasattr(module, "head_dim"):
            found = True
            yield module
    if not found:
        raise ConfigError("imprint: the model has no layers with q_proj, k_proj, v_proj and o_proj")


def _scale_keys(attention: nn.Module, what: Imprint, generator: torch.Generator) -> None:
    size = attention.head_dim
    rotary = int(size * (getattr(attention.config, "partial_rotary_factor", None) or 1.0))
    half = rotary // 2
    if what.pairs > half - half // 2:
        raise ConfigError(f"imprint: {what.pairs} pairs, half of the pairs are {half - half // 2}")
    if hasattr(attention, "k_norm"):
        if attention.k_norm.weight.shape != (size,):
            raise ConfigError("imprint: the keys' norm is not one of single heads")
        gain = _key_gain(size, half, what, generator)
        attention.k_norm.weight.mul_(gain.to(attention.k_norm.weight))
        attention.q_norm.weight.div_(gain.to(attention.q_norm.weight))
        return
    kv_heads = attention.k_proj.weight.shape[0] // size
    groups = attention.q_proj.weight.shape[0] // size // kv_heads
    gains = torch.stack([_key_gain(size, half, what, generator) for _ in range(kv_heads)])
    _scale_rows(attention.k_proj, gains.flatten())
    _scale_rows(attention.q_proj, 1 / gains.repeat_interleave(groups, 0).flatten())


def _key_gain(size: int, half: int, what: Imprint, generator: torch.Generator) -> Tensor:
    """Gain of every channel of a head; the two channels of a pair lie `half` apart."""
    slow = half // 2 + torch.randperm(half - half // 2, generator=generator)[: what.pairs]
    gain = torch.ones(size)
    gain[slow] = gain[slow + half] = what.keys
    return gain


def _scale_rows(linear: nn.Linear, gain: Tensor) -> None:
    gain = gain.to(linear.weight)
    linear.weight.mul_(gain[:, None])
    if linear.bias is not None:
        linear.bias.mul_(gain)


def _mix_values(attention: nn.Module, spread: float, generator: torch.Generator) -> None:
    size = attention.head_dim
    kv_heads = attention.v_proj.weight.shape[0] // size
    queries = attention.o_proj.weight.shape[1] // size
    values = attention.v_proj
    rows = values.weight.view(kv_heads, size, -1)
    columns = attention.o_proj.weight.view(-1, queries, size)
    for head in range(kv_heads):
        basis = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
        gain = (spread * torch.randn(size, generator=generator).clamp(-3, 3)).exp()
        mix, inverse = gain[:, None] * basis, basis.T / gain
        rows[head] = (mix.to(rows) @ rows[head].float()).to(rows)
        if values.bias is not None:
            bias = values.bias.view(kv_heads, size)
            bias[head] = (mix.to(bias) @ bias[head].float()).to(bias)
        groups = queries // kv_heads
        for query in range(head * groups, (head + 1) * groups):
            columns[:, query] = (columns[:, query].float() @ inverse.to(columns)).to(columns)


def check_same(before: Tensor, after: Tensor, compute: torch.dtype) -> float:
    """The largest difference between log-probabilities before and after an imprint, without a
    cache in between. Raises `ConfigError` if it is more than rounding.
    """
    largest = float((before - after).abs().max())
    limit = _TOLERANCE[compute]
    if not largest <= limit:
        raise ConfigError(
            f"imprint: a log-probability changed by {largest:.2g}, more than {limit}; this model "
            "cannot be imprinted"
        )
    return largest
