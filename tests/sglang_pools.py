"""Device pools of SGLang on CPU tensors: built, filled with random rows, read back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

# 0xA5 in each byte: an ordinary small number in all dtypes, and never what a test stores.
POISON = 0xA5


@lru_cache(maxsize=1)
def start_sglang() -> None:
    """Import SGLang as its scheduler process would, with all plugins; once per process."""
    from sglang_cpu_bridge import extensions_path, install_stand_ins

    os.environ.update(
        SGLANG_USE_CPU_ENGINE="1",
        HF_HUB_OFFLINE="1",
        TORCH_EXTENSIONS_DIR=str(extensions_path()),
    )
    install_stand_ins()
    import torch

    # Two threads make each small parallel region of torch cost some 12 ms instead of 0.2 ms.
    torch.set_num_threads(1)
    from sglang.srt.plugins import load_plugins

    load_plugins()


@dataclass(frozen=True, kw_only=True)
class PoolShape:
    """What a device pool looks like; see HiCacheSession for the fields."""

    kind: str
    page_size: int
    dtype: str
    layer_count: int
    head_count: int
    head_size: int
    v_head_size: int | None
    kv_lora_rank: int
    rope_head_size: int
    capacity_tokens: int

    @property
    def torch_dtype(self) -> Any:
        """The logical dtype; a pool may store another one."""
        import torch

        return {
            "bf16": torch.bfloat16,
            "fp16": torch.float16,
            "fp32": torch.float32,
            "fp8_e4m3": torch.float8_e4m3fn,
            "fp8_e5m2": torch.float8_e5m2,
        }[self.dtype]


@dataclass(frozen=True)
class KVRows:
    """Device rows by name: "k" and "v", or "latent", each [layer, token, head, head_size].

    Rows are in the pool's storage dtype (uint8 for fp8); ``as_float32`` reads them as what they
    mean. For sliding-window layers ``swa`` holds "k" and "v" of the trailing tokens.
    """

    rows: Mapping[str, Any]
    swa: Mapping[str, Any]
    dtype: Any

    @property
    def token_count(self) -> int:
        """How many tokens have full-attention rows here."""
        return int(next(iter(self.rows.values())).shape[1])

    def _parts(self) -> dict[str, Any]:
        return {**self.rows, **{f"swa_{name}": rows for name, rows in self.swa.items()}}

    def first(self, token_count: int) -> KVRows:
        """The rows of the first tokens; sliding-window rows count from the end, so they go."""
        return KVRows(
            {name: rows[:, :token_count] for name, rows in self.rows.items()}, {}, self.dtype
        )

    def _paired(self, other: KVRows) -> list[tuple[str, Any, Any]]:
        """Rows of the same name; of sliding-window rows, the trailing ones that both have."""
        pairs = [(name, rows, other.rows[name]) for name, rows in self.rows.items()]
        for name, rows in self.swa.items():
            if name in other.swa:
                count = min(rows.shape[1], other.swa[name].shape[1])
                if count:
                    pairs.append((f"swa_{name}", rows[:, -count:], other.swa[name][:, -count:]))
        return pairs

    def equals(self, other: KVRows) -> bool:
        """Whether all bytes are the same."""
        import torch

        return all(
            mine.shape == theirs.shape
            and torch.equal(
                mine.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)
            )
            for _, mine, theirs in self._paired(other)
        )

    def as_float32(self) -> dict[str, np.ndarray]:
        """All rows as numbers, by name ("swa_k", "swa_v" for sliding-window layers)."""
        return {name: _numbers(rows, self.dtype) for name, rows in self._parts().items()}

    def max_errors(self, other: KVRows) -> dict[str, float]:
        """The largest absolute difference, by name."""
        return {
            name: float(np.abs(_numbers(a, self.dtype) - _numbers(b, self.dtype)).max())
            for name, a, b in self._paired(other)
        }


def _numbers(rows: Any, dtype: Any) -> np.ndarray:
    import torch

    return np.asarray((rows.view(dtype) if rows.dtype == torch.uint8 else rows).float())


def _draw_normal(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.standard_normal(shape, dtype=np.float32)


def _layer_arrays(pool: Any) -> dict[str, list[Any]]:
    """The arrays of each layer, [slot, head, head_size], by name."""
    if hasattr(pool, "k_buffer"):
        return {"k": list(pool.k_buffer), "v": list(pool.v_buffer)}
    return {"latent": list(pool.kv_buffer)}


def _fill(pool: Any, slots: Any, draw: Callable[[tuple[int, ...]], np.ndarray], dtype: Any) -> None:
    import torch

    for arrays in _layer_arrays(pool).values():
        for layer in arrays:
            values = torch.from_numpy(draw((len(slots), *layer.shape[1:]))).to(dtype)
            layer[slots] = values.view(layer.dtype)


def _read(pool: Any, slots: Any) -> dict[str, Any]:
    import torch

    return {
        name: torch.stack([layer[slots] for layer in arrays])
        for name, arrays in _layer_arrays(pool).items()
    }


def _poison(tensor: Any) -> None:
    import torch

    tensor.view(torch.uint8).fill_(POISON)


class Pools:
    """One device pool with its allocator."""

    def __init__(self, shape: PoolShape, pool: Any, allocator: Any) -> None:
        from sglang.srt.mem_cache.unified_cache.components import ComponentType

        self.shape = shape
        self.pool = pool
        self.allocator = allocator
        self.is_hybrid = shape.kind == "swa"
        components = (ComponentType.FULL, ComponentType.SWA)
        self.tree_components = components if self.is_hybrid else components[:1]
        self.full_pool = pool.full_kv_pool if self.is_hybrid else pool

    def allocate(self, token_count: int) -> Any:
        """Device slots for so many tokens."""
        import torch

        if not self.is_hybrid:
            slots = self.allocator.alloc(token_count)
        else:
            nothing, total = torch.tensor([0]), torch.tensor([token_count])
            slots = self.allocator.alloc_extend(
                nothing, nothing, total, total, torch.tensor([-1]), token_count
            )
        assert slots is not None, "the device pool is full"
        return slots

    def _swa_slots(self, slots: Any) -> Any:
        return self.allocator.translate_loc_from_full_to_swa(slots).long()

    def fill(
        self,
        slots: Any,
        generator: np.random.Generator,
        make_rows: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] | None,
    ) -> KVRows:
        """Write random rows, and return what the pool then holds."""
        make = make_rows or _draw_normal

        def draw(shape: tuple[int, ...]) -> np.ndarray:
            return np.ascontiguousarray(make(generator, shape), dtype=np.float32)

        _fill(self.full_pool, slots, draw, self.shape.torch_dtype)
        if self.is_hybrid:
            _fill(self.pool.swa_kv_pool, self._swa_slots(slots), draw, self.shape.torch_dtype)
        return self.read(slots, swa_token_count=len(slots))

    def read(self, slots: Any, *, swa_token_count: int = 0) -> KVRows:
        """Copies of the rows at the slots, and of the last sliding-window rows among them."""
        swa: dict[str, Any] = {}
        if self.is_hybrid and swa_token_count:
            swa = _read(self.pool.swa_kv_pool, self._swa_slots(slots[-swa_token_count:]))
        return KVRows(_read(self.full_pool, slots), swa, self.shape.torch_dtype)

    def poison_device(self) -> None:
        """Overwrite all device rows."""
        pools = (self.full_pool, self.pool.swa_kv_pool) if self.is_hybrid else (self.full_pool,)
        for pool in pools:
            for arrays in _layer_arrays(pool).values():
                for layer in arrays:
                    _poison(layer)

    def poison_host(self, host_pools: Any) -> None:
        """Overwrite all bytes of a controller's host pools."""
        for entry in host_pools.entries:
            self.poison_buffers(entry.host_pool)

    def poison_buffers(self, host_pool: Any) -> None:
        """Overwrite all bytes of one host pool."""
        buffers = host_pool.kv_buffer
        for buffer in buffers if isinstance(buffers, (list, tuple)) else (buffers,):
            _poison(buffer)


