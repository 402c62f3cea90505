"""bitsandbytes on a CPU: nf4, and dynamic 8 bits, each with a float32 for every block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from peers.base import Origin, Stored, TensorPeer, bits_of, installed


class Nf4(TensorPeer):
    """Sixteen levels of a normal distribution, blocks of 64."""

    def __init__(self, name: str = "nf4 b64", source: str = "quantize_4bit") -> None:
        origin = Origin(source=source, package=installed("bitsandbytes"))
        super().__init__(f"bitsandbytes {name}", origin)
        import bitsandbytes.functional

        self._functions = bitsandbytes.functional

    def encode_tensor(self, tensor: Tensor, *, is_key: bool) -> Stored:
        """Blocks along the head."""
        del is_key
        codes, state = self._functions.quantize_4bit(tensor, quant_type="nf4", blocksize=64)
        return Stored((codes, state), bits_of(codes, state.absmax))

    def decode_tensor(self, payload: Any, *, is_key: bool) -> Tensor:
        """In the type it had."""
        del is_key
        return self._functions.dequantize_4bit(*payload)


class Dynamic8(Nf4):
    """A code of 256 levels, denser at zero, blocks of 256."""

    def __init__(self) -> None:
        super().__init__("int8 b256", "quantize_blockwise")

    def encode_tensor(self, tensor: Tensor, *, is_key: bool) -> Stored:
        """The code itself is the library's, not the page's."""
        del is_key
        codes, state = self._functions.quantize_blockwise(tensor, blocksize=256)
        return Stored((codes, state), bits_of(codes, state.absmax))

    def decode_tensor(self, payload: Any, *, is_key: bool) -> Tensor:
        """In the type it had."""
        del is_key
        return self._functions.dequantize_blockwise(*payload)


def peers() -> list[Nf4]:
    """Both."""
    return [Nf4(), Dynamic8()]
