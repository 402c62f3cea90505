"""TurboQuant, re-implemented: a rotation, and the best scalar quantizer of a Gaussian.

`TurboQuant-mse` is the paper's (Zandieh et al., arXiv 2504.19874): every key and value is divided
by its norm, turned by a fixed random rotation, and each coordinate replaced by the nearest of 2^b
Lloyd-Max centroids of N(0, 1/d). The other presets are those of vLLM and LMCache: for keys alone,
with a Hadamard matrix and, as LMCache has them, random signs for every layer in place of the random
rotation; decoded keys get their norm back exactly (`nc`); values are uniform per token. Both leave
the first and last two layers unquantized; here, every layer is coded, as a bit rate should be.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from peers.base import Origin, Stored, TensorPeer, bits_of
from peers.packing import pack, unpack

PAPER = "arXiv 2504.19874 (numerics)"
ENGINES = "vLLM and LMCache, turboquant presets (numerics)"
_PRESETS = (("k8v4", 8, 4), ("4bit_nc", 4, 4), ("k3v4_nc", 3, 4), ("3bit_nc", 3, 3))
_ROUNDS = 300


@cache
def centroids(bits: int) -> Tensor:
    """The 2**bits Lloyd-Max centroids of a standard normal number, ascending."""
    points = torch.linspace(-3, 3, 2**bits, dtype=torch.float64)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    for _ in range(_ROUNDS):
        inner = (points[1:] + points[:-1]) / 2
        edges = torch.cat((inner.new_tensor([-torch.inf]), inner, inner.new_tensor([torch.inf])))
        density, mass = (-edges.square() / 2).exp() / math.sqrt(2 * math.pi), normal.cdf(edges)
        points = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    return points.float()


@cache
def hadamard(size: int) -> Tensor:
    """The normalised Hadamard matrix, which is its own inverse."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


@cache
def signed_hadamard(size: int, layers: int) -> Tensor:
    """(layers, 1, size, size): signs, then the matrix. The signs are those of LMCache's seeds."""
    generators = [torch.Generator().manual_seed(42 + 1337 * layer) for layer in range(layers)]
    bits = torch.stack([torch.randint(0, 2, (size,), generator=g) for g in generators])
    return (2.0 * bits - 1)[:, None, :, None] * hadamard(size)


@cache
def random_rotation(size: int) -> Tensor:
    """A rotation without a preferred direction, always the same one."""
    generator = torch.Generator().manual_seed(42)
    basis, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator))
    return basis * triangle.diagonal().sign()


class TurboQuant(TensorPeer):
    """`key_bits` of 8 are fp8. `is_paper`: values are coded as keys are."""

    def __init__(self, name: str, key_bits: int, value_bits: int, *, is_paper: bool) -> None:
        remark = "" if is_paper else "every layer coded; as shipped, four layers are not"
        super().__init__(name, Origin(source=PAPER if is_paper else ENGINES, remark=remark))
        self.bits = {True: key_bits, False: value_bits}
        self.is_paper = is_paper

    def encode_tensor(self, tensor: Tensor, *, is_key: bool) -> Stored:
        """Rotated and by centroids, or fp8, or uniform."""
        bits = self.bits[is_key]
        if is_key and bits == 8:
            stored = tensor.to(torch.float8_e4m3fn)
            return Stored(stored, bits_of(stored))
        if not is_key and not self.is_paper:
            return _uniform(tensor.float(), bits)
        rows = tensor.float()
        norm = rows.norm(dim=-1, keepdim=True)
        size = tensor.shape[-1]
        turned = (rows / (norm + 1e-8)) @ self._rotation(tensor) * math.sqrt(size)
        points = centroids(bits)
        indices = torch.bucketize(turned, (points[1:] + points[:-1]) / 2, right=True)
        packed = pack(indices.to(torch.uint8), bits)
        return Stored((packed, norm.half()), bits_of(packed, norm.half()))

    def decode_tensor(self, payload: Any, *, is_key: bool) -> Tensor:
        """Centroids, turned back, at the stored length."""
        bits = self.bits[is_key]
        if is_key and bits == 8:
            return payload.to(torch.bfloat16)
        if not is_key and not self.is_paper:
            packed, scale, smallest = payload
            return unpack(packed, bits) * scale.float() + smallest.float()
        packed, norm = payload
        turned = centroids(bits)[unpack(packed, bits).int()]
        if self.is_paper:
            turned = turned / math.sqrt(turned.shape[-1])
        else:
            turned = turned / turned.norm(dim=-1, keepdim=True)
        return norm.float() * (turned @ self._rotation(turned).transpose(-1, -2))

    def _rotation(self, tensor: Tensor) -> Tensor:
        layers, size = tensor.shape[0], tensor.shape[-1]
        return random_rotation(size) if self.is_paper else signed_hadamard(size, layers)


def _uniform(rows: Tensor, bits: int) -> Stored:
    """Numbers of a token between its smallest and its largest, which go along in fp16."""
    smallest = rows.amin(-1, keepdim=True)
    highest = 2**bits - 1
    scale = ((rows.amax(-1, keepdim=True) - smallest) / highest).clamp(min=1e-8)
    numbers = ((rows - smallest) / scale + 0.5).floor().clamp(0, highest)
    packed = pack(numbers.to(torch.uint8), bits)
    stored = packed, scale.half(), smallest.half()
    return Stored(stored, bits_of(*stored))


def peers() -> list[TurboQuant]:
    """The paper's at 4 and 3 bits, and the engines' four presets."""
    found = [TurboQuant(f"TurboQuant-mse {bits} bit", bits, bits, is_paper=True) for bits in (4, 3)]
    found += [
        TurboQuant(f"TurboQuant {name}", key, value, is_paper=False)
        for name, key, value in _PRESETS
    ]
    return found
