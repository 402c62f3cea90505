"""Host pools with the class names, attributes and axes of SGLang's, in numpy: no engine needed.

``HOST_INDEX`` says where SGLang keeps an element, layout by layout, in plain words of its own: it
is what the adapter's geometry is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from fake_backend import FakeBackend

if TYPE_CHECKING:
    from kvcodec.sglang.storage import KVCodecStorage

PAGE_SIZE, PAGE_COUNT, LAYERS, HEADS, SIZE, VALUE_SIZE, GROUPS = 16, 6, 5, 4, 16, 12, 2
RANK, ROPE = 32, 8
SLOTS = PAGE_SIZE * PAGE_COUNT
ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1}
_NUMPY = {1: np.uint8, 2: np.uint16, 4: np.uint32}

KEYS = [f"{index:064x}" for index in range(PAGE_COUNT)]

Index = Callable[[int, int, int, int, int], tuple[int, ...]]

#: (component, layer, slot, head, element) -> index into the pool's tensor.
HOST_INDEX: dict[tuple[str, str], Index] = {
    ("mha", "layer_first"): lambda c, layer, s, h, d: (c, layer, s, h, d),
    ("mha", "page_first"): lambda c, layer, s, h, d: (c, s, layer, h, d),
    ("mha", "page_first_direct"): lambda c, layer, s, h, d: (
        c,
        s // PAGE_SIZE,
        layer,
        s % PAGE_SIZE,
        h,
        d,
    ),
    ("mha", "page_head"): lambda c, layer, s, h, d: (
        c,
        s // PAGE_SIZE,
        h,
        s % PAGE_SIZE,
        layer,
        d,
    ),
    ("mha", "page_unified"): lambda c, layer, s, h, d: (
        s // PAGE_SIZE,
        h // (HEADS // GROUPS),
        layer,
        c,
        s % PAGE_SIZE,
        h % (HEADS // GROUPS),
        d,
    ),
    ("mla", "layer_first"): lambda c, layer, s, h, d: (layer, s, 0, c * RANK + d),
    ("mla", "page_first"): lambda c, layer, s, h, d: (s, layer, 0, c * RANK + d),
    ("mla", "page_first_direct"): lambda c, layer, s, h, d: (
        s // PAGE_SIZE,
        layer,
        s % PAGE_SIZE,
        0,
        c * RANK + d,
    ),
    ("mla", "page_unified"): lambda c, layer, s, h, d: (
        s // PAGE_SIZE,
        layer,
        s % PAGE_SIZE,
        c * RANK + d,
    ),
}
_ONE_STREAM: dict[str, Index] = {
    "layer_first": lambda c, layer, s, h, d: (layer, s, h, d),
    "page_first": lambda c, layer, s, h, d: (s, layer, h, d),
    "page_first_direct": lambda c, layer, s, h, d: (
        s // PAGE_SIZE,
        layer,
        s % PAGE_SIZE,
        h,
        d,
    ),
}
HOST_INDEX |= {("keys", layout): index for layout, index in _ONE_STREAM.items()}
for _layout in ("page_first", "page_first_direct"):
    HOST_INDEX["asymmetric", _layout] = _ONE_STREAM[_layout]
HOST_INDEX["mla", "page_first_kv_split"] = _ONE_STREAM["page_first_direct"]

_TENSOR_SHAPES = {
    ("mha", "layer_first"): (2, LAYERS, SLOTS, HEADS, SIZE),
    ("mha", "page_first"): (2, SLOTS, LAYERS, HEADS, SIZE),
    ("mha", "page_first_direct"): (2, PAGE_COUNT, LAYERS, PAGE_SIZE, HEADS, SIZE),
    ("mha", "page_head"): (2, PAGE_COUNT, HEADS, PAGE_SIZE, LAYERS, SIZE),
    ("mha", "page_unified"): (PAGE_COUNT, GROUPS, LAYERS, 2, PAGE_SIZE, HEADS // GROUPS, SIZE),
    ("mla", "layer_first"): (LAYERS, SLOTS, 1, RANK + ROPE),
    ("mla", "page_first"): (SLOTS, LAYERS, 1, RANK + ROPE),
    ("mla", "page_first_direct"): (PAGE_COUNT, LAYERS, PAGE_SIZE, 1, RANK + ROPE),
    ("mla", "page_unified"): (PAGE_COUNT, LAYERS, PAGE_SIZE, RANK + ROPE),
}
KINDS = {
    "mha": "MHATokenToKVPoolHost",
    "mla": "MLATokenToKVPoolHost",
    "keys": "MHATokenToKOnlyPoolHost",
    "asymmetric": "AsymmetricMHATokenToKVPoolHost",
}


class Memory:
    """As much of a torch tensor as the adapter uses, around a numpy array."""

    def __init__(self, array: npt.NDArray[np.generic]) -> None:
        self.array = array
        self.shape = array.shape
        self.nbytes = array.nbytes
        self.device = SimpleNamespace(type="cpu")

    def stride(self) -> tuple[int, ...]:
        return tuple(stride // self.array.itemsize for stride in self.array.strides)

    def element_size(self) -> int:
        return self.array.itemsize

    def data_ptr(self) -> int:
        return int(self.array.__array_interface__["data"][0])

    def is_contiguous(self) -> bool:
        return bool(self.array.flags.c_contiguous)


class _Type:
    def __init__(self, name: str, itemsize: int) -> None:
        self.name, self.itemsize = name, itemsize

    def __str__(self) -> str:
        return f"torch.{self.name}"


def dtype_of(name: str, itemsize: int | None = None) -> _Type:
    """What stands for ``torch.<name>``."""
    return _Type(name, itemsize or ITEM_SIZES.get(name, 1))


def head_sizes(kind: str) -> list[int]:
    """Row size of each stream."""
    return {
        "mha": [SIZE, SIZE],
        "asymmetric": [SIZE, VALUE_SIZE],
        "keys": [SIZE],
        "mla": [RANK, ROPE],
    }[kind]


def head_count(kind: str) -> int:
    """Rows per token and layer."""
    return 1 if kind == "mla" else HEADS


def fake_pool(kind: str, layout: str, dtype: str = "bfloat16", seed: int = 0) -> SimpleNamespace:
    """A host pool full of distinct or random elements; its class has SGLang's name."""
    item = _NUMPY[ITEM_SIZES[dtype]]

    def memory(shape: Sequence[int]) -> Memory:
        count = int(np.prod(shape))
        values = np.random.default_rng(seed + len(shape)).integers(0, 200, count * item().itemsize)
        if item is np.uint16:  # bf16 and fp16: finite, of moderate size
            values = np.random.default_rng(seed).standard_normal(count).astype(np.float32)
            bits = (values.view(np.uint32) >> 16).astype(np.uint16)
            half = values.astype(np.float16).view(np.uint16)
            return Memory((bits if dtype == "bfloat16" else half).reshape(shape))
        return Memory(values.astype(np.uint8).view(item).reshape(shape))

    attributes: dict[str, object] = {
        "layout": layout,
        "dtype": dtype_of(dtype),
        "page_size": PAGE_SIZE,
        "page_num": PAGE_COUNT,
        "size": SLOTS,
        "layer_num": LAYERS,
        "start_layer": 0,
        "head_num": HEADS,
        "head_dim": SIZE,
        "v_head_dim": VALUE_SIZE if kind == "asymmetric" else SIZE,
        "kv_lora_rank": RANK,
        "qk_rope_head_dim": ROPE,
        "kv_cache_dim": RANK + ROPE,
        "size_per_token": LAYERS * head_count(kind) * sum(head_sizes(kind)) * ITEM_SIZES[dtype],
    }
    if (kind, layout) in _TENSOR_SHAPES:
        attributes["kv_buffer"] = memory(_TENSOR_SHAPES[kind, layout])
    else:
        outer = _one_stream_shape(layout)
        for name, size in zip(("k_buffer", "v_buffer"), head_sizes(kind), strict=False):
            attributes[name] = memory((*outer, head_count(kind), size))
    pool_class = type(KINDS[kind], (SimpleNamespace,), {"__hash__": object.__hash__})
    pool: SimpleNamespace = pool_class(**attributes)
    return pool


