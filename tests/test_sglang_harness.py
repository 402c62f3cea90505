"""The harness itself: what SGLang's own ``file`` backend stores must come back bit exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sglang_controller import ControllerSession
from sglang_harness import HAS_SGLANG, HiCacheSession, file_extra, make_tokens

pytestmark = pytest.mark.skipif(not HAS_SGLANG, reason="SGLang is not installed: make sglang")

CONFIGURATIONS: list[dict[str, Any]] = [
    {"layout": "layer_first"},
    {"layout": "layer_first", "io_backend": "direct"},
    {"layout": "page_first"},
    {"layout": "page_first_direct"},
    {"layout": "page_head"},
    {"page_size": 1},
    {"page_size": 64, "dtype": "fp16"},
    {"page_size": 64, "dtype": "fp8_e4m3"},
    {"dtype": "fp8_e5m2", "layout": "page_head"},
    {"kind": "mla", "layout": "layer_first"},
    {"kind": "mla", "layout": "layer_first", "io_backend": "direct"},
    {"kind": "mla", "layout": "page_first", "dtype": "fp8_e4m3"},
    {"kind": "mla", "layout": "page_first_direct"},
    {"kind": "swa", "layout": "page_first"},
    {"kind": "swa", "layout": "page_first_direct"},
    {"tp_rank": 1, "tp_size": 2},
]


def name_of(configuration: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in configuration.items())


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=name_of)
def test_rows_survive_storage(configuration: dict[str, Any], tmp_path: Path):
    with HiCacheSession(extra=file_extra(tmp_path), **configuration) as session:
        tokens = make_tokens(192, seed=1)
        original = session.backup(tokens, seed=1)
        session.evict()
        result = session.prefetch(tokens)
        stored_bytes = sum(path.stat().st_size for path in tmp_path.iterdir())
        pools = 2 if session.kind == "swa" else 1
        assert stored_bytes == pools * session.raw_page_bytes * len(tokens) // session.page_size
    assert result.storage_hit_tokens == result.host_hit_tokens == 192
    assert result.swa_hit_tokens == (64 if configuration.get("kind") == "swa" else 0)
    assert result.rows is not None
    assert result.rows.equals(original)
    assert set(result.rows.max_errors(original).values()) == {0.0}


@pytest.mark.parametrize("layout", ["page_first", "page_first_direct"])
@pytest.mark.parametrize("session_class", [HiCacheSession, ControllerSession])
def test_rows_of_unequal_k_and_v_survive_storage(session_class: type[HiCacheSession], layout: str):
    from sglang_pools import start_sglang

    start_sglang()
    from sglang_raw_backend import RAW_EXTRA, RawPageStorage

    RawPageStorage.pages.clear()
    with session_class(
        kind="asymmetric", layout=layout, backend="dynamic", extra=RAW_EXTRA
    ) as session:
        tokens = make_tokens(128, seed=2)
        original = session.backup(tokens, seed=2)
        session.evict()
        result = session.prefetch(tokens)
        assert len(RawPageStorage.pages) == 8
    assert result.storage_hit_tokens == 128
    assert result.rows is not None
    assert result.rows.equals(original)
    assert original.rows["k"].shape[-1] == 2 * original.rows["v"].shape[-1]


@pytest.mark.parametrize("kind", ["mha", "mla"])
@pytest.mark.parametrize("layout", ["layer_first", "page_first"])
def test_bare_controller_brings_rows_back(kind: str, layout: str, tmp_path: Path):
    with ControllerSession(kind=kind, layout=layout, extra=file_extra(tmp_path)) as session:
        tokens = make_tokens(320, seed=3)
        original = session.backup(tokens, seed=3)
        session.evict()
        result = session.prefetch(tokens)
        assert session.prefetch(make_tokens(64, seed=4)).storage_hit_tokens == 0
    assert result.storage_hit_tokens == 320
    assert result.rows is not None
    assert result.rows.equals(original)


def test_only_the_stored_prefix_is_a_hit(tmp_path: Path):
    with HiCacheSession(extra=file_extra(tmp_path)) as session:
        tokens = make_tokens(128, seed=5)
        original = session.backup(tokens, seed=5)
        session.evict()
        result = session.prefetch([*tokens, *make_tokens(64, seed=6)])
        session.evict()
        assert session.prefetch(make_tokens(128, seed=7)).rows is None
    assert result.storage_hit_tokens == 128
    assert result.rows is not None
    assert result.rows.equals(original)


def test_later_session_reads_what_an_earlier_one_stored(tmp_path: Path):
    tokens = make_tokens(128, seed=8)
    with HiCacheSession(extra=file_extra(tmp_path)) as session:
        original = session.backup(tokens, seed=8)
    with HiCacheSession(extra=file_extra(tmp_path)) as session:
        assert session.expected_rows(128, seed=8).equals(original)
        session.evict()
        result = session.prefetch(tokens)
    assert result.rows is not None
    assert result.rows.equals(original)


def test_backend_can_be_attached_and_detached(tmp_path: Path):
    with HiCacheSession(backend=None) as session:
        assert session.storage is None
        tokens = make_tokens(64, seed=9)
        session.backup(tokens, seed=9)
        session.evict()
        session.attach("file", file_extra(tmp_path))
        assert session.prefetch(tokens).storage_hit_tokens == 0
        session.backup(tokens, seed=9)
        session.evict()
        assert session.prefetch(tokens).storage_hit_tokens == 64
        session.detach()
        assert session.storage is None
        with pytest.raises(RuntimeError, match="nonsense"):
            session.attach("nonsense")


def test_rows_can_be_drawn_by_the_test(tmp_path: Path):
    def constant(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, 3.0)

    with HiCacheSession(extra=file_extra(tmp_path)) as session:
        rows = session.backup(make_tokens(16), make_rows=constant)
    assert np.all(rows.as_float32()["k"] == 3.0)


def test_sessions_do_not_overlap():
    with HiCacheSession(backend=None), pytest.raises(RuntimeError, match="another HiCacheSession"):
        HiCacheSession(backend=None).__enter__()
    with HiCacheSession(backend=None):
        pass
