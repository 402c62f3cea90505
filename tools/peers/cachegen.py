"""CacheGen, re-implemented: a scale per token, and an arithmetic code with tables in the page.

Liu et al., SIGCOMM 2024, as LMCache has it: every token of a layer is divided by its largest number
over all heads and rounded to one of `bins` - 1 levels; each channel's frequencies over the chunk
become a table of 33 numbers of 16 bits, with which its symbols are coded. Models of fewer than ten
layers get 32 bins everywhere; larger ones 32 for the first ten layers of keys and the first two of
values, 16 for the others.

Its coder is a CUDA kernel. Here the length of the code is computed: -log2 of the frequency in the
table, rounded up to bytes for each channel's stream, which is the least any arithmetic coder needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peers.base import Origin, Peer, Stored

SOURCE = "arXiv 2310.07240; LMCache, cachegen serde (numerics)"
_TABLE = 33
_PRECISION = 1 << 16
_FEW_LAYERS = 10


def bins_of(layers: int, *, is_key: bool) -> Tensor:
    """Bins of every layer (layers,)."""
    if layers < _FEW_LAYERS:
        return torch.full((layers,), 32)
    many = 10 if is_key else 2
    return torch.tensor([32] * many + [16] * (layers - many))


def code_bits(symbols: Tensor) -> int:
    """Bits of the streams of `symbols` (..., channels, tokens), tables and lengths left out."""
    counts = torch.nn.functional.one_hot(symbols, _TABLE - 1).sum(-2)  # (..., channels, symbols)
    edges = torch.nn.functional.pad(counts.cumsum(-1), (1, 0)) / symbols.shape[-1]
    # Every symbol gets a place, used or not: edges are counted in 2**16 less one for each.
    table = (edges * (_PRECISION - (_TABLE - 1))).round() + torch.arange(_TABLE)
    frequency = table.diff(dim=-1)
    length = (counts * (_PRECISION / frequency).log2()).sum(-1)
    return int(8 * (length / 8).ceil().sum())


class CacheGen(Peer):
    """`pages` of a chunk share their tables; LMCache's chunks are 256 tokens."""

    untimed = "its coder runs on a GPU alone; the length of its code is computed"

    def __init__(self, name: str, pages: int) -> None:
        remark = "" if pages == 1 else f"{pages} pages share their tables"
        super().__init__(name, Origin(source=SOURCE, remark=remark))
        self.pages = pages

    def encode(self, keys: Tensor, values: Tensor) -> Stored:
        """Levels and scales; bits of streams, their lengths, tables and scales."""
        bits, payload = 0, []
        for is_key, tensor in ((True, keys), (False, values)):
            layers, heads, tokens, size = tensor.shape
            rows = tensor.float().transpose(1, 2).flatten(2)  # (layers, tokens, channels)
            steps = (bins_of(layers, is_key=is_key) // 2 - 1)[:, None, None]
            scale = rows.abs().amax(-1, keepdim=True)
            levels = (rows * (steps / scale)).nan_to_num(0.0).round()
            symbols = (levels + steps).long().transpose(1, 2)
            streams = layers * heads * size
            bits += code_bits(symbols) + streams * (16 * _TABLE + 32) + 32 * layers * tokens
            payload.append((levels / steps, scale, heads))
        return Stored(payload, bits)

    def decode(self, payload: Any) -> tuple[Tensor, Tensor]:
        """Level / levels x the token's largest."""
        keys, values = (
            (levels * scale).unflatten(2, (heads, -1)).transpose(1, 2)
            for levels, scale, heads in payload
        )
        return keys, values


def peers() -> list[CacheGen]:
    """A page alone, and a chunk as LMCache stores it."""
    return [CacheGen("CacheGen, page alone", 1), CacheGen("CacheGen, 256 tokens", 4)]