def _one_stream_shape(layout: str) -> tuple[int, ...]:
    return {
        "layer_first": (LAYERS, SLOTS),
        "page_first": (SLOTS, LAYERS),
        "page_first_direct": (PAGE_COUNT, LAYERS, PAGE_SIZE),
        "page_first_kv_split": (PAGE_COUNT, LAYERS, PAGE_SIZE),
    }[layout]


def tensors_of(pool: SimpleNamespace) -> list[Memory]:
    """The pool's tensors: one, or one per stream."""
    names = ("kv_buffer", "k_buffer", "v_buffer")
    return [getattr(pool, name) for name in names if hasattr(pool, name)]


def slots_of(*pages: int) -> npt.NDArray[np.int64]:
    """SGLang's host indices of these pages."""
    return np.concatenate([np.arange(n * PAGE_SIZE, (n + 1) * PAGE_SIZE) for n in pages])


class FlatPool:
    """A pool of states, as SGLang's Mamba or DeepSeek V4 pools: torch bytes, a page a row."""

    def __init__(self, page_size: int = 1, page_bytes: int = 100) -> None:
        import torch

        self.page_size, self.size, self.layout = page_size, 8 * page_size, "layer_first"
        self.size_per_token, self.dtype = page_bytes, torch.uint8
        generator = torch.Generator().manual_seed(page_bytes)
        self.kv_buffer = torch.randint(
            0, 256, (8, page_bytes), dtype=torch.uint8, generator=generator
        )
        self.writes: list[int] = []

    def get_data_page(self, index: int, flat: bool = True) -> Any:
        return self.kv_buffer[index // self.page_size].clone()

    def set_from_flat_data_page(self, index: int, page: Any) -> None:
        self.writes.append(index)
        self.kv_buffer[index // self.page_size] = page


def transfer(
    name: str, policy: str = "all_pages", keys: Sequence[str] = (), slots: object = None
) -> SimpleNamespace:
    """SGLang's PoolTransfer."""
    return SimpleNamespace(
        name=name, hit_policy=policy, keys=list(keys), host_indices=slots, indices_from_pool=None
    )


Opener = Callable[..., "KVCodecStorage"]
"""open_storage(pool, config, **options): storage over a pool, with changes to the configuration."""


@contextmanager
def storage_opener(backend: FakeBackend, **defaults: object) -> Iterator[Opener]:
    """Opens storages that all stand before `backend`, and closes them in the end."""
    bridge = pytest.importorskip("sglang_cpu_bridge", reason="SGLang is not installed: make sglang")
    bridge.install_stand_ins()
    from kvcodec.sglang import storage as module

    opened = []

    def open_storage(
        pool: object = None, config: Mapping[str, object] | None = None, **options: object
    ) -> KVCodecStorage:
        settings = {"model_name": "tiny", "tp_rank": 0, "tp_size": 1, **(config or {})}
        extra = {"url": "memory://", **defaults, **options}
        opened.append(module.KVCodecStorage(SimpleNamespace(**settings, extra_config=extra), pool))
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_backend", lambda url, **_: backend)
        yield open_storage
    for storage in opened:
        storage.close()
