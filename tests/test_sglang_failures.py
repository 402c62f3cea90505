"""SGLang's real controller when pages, stores, options or we are not as they should be."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend
from sglang_harness import HAS_SGLANG, HiCacheSession, make_tokens
from sglang_pools import start_sglang
from sglang_round_trip import bits_of, page_files, url_of

from kvcodec.format import EncodedPage

pytestmark = pytest.mark.skipif(not HAS_SGLANG, reason="SGLang is not installed: make sglang")


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_damaged_page_is_a_miss_and_the_next_backup_heals_it(damage: str, tmp_path: Path):
    with HiCacheSession(
        backend="kvcodec", extra={"url": url_of(tmp_path), "preset": "raw"}
    ) as session:
        tokens = make_tokens(128, seed=5)
        original = session.backup(tokens, seed=5)
        victim = page_files(tmp_path)[0]
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes({"flip": data, "cut": data[:-64], "empty": b""}[damage])
        session.evict()
        result = session.prefetch(tokens)
        assert result.storage_hit_tokens < 128
        if result.rows is not None:
            assert result.rows.equals(original.first(result.rows.token_count))
        counters = session.storage.counters()
        corrupt = sum(v for k, v in counters.items() if k.startswith("prefetch.corrupt"))
        assert corrupt == (0 if damage == "empty" else 1)  # the store itself knows an empty file
        session.evict()
        session.backup(tokens, seed=5)
        session.evict()
        healed = session.prefetch(tokens)
        assert healed.storage_hit_tokens == 128
        assert healed.rows is not None
        assert healed.rows.equals(original)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBackend]:
    """What stands behind every storage of a test, whatever its URL."""
    start_sglang()
    from kvcodec.sglang import storage

    backend = FakeBackend()
    monkeypatch.setattr(storage, "open_backend", lambda url, **_: backend)
    yield backend
    backend.hook = lambda operation, names: None


SHORT = {
    "url": "memory://",
    "preset": "raw",
    "exists_timeout_seconds": 0.2,
    "prefetch_timeout_seconds": 0.3,
    "backup_timeout_seconds": 0.3,
}


@pytest.mark.parametrize("operation", ["exists", "get", "put"])
def test_hanging_store_costs_its_time_out_and_no_more(operation: str, fake: FakeBackend):
    with HiCacheSession(backend="kvcodec", extra=SHORT) as session:
        tokens = make_tokens(64, seed=6)
        if operation != "put":
            session.backup(tokens, seed=6)
            session.evict()
        until = time.monotonic() + 60

        def hang(called: str, _: Sequence[str]) -> None:
            while called == operation and time.monotonic() < until:
                time.sleep(0.01)

        fake.hook = hang
        start = time.monotonic()
        if operation == "put":
            session.backup(tokens, seed=6)
            session.evict()
        assert session.prefetch(tokens).storage_hit_tokens == 0
        assert time.monotonic() - start < 30  # the store would take 60
        until = 0.0


@pytest.mark.parametrize("operation", ["exists", "get", "put"])
def test_raising_store_is_a_miss_and_the_threads_live_on(operation: str, fake: FakeBackend):
    def fail(called: str, _: Sequence[str]) -> None:
        if called == operation:
            raise OSError("the disk is gone")

    with HiCacheSession(backend="kvcodec", extra=SHORT) as session:
        tokens = make_tokens(64, seed=6)
        if operation != "put":
            session.backup(tokens, seed=6)
        fake.hook = fail
        if operation == "put":
            session.backup(tokens, seed=6)
        session.evict()
        assert session.prefetch(tokens).storage_hit_tokens == 0
        fake.hook = lambda called, _: None
        session.evict()
        original = session.backup(tokens, seed=6)
        session.evict()
        result = session.prefetch(tokens)
        assert result.storage_hit_tokens == 64
        assert result.rows is not None
        assert result.rows.equals(original)


def test_bug_of_our_own_is_a_miss_and_the_threads_live_on(
    fake: FakeBackend, monkeypatch: pytest.MonkeyPatch
):
    from kvcodec.store import PageStore

    def bug(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    with HiCacheSession(backend="kvcodec", extra=SHORT) as session:
        tokens = make_tokens(64, seed=6)
        with monkeypatch.context() as patch:
            patch.setattr(PageStore, "backup", bug)
            session.backup(tokens, seed=6)
        session.evict()
        session.backup(tokens, seed=6)
        session.evict()
        with monkeypatch.context() as patch:
            patch.setattr(PageStore, "prefetch", bug)
            assert session.prefetch(tokens).storage_hit_tokens == 0
        session.evict()
        assert session.prefetch(tokens).storage_hit_tokens == 64
        counters = session.storage.counters()
    assert counters["sglang.batch_set_v1.raised"] == 1
    assert counters["sglang.batch_get_v1.raised"] == 1


def test_sglangs_own_failure_injector_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.5")
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY", "0.02")
    with HiCacheSession(
        backend="kvcodec", extra={"url": url_of(tmp_path), "preset": "raw"}
    ) as session:
        assert type(session.storage).__name__ == "HiCacheStorageFailureInjector"
        hits = set()
        for seed in range(8):
            tokens = make_tokens(64, seed=seed)
            original = session.backup(tokens, seed=seed)
            session.evict()
            result = session.prefetch(tokens)
            hits.add(result.storage_hit_tokens)
            if result.rows is not None:
                assert result.rows.equals(original.first(result.rows.token_count))
            session.evict()
    assert hits <= {0, 64}


def test_storage_can_be_detached_and_attached(tmp_path: Path):
    extra = {"url": url_of(tmp_path), "preset": "raw"}
    with HiCacheSession(backend=None) as session:
        tokens = make_tokens(64, seed=7)
        for _ in range(2):
            session.attach("kvcodec", extra)
            assert session.controller.page_get_func == session.controller._page_get_zero_copy
            original = session.backup(tokens, seed=7)
            session.evict()
            result = session.prefetch(tokens)
            assert result.storage_hit_tokens == 64
            assert result.rows is not None
            assert result.rows.equals(original)
            storage = session.storage
            session.detach()
            assert storage.batch_exists(["00"]) == 0
            session.evict()


def test_attaching_with_a_wrong_option_says_so_and_changes_nothing(tmp_path: Path):
    with HiCacheSession(backend=None) as session:
        with pytest.raises(RuntimeError, match=r"presett.*did you mean preset"):
            session.attach("kvcodec", {"url": url_of(tmp_path), "presett": "kv4"})
        assert session.storage is None
        session.attach("kvcodec", {"url": url_of(tmp_path), "preset": "kv4"})
        assert session.storage is not None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "'url'"),
        ({"url": "nowhere://"}, "nowhere"),
        ({"url": "memory://", "preset": "kv9"}, "kv9"),
        ({"url": "memory://", "preset": "kv8-channel", "q_group_size": 1}, "int8-channel"),
        ({"url": "memory://", "sink_tokens": 4}, "hicache_storage_pass_prefix_keys"),
        ({"url": "memory://", "tp_lcm_size": 4}, "tp_lcm_size"),
        ({"url": "memory://", "per_layer_config": {"77": {"nbits_key": 4}}}, "layer"),
    ],
)
def test_what_cannot_be_honoured_ends_the_start_up(extra: dict[str, object], message: str):
    session = HiCacheSession(backend="kvcodec", extra=extra)
    with pytest.raises(ValueError, match=message):
        session.__enter__()


def test_layer_table_is_refused_for_a_hybrid_model(tmp_path: Path):
    extra = {"url": url_of(tmp_path), "per_layer_config": {"1": {"nbits_key": 8}}}
    with pytest.raises(ValueError, match="swa"):
        HiCacheSession(kind="swa", backend="kvcodec", extra=extra).__enter__()


def test_first_and_last_pages_of_a_sequence_stay_raw(tmp_path: Path):
    extra = {
        "url": url_of(tmp_path),
        "preset": "kv4",
        "sink_tokens": 4,
        "residual_length": 20,
        "hicache_storage_pass_prefix_keys": True,
    }
    with HiCacheSession(backend="kvcodec", extra=extra) as session:
        tokens = make_tokens(8 * 16, seed=8)
        original = session.backup(tokens, seed=8)
        longer = [*tokens, *make_tokens(4 * 16, seed=9)]
        session.backup(longer, seed=8)
        session.evict()
        result = session.prefetch(tokens)
        counters = session.storage.counters()
    pages = [EncodedPage.parse(path.read_bytes()).header for path in page_files(tmp_path)]
    raw = [page.key for page in pages if not any(codec.bits for codec in page.codecs)]
    assert len(pages) == 12
    assert len(raw) == 1 + 2 + 2
    assert "sglang.position_unknown" not in counters
    assert result.rows is not None
    for name, after in result.rows.rows.items():
        same = (bits_of(after) == bits_of(original.rows[name])).all(axis=(0, 2, 3))
        exact = [bool(same[page * 16 : (page + 1) * 16].all()) for page in range(8)]
        assert exact == [True, *[False] * 5, True, True]


def test_scheduler_gets_its_metrics(tmp_path: Path):
    extra = {"url": url_of(tmp_path)}
    with HiCacheSession(backend="kvcodec", extra=extra, enable_metrics=True) as session:
        tokens = make_tokens(64, seed=10)
        session.storage.get_stats()
        seen: list[Any] = []
        take = session.storage.get_stats

        def spy() -> Any:
            seen.append(take())
            return seen[-1]

        session.storage.get_stats = spy
        session.backup(tokens, seed=10)
        session.evict()
        session.prefetch(tokens)
        session.pump(lambda: True, "metrics")
        seen.append(take())
    assert sum(sum(stats.backup_pgs) for stats in seen) == 4
    assert sum(sum(stats.prefetch_pgs) for stats in seen) == 4
    speeds = [
        speed for stats in seen for speed in stats.prefetch_bandwidth + stats.backup_bandwidth
    ]
    assert speeds
    assert all(speed > 0 for speed in speeds)


def test_clear_removes_these_pages_and_no_others(tmp_path: Path):
    tokens = make_tokens(64, seed=11)
    for model in ("one", "other"):
        with HiCacheSession(
            backend="kvcodec", extra={"url": url_of(tmp_path)}, served_model_name=model
        ) as session:
            session.backup(tokens, seed=11)
    assert len(page_files(tmp_path)) == 8
    with HiCacheSession(
        backend="kvcodec", extra={"url": url_of(tmp_path)}, served_model_name="one"
    ) as session:
        assert session.controller.clear_storage_backend()
        assert session.prefetch(tokens).storage_hit_tokens == 0
    models = {
        EncodedPage.parse(path.read_bytes()).header.identity.as_dict()["model"]
        for path in page_files(tmp_path)
    }
    assert models == {"other"}
    assert len(page_files(tmp_path)) == 4
