"""The probe of the store, the page it uses, and a store that shows some namespaces only."""

from __future__ import annotations

import json
import threading
import time
from urllib.parse import quote

import pytest
from server_redis import RedisServer
from sidecar_process import SidecarProcess
from waiting import wait_until

from kvcodec.backend import open_backend
from kvcodec.errors import BackendError, BackendFull, BackendReadOnly, ConfigError
from kvcodec.format import EncodedPage
from kvcodec_backends import tier as tier_module
from kvcodec_server import health
from kvcodec_server.health import Health, Probe, canary_page
from kvcodec_server.namespaces import ServedNamespaces

OK = {"write": "ok", "read": "ok", "delete": "ok"}


@pytest.fixture
def store():
    store = open_backend("memory://")
    yield store
    store.close()


class Strange:
    """A store that does at one verb what the test wants."""

    def __init__(self, store, **verbs):
        self._store = store
        self._verbs = verbs

    def __getattr__(self, name):
        return self._verbs.get(name) or getattr(self._store, name)


class TestProbe:
    def test_store_that_works_is_well_and_left_empty(self, store):
        probe = Probe(store, 0)
        assert probe.is_well is None and probe.seconds is None
        assert probe.once() == OK
        assert probe.is_well is True and probe.seconds >= 0
        assert list(store.list()) == []
        assert probe.once() == OK

    @pytest.mark.parametrize(
        ("verb", "answer", "results"),
        [
            ("put", [BackendFull("full")], {"write": "full", "read": "ok", "delete": "ok"}),
            ("put", [BackendReadOnly("ro")], {"write": "read_only", "read": "ok", "delete": "ok"}),
            ("get_into", [BackendError("x")], {"write": "ok", "read": "error", "delete": "ok"}),
            ("get_into", [None], {"write": "ok", "read": "missing", "delete": "ok"}),
            ("get_into", [512], {"write": "ok", "read": "damaged", "delete": "ok"}),
            ("delete", [False], {"write": "ok", "read": "ok", "delete": "missing"}),
        ],
    )
    def test_each_fault_is_told_by_its_step(self, store, verb, answer, results):
        probe = Probe(Strange(store, **{verb: lambda *_, **__: answer}), 0)
        assert probe.once() == results
        assert probe.is_well is False

    def test_store_that_raises_is_not_well(self, store):
        def put(*_, **__):
            raise RuntimeError("a bug")

        assert Probe(Strange(store, put=put), 0).once()["write"] == "raised"

    def test_store_that_hangs_is_not_waited_for(self, store, monkeypatch):
        """And many probes of it hang in few threads."""
        monkeypatch.setattr(health, "_PROBE_SECONDS", 0.05)
        release = threading.Event()
        before = threading.active_count()
        probe = Probe(Strange(store, put=lambda *_, **__: release.wait() and [None]), 0)
        started = time.monotonic()
        for _ in range(10):
            assert probe.once()["write"] == "timeout"
        assert time.monotonic() - started < 10 * 3 * 0.05 + 10
        assert threading.active_count() <= before + 4
        release.set()
        probe.close()

    def test_probes_come_by_themselves(self, store):
        asked = threading.Semaphore(0)

        def put(*arguments, **options):
            asked.release()
            return store.put(*arguments, **options)

        probe = Probe(Strange(store, put=put), 0.01)
        probe.start()
        for _ in range(3):
            assert asked.acquire(timeout=20)
        probe.close()

    def test_never_means_never(self, store):
        probe = Probe(store, 0)
        probe.start()
        time.sleep(0.1)
        assert probe.is_well is None

    def test_page_is_sound_and_nobody_elses(self):
        name, page = canary_page()
        parsed = EncodedPage.parse(page)
        assert dict(parsed.header.identity.fields)["kvcodec"] == "canary"
        assert canary_page()[0] != name


