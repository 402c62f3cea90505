"""What can be measured: anything that turns keys and values into something smaller and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kvcodec.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AnyCodec", "CacheCodec", "PageCodec", "RoundTrip", "round_trip"]


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """What came back for keys and values of shape (pages, layers, heads, tokens, head_size), in
    the element type they were given in, and the bits that lay in the store for them.

    `section_bytes`: of these the bytes for each layer's keys, then values, layer by layer; empty
    where a codec does not tell them apart.
    """

    keys: Tensor
    values: Tensor
    stored_bits: float
    section_bytes: Sequence[int] = ()


@runtime_checkable
class CacheCodec(Protocol):
    """A codec that sees one layer at a time. Peers implement this one.

    `keys` and `values` have the shape (pages, heads, tokens, head_size) and the element type of the
    cache; keys are as the engine stores them, after RoPE. A store keeps each page alone, so a codec
    that is meant for one does not look from page to page. What is returned has the same shapes, in
    any floating type, and the average number of bits per value with all metadata.
    """

    @property
    def name(self) -> str:
        """What tables and plots call it."""

    def roundtrip(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, float]:
        """Encode and decode one layer: keys', values', bits per value."""


@runtime_checkable
class PageCodec(Protocol):
    """A codec that encodes whole pages, all layers at once."""

    @property
    def name(self) -> str:
        """What tables and plots call it."""

    def roundtrip_pages(self, keys: Tensor, values: Tensor) -> RoundTrip:
        """Encode and decode pages of shape (pages, layers, heads, tokens, head_size)."""


AnyCodec = CacheCodec | PageCodec


def round_trip(codec: AnyCodec, keys: Sequence[Tensor], values: Sequence[Tensor]) -> RoundTrip:
    """What `codec` makes of the pages, one tensor (pages, heads, tokens, head_size) per layer."""
    import torch

    if isinstance(codec, PageCodec):
        found = codec.roundtrip_pages(torch.stack(list(keys), 1), torch.stack(list(values), 1))
        return _checked(codec.name, found, keys[0].shape, values[0].shape)
    parts, bits = [], 0.0
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        new_k, new_v, bits_per_value = codec.roundtrip(layer, k, v)
        parts.append((new_k.to(k.dtype), new_v.to(v.dtype)))
        bits += bits_per_value * (k.numel() + v.numel())
    stacked = RoundTrip(
        torch.stack([k for k, _ in parts], 1), torch.stack([v for _, v in parts], 1), bits
    )
    return _checked(codec.name, stacked, keys[0].shape, values[0].shape)


def _checked(
    name: str, found: RoundTrip, key_shape: Sequence[int], value_shape: Sequence[int]
) -> RoundTrip:
    for what, tensor, shape in (
        ("keys", found.keys, key_shape),
        ("values", found.values, value_shape),
    ):
        got = (tensor.shape[0], *tensor.shape[2:])
        if got != tuple(shape):
            raise ConfigError(f"{name} returns {what} of {got} for {tuple(shape)}")
        if not bool(tensor.isfinite().all()):
            raise ConfigError(f"{name} returns {what} that are not finite")
    return found
