"""Entry point of the group ``sglang.srt.plugins``; SGLang calls it in each of its processes."""

from __future__ import annotations

import importlib
import os

import torch

from sglang_cpu_bridge.transfer_ops import TRANSFER_OPS

# The modules that import the transfer ops from sgl_kernel, on accelerators only.
_HOST_POOL_MODULES = (
    "sglang.srt.mem_cache.pool_host.mha",
    "sglang.srt.mem_cache.pool_host.mla",
    "sglang.srt.mem_cache.pool_host.dsa",
    "sglang.srt.mem_cache.memory_pool_host",
)
_HOST_MEMORY_RESERVE_BYTES = 1 << 30


def register() -> None:
    """Binds the CPU transfer ops and registers the hooks; does nothing beside CUDA."""
    if torch.cuda.is_available():
        return
    _bind_transfer_ops()
    _leave_less_memory_free()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.mem_cache.pool_host.base.HostKVCache.__init__",
        _without_pinned_memory,
        HookType.BEFORE,
    )
    if os.environ.get("CPU_BRIDGE_MLA") == "1":
        _serve_mla_with_torch_native()


def _leave_less_memory_free() -> None:
    """SGLang leaves 10 GiB of host memory free, which is more than a small machine has."""
    from sglang.srt.mem_cache.pool_host import base

    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = min(
        base.HICACHE_HOST_MEMORY_RESERVE_BYTES, _HOST_MEMORY_RESERVE_BYTES
    )


def _bind_transfer_ops() -> None:
    for module_name in _HOST_POOL_MODULES:
        module = importlib.import_module(module_name)
        for name, op in TRANSFER_OPS.items():
            setattr(module, name, op)


def _without_pinned_memory(
    *args: object, **options: object
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Torch built for CPUs cannot pin memory: reading a page from storage would raise."""
    return args, {**options, "pin_memory": False}


def _serve_mla_with_torch_native() -> None:
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
        AttnForwardMethod,
    )

    AttentionBackendRegistry.register(
        "torch_native", lambda _attention, _batch: AttnForwardMethod.MLA
    )