def build_pools(shape: PoolShape) -> Pools:
    """The device pool and the allocator that SGLang would choose for this shape."""
    if shape.kind == "swa":
        return _build_hybrid(shape)
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    common = {
        "size": shape.capacity_tokens,
        "page_size": shape.page_size,
        "dtype": shape.torch_dtype,
        "layer_num": shape.layer_count,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    if shape.kind == "mla":
        pool = MLATokenToKVPool(
            kv_lora_rank=shape.kv_lora_rank, qk_rope_head_dim=shape.rope_head_size, **common
        )
    elif shape.kind in ("mha", "asymmetric"):
        v_head_size = shape.v_head_size
        if shape.kind == "asymmetric" and v_head_size is None:
            v_head_size = shape.head_size // 2
        pool = MHATokenToKVPool(
            head_num=shape.head_count,
            head_dim=shape.head_size,
            v_head_dim=v_head_size,
            **common,
        )
    else:
        raise ValueError(f"kind {shape.kind!r} is not one of mha, mla, swa, asymmetric")
    place = (shape.torch_dtype, "cpu", pool)
    if shape.page_size == 1:
        allocator = TokenToKVPoolAllocator(shape.capacity_tokens, *place, need_sort=False)
    else:
        allocator = PagedTokenToKVPoolAllocator(
            shape.capacity_tokens, shape.page_size, *place, need_sort=False
        )
    return Pools(shape, pool, allocator)


def _build_hybrid(shape: PoolShape) -> Pools:
    """Every second layer attends to a sliding window only, as in GPT-OSS or Gemma."""
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    capacity, swa_capacity = shape.capacity_tokens, shape.capacity_tokens // 2
    pool = SWAKVPool(
        size=capacity,
        size_swa=swa_capacity,
        page_size=shape.page_size,
        dtype=shape.torch_dtype,
        head_num=shape.head_count,
        head_dim=shape.head_size,
        swa_attention_layer_ids=list(range(0, 2 * shape.layer_count, 2)),
        full_attention_layer_ids=list(range(1, 2 * shape.layer_count, 2)),
        device="cpu",
    )
    allocator = SWATokenToKVPoolAllocator(
        capacity, swa_capacity, shape.page_size, shape.torch_dtype, "cpu", pool, need_sort=False
    )
    return Pools(shape, pool, allocator)
