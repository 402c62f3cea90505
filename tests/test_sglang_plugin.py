"""The contract with SGLang: where the plugin hooks in, and that it does no harm where it cannot."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang_fakes import dtype_of, fake_pool
from sglang_harness import HAS_SGLANG

from kvcodec.sglang import plugin
from kvcodec.sglang.geometry import logical_dtype

needs_sglang = pytest.mark.skipif(not HAS_SGLANG, reason="SGLang is not installed: make sglang")


@pytest.fixture
def sglang() -> None:
    """SGLang in this process, with all plugins loaded."""
    from sglang_pools import start_sglang

    start_sglang()


def test_plugin_is_an_entry_point():
    (entry,) = [e for e in entry_points(group="sglang.srt.plugins") if e.name == "kvcodec"]
    assert entry.load() is plugin.register


def test_importing_the_plugin_imports_neither_sglang_nor_torch():
    code = "import sys, kvcodec.sglang.plugin; print({'sglang', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "set()"


@needs_sglang
@pytest.mark.usefixtures("sglang")
def test_command_line_takes_our_name_and_those_of_sglang():
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    required = ["--model-path", "x", "--hicache-storage-backend"]
    for name in ("kvcodec", "file", "dynamic"):
        assert parser.parse_args([*required, name]).hicache_storage_backend == name
    with pytest.raises(SystemExit):
        parser.parse_args([*required, "nonsense"])


@needs_sglang
@pytest.mark.usefixtures("sglang")
def test_places_that_are_hooked_exist_and_have_the_signature_we_count_on():
    from sglang.srt.managers.cache_controller import HiCacheController
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    create = inspect.signature(StorageBackendFactory._create_builtin_backend)
    assert list(create.parameters) == [
        "backend_name",
        "backend_class",
        "storage_config",
        "mem_pool_host",
    ]
    attach = inspect.signature(HiCacheController.attach_storage_backend)
    assert list(attach.parameters)[:2] == ["self", "storage_backend"]
    assert callable(HiCacheController._page_get_zero_copy)
    assert callable(HiCacheController._page_set_zero_copy)
    parsed = HybridCacheController.parse_storage_backend_extra_config(
        '{"hicache_storage_pass_prefix_keys": true, "sink_tokens": 4, "other": 1}'
    )
    assert parsed[0]["hicache_storage_pass_prefix_keys"] is True
    assert parsed[-1] is True
    untouched = HybridCacheController.parse_storage_backend_extra_config('{"other": 1}')
    assert untouched[0] == {"other": 1}


@needs_sglang
@pytest.mark.usefixtures("sglang")
def test_factory_constructs_our_storage_and_leaves_others_alone(tmp_path: Path):
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    from kvcodec.sglang import KVCodecStorage

    def config(**extra: object) -> Any:
        return HiCacheStorageConfig(
            tp_rank=0,
            tp_size=1,
            pp_rank=0,
            pp_size=1,
            attn_cp_rank=0,
            attn_cp_size=1,
            is_mla_model=False,
            enable_storage_metrics=False,
            is_page_first_layout=True,
            model_name="tiny",
            extra_config=extra,
        )

    pool = fake_pool("mha", "page_first")
    ours = StorageBackendFactory.create_backend("kvcodec", config(url="memory://"), pool)
    assert type(ours) is KVCodecStorage
    ours.close()
    theirs = StorageBackendFactory.create_backend(
        "file", config(file_storage_path=str(tmp_path)), pool
    )
    assert type(theirs).__name__ == "HiCacheFile"
    with pytest.raises(ValueError, match="nonsense"):
        StorageBackendFactory.create_backend("nonsense", config(), pool)


@needs_sglang
@pytest.mark.usefixtures("sglang")
def test_interface_we_implement_is_the_one_sglang_calls():
    """Each method takes what SGLang's own interface passes, by position and by name."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

    from kvcodec.sglang import KVCodecStorage

    methods = [
        name
        for name, method in inspect.getmembers(HiCacheStorage, inspect.isfunction)
        if not name.startswith("_")
    ]
    assert {"batch_get_v1", "batch_set_v2", "batch_exists_v2", "get_stats"} <= set(methods)
    for name in methods:
        theirs = list(inspect.signature(getattr(HiCacheStorage, name)).parameters)
        ours = list(inspect.signature(getattr(KVCodecStorage, name)).parameters)
        assert ours[: len(theirs)] == theirs, name
    inherited = [name for name in methods if name not in vars(KVCodecStorage)]
    assert inherited == ["on_host_pools_registered"]
    assert callable(KVCodecStorage.close)


# --- hooks, one by one


def test_choice_is_added_once_and_to_its_own_option_only():
    parser = argparse.ArgumentParser()
    parser.add_argument("--hicache-storage-backend", choices=["file"])
    parser.add_argument("--other", choices=["file"])
    for _ in range(2):
        plugin._add_choice(None, parser)
    choices = {action.dest: action.choices for action in parser._actions}
    assert choices["hicache_storage_backend"] == ["file", "kvcodec"]
    assert choices["other"] == ["file"]


