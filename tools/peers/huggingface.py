"""The quantized cache of Hugging Face transformers, with quanto and with HQQ.

Its layer classes quantize a layer's keys and values as a whole; the tokens that they would keep
unquantized beside it are none here, as every page of a store is full. Options are the classes'
own: groups of 64; along axis 0 for quanto, axis 1 for HQQ as its documentation advises.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from peers.base import Origin, Stored, TensorPeer, bits_of, installed


class Quantized(TensorPeer):
    """One of transformers' quantized layers."""

    def __init__(self, name: str, package: str, make: type, bits: int, axis: int) -> None:
        remark = "through transformers' QuantizedCache"
        super().__init__(
            name, Origin(source=remark, package=f"{package}, {installed('transformers')}")
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.layer = make(nbits=bits, axis_key=axis, axis_value=axis, residual_length=0)
        self.axis = axis

    def encode_tensor(self, tensor: Tensor, *, is_key: bool) -> Stored:
        """Layer by layer, as transformers calls it."""
        del is_key
        if not self.layer.is_initialized:
            self.layer.lazy_initialization(tensor[:1], tensor[:1])
        parts = [self.layer._quantize(layer[None], axis=self.axis) for layer in tensor]
        return Stored(parts, sum(bits_of(*_tensors(part)) for part in parts))

    def decode_tensor(self, payload: Any, *, is_key: bool) -> Tensor:
        """Layer by layer."""
        del is_key
        return torch.cat([self.layer._dequantize(part) for part in payload])


def _tensors(stored: Any) -> list[Tensor]:
    """What a quantized tensor keeps: numbers, scales, and shifts or zero points."""
    if isinstance(stored, tuple):
        numbers, meta = stored
        return [numbers, meta["scale"], meta["zero"]]
    return [stored._data._data, stored._scale, stored._shift]


def peers() -> list[Quantized]:
    """Both packages, at the bit widths that both have, and 8 bits of HQQ."""
    quanto, hqq = installed("optimum-quanto"), installed("hqq")
    from transformers.cache_utils import HQQQuantizedLayer, QuantoQuantizedLayer

    found = [
        Quantized(f"HF quanto int{bits} g64", quanto, QuantoQuantizedLayer, bits, 0)
        for bits in (4, 2)
    ]
    return found + [
        Quantized(f"HF HQQ int{bits} g64", hqq, HQQQuantizedLayer, bits, 1) for bits in (8, 4, 2)
    ]