class TestStoreBehindMemory:
    """What memory in front of a store answers says nothing about the store."""

    @pytest.mark.parametrize("mode", ["write_through", "write_back"])
    def test_store_that_stops_is_noticed(self, tmp_path, mode):
        with RedisServer(tmp_path) as redis:
            store = quote(f"{redis.url}/0")
            settings = {
                "store.url": f"tier+ram://?bytes=1MiB&mode={mode}&store={store}",
                "health.probe_seconds": "0.2",
            }
            with SidecarProcess(tmp_path, settings) as sidecar:
                wait_until(lambda: sidecar.metric("kvcodec_store_up") == 1)
                assert redis.cli("dbsize").strip() == b"0"
                lookups = 'kvcodec_tier_lookups_total{result="hit"}'
                redis.stop()
                wait_until(lambda: "kvcodec_store_up 0" in sidecar.get("/metrics")[1])
                assert sidecar.metric(lookups) == 0
                steps = json.loads(sidecar.get("/readyz")[1])["store"]
                assert {"write", "read"} <= set(steps)  # what is not there need not go
                redis.start()
                wait_until(lambda: sidecar.metric("kvcodec_store_up") == 1)

    def test_page_that_cannot_be_read_back_is_noticed(self, store, monkeypatch):
        broken = Strange(store, get_into=lambda *_, **__: [BackendError("unreadable")])
        broken.origin = broken
        monkeypatch.setattr(tier_module, "open_backend", lambda *_, **__: broken)
        front = tier_module.TierBackend.from_url("tier+ram://?bytes=1MiB&store=fake://")
        assert Probe(front, 0).once() == OK  # what memory would have said
        assert Probe(front.origin, 0).once() == OK | {"read": "error"}
        front.close()


class TestPhases:
    def test_ready_only_while_serving(self):
        state = Health(("a.Service",))
        assert (state.phase, state.is_ready) == ("starting", False)
        state.serve()
        assert state.is_ready
        state.drain()
        assert (state.phase, state.is_ready) == ("draining", False)


class TestNamespaces:
    """`ServedNamespaces`; that it changes nothing else is the conformance suite's to say."""

    SERVED, OTHER = "a" * 32, "b" * 32

    @pytest.fixture
    def shown(self, store):
        for digest in (self.SERVED, self.OTHER):
            store.put([self.name(digest)], [memoryview(b"page")], timeout_seconds=1)
        return ServedNamespaces(store, [self.SERVED])

    def name(self, digest, number=0):
        return f"{digest}/{number:064x}"

    def test_objects_of_others_are_not_there(self, shown):
        names = [self.name(self.OTHER), self.name(self.SERVED)]
        buffers = [memoryview(bytearray(4)), memoryview(bytearray(4))]
        assert shown.exists(names, timeout_seconds=1) == [False, True]
        assert shown.get_into(names, buffers, timeout_seconds=1) == [None, 4]
        assert bytes(buffers[0]) == bytes(4) and bytes(buffers[1]) == b"page"
        assert [info.name for info in shown.list()] == [names[1]]
        assert list(shown.list(self.OTHER)) == []
        assert shown.stat(names[0], timeout_seconds=1) is None
        assert shown.stat(names[1], timeout_seconds=1) is not None
        assert shown.exists_prefix(names[::-1], timeout_seconds=1) == 1
        assert shown.exists_prefix(names, timeout_seconds=1) == 0

    def test_objects_of_others_cannot_be_made_or_removed(self, shown, store):
        names = [self.name(self.OTHER), self.name(self.SERVED), self.name(self.OTHER, 1)]
        answers = shown.put(names, [memoryview(b"new!")] * 3, timeout_seconds=1)
        assert [isinstance(answer, BackendReadOnly) for answer in answers] == [True, False, True]
        assert shown.delete(names, timeout_seconds=1) == [False, True, False]
        assert store.exists(names, timeout_seconds=1) == [True, False, False]
        buffer = memoryview(bytearray(4))
        store.get_into(names[:1], [buffer], timeout_seconds=1)
        assert bytes(buffer) == b"page"

    def test_it_has_no_url(self):
        with pytest.raises(ConfigError, match=r"store\.namespaces"):
            ServedNamespaces.from_url("x://")