class Controller(SimpleNamespace):
    """What the hook uses of a cache controller."""

    def __init__(self, backend: str, host_pool: object, device_pool: object) -> None:
        side = SimpleNamespace(
            host_pool=fake_pool("mha", "page_first", "uint8"),
            device_pool=SimpleNamespace(dtype=dtype_of("float8_e5m2")),
        )
        super().__init__(
            mem_pool_device=device_pool,
            mem_pool_host=Group([side]),
            storage_host_pool=host_pool,
            storage_backend_type=backend,
            page_get_func="generic",
            page_set_func="generic",
            _page_get_zero_copy="in place",
            _page_set_zero_copy="in place",
        )


class Group:
    """A host pool group."""

    def __init__(self, entries: list[SimpleNamespace]) -> None:
        self.entries = entries


@pytest.mark.parametrize(("backend", "function"), [("kvcodec", "in place"), ("file", "generic")])
def test_attachment_notes_dtypes_and_chooses_pages_in_place(backend: str, function: str):
    pool = fake_pool("mha", "page_first", "uint8")
    controller = Controller(backend, pool, SimpleNamespace(dtype=dtype_of("float8_e4m3fn")))
    during: list[str] = []

    def attach(controller: Controller, name: str, *, threshold: int) -> str:
        assert (name, threshold) == (backend, 3)
        during.append(logical_dtype(pool))
        return "attached"

    assert plugin._attach(attach, controller, backend, threshold=3) == "attached"
    assert during == ["torch.float8_e4m3fn"]
    assert logical_dtype(controller.mem_pool_host.entries[0].host_pool) == "torch.float8_e5m2"
    assert controller.page_get_func == controller.page_set_func == function


def test_attachment_of_a_controller_unlike_any_we_know_goes_on():
    controller = SimpleNamespace(storage_backend_type="file", mem_pool_host=1, mem_pool_device=2)
    controller.mem_pool_device = SimpleNamespace(dtype="torch.bfloat16")
    assert plugin._attach(lambda controller: "attached", controller) == "attached"


def test_prefix_keys_are_told_only_to_who_asks():
    for extra in ({"sink_tokens": 4}, {"other": 4}):
        for passes in (True, False):
            result = (dict(extra), 256, 1.0, 0.25, passes)
            plugin._tell_prefix_keys(result)
            told = result[0].get("hicache_storage_pass_prefix_keys")
            assert told is (passes if "sink_tokens" in extra else None)
    plugin._tell_prefix_keys("of another release")


def test_trouble_names_the_place_and_the_cause():
    assert plugin._trouble("os.path.join") == ""
    assert plugin._trouble("os.path.nothing").startswith("no os.path.nothing (AttributeError")
    assert "ModuleNotFoundError" in plugin._trouble("nowhere.at.all")


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.5.10", False),
        ("0.5.11", True),
        ("0.5.11.post1", True),
        ("0.5.23", True),
        ("0.5.24", False),
        ("0.6.0", False),
        ("of unknown version", False),
    ],
)
def test_range_of_tested_releases(version: str, tested: bool):
    assert plugin._is_tested(version) is tested


def test_sglang_without_a_place_for_us_gets_one_error_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    create = plugin._CREATE
    monkeypatch.setattr(plugin, "_trouble", lambda place: f"no {place}" * (place == create))
    monkeypatch.setattr(plugin, "_sglang_version", lambda: "0.9.1")
    monkeypatch.setattr(plugin, "_register_hooks", lambda: pytest.fail("half a registration"))
    with caplog.at_level(logging.INFO):
        plugin.register()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    for part in ("0.9.1", "_create_builtin_backend", "0.5.11 to 0.5.23", "dynamic"):
        assert part in record.getMessage()


def test_newer_sglang_gets_one_warning_and_the_hooks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    registered = []
    monkeypatch.setattr(plugin, "_trouble", lambda place: "")
    monkeypatch.setattr(plugin, "_sglang_version", lambda: "0.6.0")
    monkeypatch.setattr(plugin, "_register_hooks", lambda: registered.append(True))
    with caplog.at_level(logging.INFO):
        plugin.register()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "0.6.0" in record.getMessage()
    assert "dynamic" in record.getMessage()
    assert registered == [True]


@needs_sglang
def test_sglang_that_skips_the_plugin_still_offers_dynamic():
    """SGLANG_PLUGINS leaves us out: our name is invalid then, and nothing else is different."""
    code = textwrap.dedent(
        """
        import sglang_cpu_bridge; sglang_cpu_bridge.install_stand_ins()
        import argparse
        from sglang.srt.plugins import load_plugins
        load_plugins()
        from sglang.srt.server_args import ServerArgs
        parser = argparse.ArgumentParser()
        ServerArgs.add_cli_args(parser)
        (action,) = [a for a in parser._actions if a.dest == "hicache_storage_backend"]
        print(sorted({"kvcodec", "dynamic"} & set(action.choices)))
        """
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "SGLANG_PLUGINS": "none"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.splitlines()[-1] == "['dynamic']"
