"""What kvcodec relies on inside LMCache; run with pytest by the Python that has LMCache.

A test that fails here says that LMCache has moved, and where: `kvcodec/lmcache/objects.py` uses its
storage manager, `server_module.py` is loaded by it, `chunks.py` and `lm.py` read and write what it
wrote and reads.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import re
import select
from pathlib import Path

import pytest
import torch
from lmcache.v1.distributed.api import ObjectKey, PrefetchResult, PrefetchTaskSpec
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.l2_adapters import native_connector_l2_adapter as native
from lmcache.v1.distributed.l2_adapters import native_plugin_l2_adapter
from lmcache.v1.distributed.storage_manager import StorageManager
from lmcache.v1.multiprocess import ext_server_module
from lmcache.v1.protocol import ClientCommand, ClientMetaMessage, ServerMetaMessage

from kvcodec.errors import ConfigError
from kvcodec.lmcache import objects, server_module
from kvcodec.lmcache.chunks import ChunkKey
from kvcodec.lmcache.connector import Connector
from kvcodec_backends import lm

NAME = "0" * 31 + "1/" + "0" * 10 + "ab" * 27


def parameters(function: object) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_this_release_is_supported():
    assert importlib.metadata.version("lmcache") in server_module.SUPPORTED_RELEASES


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("reserve_write", ["keys", "layout_desc"]),
        ("prepare_write_completion", ["objects"]),
        ("finish_write_by_owner", ["completion"]),
        ("submit_prefetch_task", ["spec", "external_request_id", "skip_l2"]),
        ("wait_prefetch_status", ["handle", "timeout"]),
        ("query_prefetch_status", ["handle"]),
        ("unsafe_read", ["keys", "l1_owners"]),
        ("finish_read_prefetched", ["keys", "read_locks", "l1_owners"]),
        ("delete_l1_keys", ["keys", "force"]),
        ("register_l2_listener", ["listener"]),
        ("l2_adapters", []),
        ("get_l1_usage", []),
    ],
)
def test_the_storage_manager_has_the_methods_that_hold_objects(method: str, expected: list[str]):
    assert parameters(getattr(StorageManager, method)) == expected


def test_a_prefetch_says_what_was_hit_and_what_found_no_room():
    fields = {field.name for field in dataclasses.fields(PrefetchResult)}
    assert {"hit_cells", "found_cells", "l1_owners"} <= fields
    fields = {field.name for field in dataclasses.fields(PrefetchTaskSpec)}
    assert {"key_groups", "fetching_policy"} <= fields


def test_the_listener_of_l2_stores_has_the_methods_it_is_called_by():
    wanted = {
        name: parameters(function)
        for name, function in vars(L2AdapterListener).items()
        if name.startswith("on_")
    }
    ours = {name: parameters(getattr(objects._L2Listener, name)) for name in wanted}
    assert ours == wanted


def test_the_server_module_is_what_lmcache_takes_for_one():
    fields = {
        field.name for field in dataclasses.fields(ext_server_module.ExtServerModuleBuildContext)
    }
    assert {"server_context", "config"} <= fields
    module = server_module.ServerModule(object(), {})
    assert ext_server_module._is_engine_module(module)
    assert module.report_status() == {"kvcodec": {"connectors": []}}
    module.close()


@pytest.mark.parametrize(
    "config",
    [
        {"prot": 1},
        {"port": "65500"},
        {"port": -1},
        {"port": 70000},
        {"port": True},
        {"port": 0, "host": 1},
        {"port": 0, "host": ""},
        {"port": 0, "cache_salt": 1},
        {"host": "127.0.0.1"},
    ],
)
def test_an_option_of_the_server_module_that_cannot_be_honoured_is_refused(config: dict):
    with pytest.raises(ConfigError):
        server_module.ServerModule(object(), config)


def test_the_documented_server_module_is_accepted():
    text = (Path(__file__).parents[1] / "docs" / "lmcache.md").read_text()
    found = re.findall(r"--server-module '(\{.*?\})'", text)
    specs = ext_server_module.parse_server_module_specs(found)
    assert [spec.module_path for spec in specs] == [server_module.__name__] * 2
    ports = [server_module._parse(spec.config)[1] for spec in specs]
    assert ports == [None, 65500]


@pytest.mark.parametrize("version", ["0.6.0", "0.5.5", "0.5.60", "0.5.7.dev1", "0.5.6rc1"])
def test_another_release_is_refused_with_the_way_out(version: str):
    with pytest.raises(ConfigError, match=re.escape(version) + r".*lmcache==0\.5\.6"):
        server_module._check_release(version)


@pytest.mark.parametrize("version", ["0.5.6", "0.5.6+cu130", "0.5.6.post2"])
def test_builds_and_repairs_of_a_release_are_that_release(version: str):
    server_module._check_release(version)


@pytest.mark.parametrize("salt", ["", "tenant-7"])
def test_a_key_says_whose_chunk_it_is(salt: str):
    rank = ObjectKey.ComputeKVRank(2, 1, 2, 1)
    key = ObjectKey(b"\x01\xab" * 16, "org/model-7B", rank, 3, salt)
    parsed = ChunkKey.parse(native._object_key_to_string(key))
    assert parsed == ChunkKey("org/model-7B", f"{rank:08x}", 3, "01ab" * 16, salt)


def test_the_connector_has_the_methods_of_a_native_plugin():
    source = inspect.getsource(native.NativeConnectorL2Adapter)
    called = set(re.findall(r"client\.(\w+)\(", source))
    assert {"event_fd", "submit_batch_set", "submit_batch_delete"} <= called
    assert called <= set(dir(Connector))


def make_adapter(tmp_path: Path, **params: object) -> native.NativeConnectorL2Adapter:
    layout = {"object_bytes": 64}
    given = {"url": f"file://{tmp_path}/store", "layout": layout, **params}
    config = native_plugin_l2_adapter.NativePluginL2AdapterConfig.from_dict(
        {"module_path": "kvcodec.lmcache", "class_name": "Connector", "adapter_params": given}
    )
    return native_plugin_l2_adapter._create_native_plugin_l2_adapter(config)


def test_the_native_plugin_makes_an_adapter_of_the_connector(tmp_path: Path):
    adapter = make_adapter(tmp_path)
    key = ObjectKey(b"\x01" * 32, "model", 0)
    try:
        adapter.submit_lookup_and_lock_task([key], {})
        assert select.select([adapter.get_lookup_and_lock_event_fd()], [], [], 20)[0]
        assert adapter.query_lookup_and_lock_result(0).popcount() == 0
        adapter.delete([key])
        assert adapter.report_status()["is_healthy"]
    finally:
        adapter.close()


def test_an_option_that_cannot_be_honoured_ends_the_start(tmp_path: Path):
    with pytest.raises(ConfigError, match="did you mean preset"):
        make_adapter(tmp_path, presett="kv4")


def test_the_older_servers_request_is_read_as_it_was_meant():
    message = ClientMetaMessage.deserialize(lm._request(lm._PUT, NAME, 12345))
    assert message.packlength() == lm._REQUEST.size
    assert message.command is ClientCommand.PUT
    assert message.length == 12345
    assert message.key.model_name == "kvcodec-" + NAME[:32]
    assert message.key.chunk_hash == int(NAME[33:], 16)
    other = ClientMetaMessage.deserialize(lm._request(lm._GET, NAME))
    assert other.command is ClientCommand.GET
    assert other.key == message.key
    exists = ClientMetaMessage.deserialize(lm._request(lm._EXIST, NAME))
    assert exists.command is ClientCommand.EXIST


def test_the_older_servers_answer_carries_our_time_of_writing():
    put = ClientMetaMessage.deserialize(lm._request(lm._PUT, NAME, 99))
    answer = ServerMetaMessage(200, 99, put.fmt, put.dtype, put.shape)
    answer.code = type("Code", (), {"value": 200})
    fields = lm._ANSWER.unpack(answer.serialize())
    assert answer.packlength() == lm._ANSWER.size
    assert fields[:2] == (200, 99)
    assert list(fields[4:7]) == list(put.shape)[:3]
    assert put.dtype is torch.uint8
