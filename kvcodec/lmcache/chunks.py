"""LMCache's objects: what their keys say, and where keys and values lie in their bytes.

An object holds one chunk of tokens of one rank, dense, in one of three orders (D is a token's
numbers in one layer, all its heads)::

    split   [2, layers, tokens, D]         all keys, then all values
    fused   [layers, tokens, heads, 2, head_size]  each head's key beside its value (vLLM from 0.26)
    latent  [layers, tokens, D]            MLA: the latent, then the RoPE part

LMCache tells an adapter the number of bytes alone, so the shape has to be configured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvcodec.errors import ConfigError
from kvcodec.identity import Identity
from kvcodec.layout import DType, PageLayout, PageViews, StreamStrides

__all__ = ["ChunkKey", "ChunkShape"]

_DTYPES = {
    "bfloat16": DType.BF16,
    "float16": DType.FP16,
    "float32": DType.FP32,
    "float8_e4m3fn": DType.FP8_E4M3,
    "float8_e5m2": DType.FP8_E5M2,
    "uint8": DType.U8,
}
_COUNTS = frozenset({"token_count", "layer_count"})
_HEADS = frozenset({"head_count", "head_size"})
_LATENT = frozenset({"latent_size", "rope_size"})


@dataclass(frozen=True, slots=True)
class ChunkKey:
    """``model@rank@group@hash[@salt]``: the text LMCache hands to an adapter."""

    model: str
    rank: str
    group: int
    chunk_hash: str
    salt: str = ""

    @classmethod
    def parse(cls, text: str) -> ChunkKey:
        """Raises `ValueError` for a text that is none."""
        model, rank, group, chunk_hash, *rest = text.split("@")
        if len(rest) > 1 or not model or not chunk_hash:
            raise ValueError(f"{text!r} is not model@rank@group@hash[@salt]")
        int(rank, 16)
        return cls(model, rank, int(group, 16), chunk_hash, *rest)

    def identity(self, shape: ChunkShape, *, namespace: str, revision: str) -> Identity:
        """Whose KV it is. Of the salt, which may be a secret, there is only a digest."""
        salt = b"kvcodec salt 1\0" + self.salt.encode()
        return Identity.of(
            engine="lmcache",
            model=self.model,
            namespace=namespace,
            revision=revision,
            kv_rank=self.rank,
            object_group=self.group,
            order=shape.order,
            salt=hashlib.sha256(salt).hexdigest()[:32] if self.salt else "",
        )


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """The shape of the objects of one group; `order` is split, fused, latent or bytes."""

    layout: PageLayout
    strides: tuple[StreamStrides, ...]
    offsets: tuple[int, ...]
    order: str

    @classmethod
    def parse(cls, options: Mapping[str, object], where: str) -> ChunkShape:
        """From the option `layout`. Raises `ConfigError` for what is unknown, missing or too
        much; `where` names the option in messages.
        """
        if not isinstance(options, Mapping):
            raise ConfigError(f"{where} is {options!r}, wanted an object such as {_EXAMPLE}")
        given = set(options)
        if given == {"object_bytes"}:
            size = _whole(where, options, "object_bytes")
            stride = StreamStrides(layer_bytes=size, head_bytes=0, token_bytes=0, group_heads=1)
            return cls(PageLayout.opaque(page_bytes=size), (stride,), (0,), "bytes")
        if given == _COUNTS | _HEADS | {"dtype"} or given == _COUNTS | _HEADS | {"dtype", "fused"}:
            return cls._attention(options, where)
        if given == _COUNTS | _LATENT | {"dtype"}:
            return cls._latent(options, where)
        known = _COUNTS | _HEADS | _LATENT | {"dtype", "fused", "object_bytes"}
        unknown = sorted(given - known)
        problem = f"the unknown option {unknown[0]!r}" if unknown else f"{sorted(given)}"
        raise ConfigError(
            f"{where} has {problem}; wanted is {_EXAMPLE}, for vLLM from 0.26 with "
            '"fused": true, for MLA with latent_size and rope_size in place of head_count and '
            'head_size, or {"object_bytes": ...} to store objects bit for bit'
        )

    @classmethod
    def _attention(cls, options: Mapping[str, object], where: str) -> ChunkShape:
        fused = options.get("fused", False)
        if not isinstance(fused, bool):
            raise ConfigError(f"{where}: fused is {fused!r}, allowed is true or false")
        layout = PageLayout.mha(
            dtype=_dtype(where, options),
            token_count=_whole(where, options, "token_count"),
            layer_count=_whole(where, options, "layer_count"),
            head_count=_whole(where, options, "head_count"),
            head_size=_whole(where, options, "head_size"),
        )
        heads, item = layout.streams[0].head_count, layout.dtype.itemsize
        row = layout.streams[0].head_size * item
        head = 2 * row if fused else row
        strides = StreamStrides(
            head_bytes=head, token_bytes=heads * head, layer_bytes=layout.token_count * heads * head
        )
        values = row if fused else layout.raw_bytes // 2
        return cls(layout, (strides, strides), (0, values), "fused" if fused else "split")

    @classmethod
    def _latent(cls, options: Mapping[str, object], where: str) -> ChunkShape:
        layout = PageLayout.mla(
            dtype=_dtype(where, options),
            token_count=_whole(where, options, "token_count"),
            layer_count=_whole(where, options, "layer_count"),
            latent_size=_whole(where, options, "latent_size"),
            rope_size=_whole(where, options, "rope_size", 0),
        )
        sizes = [stream.head_size * layout.dtype.itemsize for stream in layout.streams]
        token = sum(sizes)
        stride = StreamStrides(
            head_bytes=0, token_bytes=token, layer_bytes=layout.token_count * token, group_heads=1
        )
        return cls(layout, (stride,) * len(sizes), (0, sizes[0])[: len(sizes)], "latent")

    def views(self, memory: Sequence[memoryview]) -> PageViews:
        """Objects, each of just `layout.raw_bytes`, as pages in place."""
        arrays = [np.frombuffer(view, np.uint8) for view in memory]
        addresses = [array.__array_interface__["data"][0] for array in arrays]
        bases = np.array(addresses, np.uint64)[:, None] + np.array(self.offsets, np.uint64)
        return PageViews(
            layout=self.layout,
            strides=self.strides,
            bases=np.ascontiguousarray(bases),
            owner=arrays,
            writable=all(array.flags.writeable for array in arrays),
        )


_EXAMPLE = (
    '{"dtype": "bfloat16", "token_count": 256, "layer_count": 32, "head_count": 8, '
    '"head_size": 128}'
)


def _whole(where: str, options: Mapping[str, object], name: str, low: int = 1) -> int:
    value = options[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{where}: {name} is {value!r}, wanted a whole number from {low} on")
    return value


def _dtype(where: str, options: Mapping[str, object]) -> DType:
    value = options["dtype"]
    if not isinstance(value, str) or value not in _DTYPES:
        raise ConfigError(f"{where}: dtype is {value!r}, allowed is {', '.join(_DTYPES)}")
    return _DTYPES[value]
