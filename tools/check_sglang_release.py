"""Tries the plugin with the SGLang that this process imports, for check_sglang_versions.sh."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

PAGE_SIZE = 16
LAYOUTS = {
    "mha": ["layer_first", "page_first", "page_first_direct", "page_head"],
    "mla": ["layer_first", "page_first", "page_first_direct"],
}


def check_hooks() -> str:
    """All our hooks are in place."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    load_plugins()
    ours = {
        place
        for place, hooks in HookRegistry._hooks.items()
        if any(hook[1].__module__ == "kvcodec.sglang.plugin" for hook in hooks)
    }
    assert len(ours) >= 4, f"hooks registered: {sorted(ours)}"
    assert ours <= HookRegistry._patched, f"not applied: {sorted(ours - HookRegistry._patched)}"
    return f"{len(ours)} hooks"


def check_command_line() -> str:
    """The option takes our name."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    arguments = ["--model-path", "x", "--hicache-storage-backend", "kvcodec"]
    assert parser.parse_args(arguments).hicache_storage_backend == "kvcodec"
    return "command line"


def _config() -> Any:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    values: dict[str, object] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "enable_storage_metrics": False,
        "is_page_first_layout": False,
        "model_name": "tiny",
        "extra_config": {"url": "memory://", "preset": "raw"},
    }
    known = {field.name for field in dataclasses.fields(HiCacheStorageConfig)}
    return HiCacheStorageConfig(**{name: values[name] for name in values.keys() & known})


def _host_pool(kind: str, layout: str) -> Any:
    import torch
    from sglang.srt.mem_cache import memory_pool

    common: dict[str, Any] = {
        "size": 8 * PAGE_SIZE,
        "page_size": PAGE_SIZE,
        "dtype": torch.bfloat16,
        "layer_num": 2,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    if kind == "mha":
        device = memory_pool.MHATokenToKVPool(head_num=2, head_dim=64, **common)
    else:
        device = memory_pool.MLATokenToKVPool(kv_lora_rank=64, qk_rope_head_dim=16, **common)
    pool_class = _pool_class(kind)
    if "device_pool" in inspect.signature(pool_class.__init__).parameters:
        return pool_class(device, 2.0, 0, PAGE_SIZE, layout, pin_memory=False)
    return None


def _pool_class(kind: str) -> Any:
    name = f"{kind.upper()}TokenToKVPoolHost"
    try:
        from sglang.srt.mem_cache import memory_pool_host

        return getattr(memory_pool_host, name)
    except (ImportError, AttributeError):
        import importlib

        return getattr(importlib.import_module(f"sglang.srt.mem_cache.pool_host.{kind}"), name)


def check_pages(kind: str, layout: str) -> str:
    """Pages of a real host pool leave it and return, in place and bit exact."""
    import torch
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    pool = _host_pool(kind, layout)
    if pool is None:
        return f"({kind} {layout}: pools are built otherwise, see the tests)"
    storage = StorageBackendFactory.create_backend("kvcodec", _config(), pool)
    storage.register_mem_pool_host(pool)
    assert type(storage._pools["kv"]).__name__ == "MappedPages"
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))
    numbers = (3, 1)
    slots = torch.cat([torch.arange(n * PAGE_SIZE, (n + 1) * PAGE_SIZE) for n in numbers])
    before = [pool.get_data_page(n * PAGE_SIZE).clone() for n in numbers]
    assert storage.batch_set_v1(["a", "b"], slots) == [True, True]
    pool.kv_buffer.zero_()
    assert storage.batch_get_v1(["a", "b"], slots) == [True, True]
    for number, page in zip(numbers, before, strict=True):
        assert torch.equal(pool.get_data_page(number * PAGE_SIZE), page)
    assert storage.batch_exists_v2(["a", "b", "c"], []).kv_hit_pages == 2
    assert storage.batch_set(["c"], before[:1])
    (page,) = storage.batch_get(["c"], [torch.zeros_like(before[0])])
    assert torch.equal(page, before[0])
    assert storage.clear() is True
    storage.close()
    return f"{kind} {layout}"


def main() -> int:
    """One line per release; 1 if anything failed."""
    import sglang_cpu_bridge

    warnings.simplefilter("ignore")
    sglang_cpu_bridge.install_stand_ins()
    wanted, found = sys.argv[1], version("sglang")
    checks: list[tuple[str, Callable[[], str]]] = [
        ("hooks", check_hooks),
        ("command line", check_command_line),
    ]
    for kind, layout in itertools.chain(*([(k, x) for x in LAYOUTS[k]] for k in LAYOUTS)):
        checks.append((f"{kind} {layout}", lambda k=kind, x=layout: check_pages(k, x)))
    passed, failed = [], []
    if wanted != found:
        failed.append(f"imported {found} instead")
    for name, check in checks:
        try:
            passed.append(check())
        except Exception as error:  # noqa: BLE001 - any failure of any release is a line
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    print(f"SGLang {wanted}: {', '.join(passed)}" + "".join(f"\n  FAILED {x}" for x in failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
