"""What a peer is: an object that encodes one page and decodes it, and says where it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from kvcodec.eval.protocol import RoundTrip


class MissingPackageError(ImportError):
    """A peer's package is not installed."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What an encoder made of one page: something its decoder takes, and the bits that a store
    would keep of it, all metadata counted.
    """

    payload: Any
    bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a peer comes from. `package` is a name and a version, or empty for a re-implementation
    of the numerics that `source` describes.
    """

    source: str
    package: str = ""
    remark: str = ""


class Peer(ABC):
    """A codec of single pages. Keys and values have the shape (layers, heads, tokens, head size)
    and the cache's type; keys are as the engine stores them, after RoPE.

    `packed_bits` is what a value would cost if numbers were stored in their nominal bits, for those
    that keep every number in a byte. `pages` is how many pages are encoded together; a store keeps
    each alone, so more than one is an advantage that the table mentions. A peer that cannot be
    timed gives the reason in `untimed`.
    """

    is_lossless = False
    packed_bits: float | None = None
    pages = 1
    untimed = ""

    def __init__(self, name: str, origin: Origin) -> None:
        self.name = name
        self.origin = origin

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor) -> Stored:
        """One page, encoded."""

    @abstractmethod
    def decode(self, payload: Any) -> tuple[Tensor, Tensor]:
        """What `encode` made, as keys and values again."""

    def roundtrip_pages(self, keys: Tensor, values: Tensor) -> RoundTrip:
        """Code pages of shape (pages, layers, heads, tokens, head size), `self.pages` at a time."""
        bits, decoded = 0, []
        for first in range(0, len(keys), self.pages):
            chunk = slice(first, first + self.pages)
            stored = self.encode(_joined(keys[chunk]), _joined(values[chunk]))
            bits += stored.bits
            decoded.append(self.decode(stored.payload))
        tokens = keys.shape[3]
        back = [
            torch.cat([torch.stack(t.split(tokens, 2)) for t in tensors]).to(keys.dtype)
            for tensors in zip(*decoded, strict=True)
        ]
        return RoundTrip(back[0], back[1], float(bits))


def _joined(pages: Tensor) -> Tensor:
    """Pages one behind the other: (layers, heads, pages x tokens, head size)."""
    return torch.cat(list(pages), 2).contiguous()


class TensorPeer(Peer):
    """A codec that treats keys and values apart from each other, a tensor at a time."""

    def encode(self, keys: Tensor, values: Tensor) -> Stored:
        """Both tensors."""
        parts = [self.encode_tensor(keys, is_key=True), self.encode_tensor(values, is_key=False)]
        return Stored([part.payload for part in parts], sum(part.bits for part in parts))

    def decode(self, payload: Any) -> tuple[Tensor, Tensor]:
        """Both tensors."""
        keys, values = payload
        return self.decode_tensor(keys, is_key=True), self.decode_tensor(values, is_key=False)

    @abstractmethod
    def encode_tensor(self, tensor: Tensor, *, is_key: bool) -> Stored:
        """(layers, heads, tokens, head size), encoded."""

    @abstractmethod
    def decode_tensor(self, payload: Any, *, is_key: bool) -> Tensor:
        """What `encode_tensor` made."""


def bits_of(*tensors: Tensor) -> int:
    """Bits that tensors occupy."""
    return 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def installed(package: str) -> str:
    """Name and version. Raises `MissingPackageError`."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError as error:
        raise MissingPackageError(f"{package} is not installed: make peers installs it") from error
