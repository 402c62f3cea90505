"""Sidecars that stop, die and hang, and clients that do: nobody waits, and no page is wrong."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial

import grpc
import numpy as np
import pytest
from faulty_proxy import FaultyProxy
from pages import Case
from server_sidecar import HANGS, HANGS_SECONDS, RAISES, STOPS_READING, STOPS_WRITING, Sidecar
from sidecar_process import is_open
from waiting import SLACK_SECONDS, wait_until

from kvcodec.backend import Deadline
from kvcodec.errors import BackendError, BackendTimeout
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.pipeline import Pipeline, StoreOptions
from kvcodec.spec import CodecSpec
from kvcodec.store import PageStore
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_proto.v1.service_pb2_grpc import PageServiceStub
from kvcodec_server.client import SidecarBackend

NAMESPACE = "5" * 32
SIZE = 100_000
RESTARTS = 30 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 5


def name(end: str = "", number: int | None = None) -> str:
    """A name of nobody else's, that a strange store knows by its end."""
    middle = os.urandom(30).hex() if number is None else f"{number:060x}"
    return f"{NAMESPACE}/{middle}{end or '0000'}"


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sidecar")
    with Sidecar(directory, "strange+memory://", breaker_failures=0) as server:
        yield server


@pytest.fixture
def backend(sidecar):
    backend = SidecarBackend.from_url(sidecar.unix_url + "?region_bytes=64MiB")
    yield backend
    backend.close()


def stats(sidecar: Sidecar) -> pb.StatsResponse:
    with grpc.insecure_channel(f"127.0.0.1:{sidecar.port}") as channel:
        return PageServiceStub(channel).Stats(pb.StatsRequest(), timeout=10)


def is_stopped(sidecar: Sidecar) -> bool:
    with open(f"/proc/{sidecar.pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "T"


@contextmanager
def going_on(sidecar: Sidecar):
    """A stopped sidecar goes on afterwards, whatever happens."""
    try:
        yield
    finally:
        os.kill(sidecar.pid, signal.SIGCONT)


# A copy that is stopped in its middle


def test_memory_that_a_stopped_sidecar_may_write_to_is_not_idle(sidecar, backend):
    there = name(STOPS_READING)
    assert backend.put([there], [memoryview(b"x" * SIZE)], timeout_seconds=5) == [None]
    lent, other = backend.staging_memory(SIZE), backend.staging_memory(SIZE)
    with going_on(sidecar):
        started = time.monotonic()
        (result,) = backend.get_into([there], [lent], timeout_seconds=1.5)
        assert time.monotonic() - started < 1.5 + SLACK_SECONDS
        assert isinstance(result, BackendTimeout)
        wait_until(lambda: is_stopped(sidecar))
        assert not backend.is_idle(lent)
        assert not backend.is_idle(lent[SIZE // 2 :])
        assert backend.is_idle(other)
    wait_until(lambda: backend.is_idle(lent))
    # Now it is ours alone, for good.
    lent[:] = b"\x11" * SIZE
    time.sleep(0.4)
    assert bytes(lent) == b"\x11" * SIZE
    assert backend.counters()["calls_in_doubt"] == 1


def test_staging_memory_let_go_while_in_doubt_is_lent_to_nobody(sidecar, backend):
    there = name(STOPS_READING)
    backend.put([there], [memoryview(b"x" * SIZE)], timeout_seconds=5)
    lent = backend.staging_memory(40 << 20)
    with going_on(sidecar):
        backend.get_into([there], [lent[:SIZE]], timeout_seconds=1.5)
        wait_until(lambda: is_stopped(sidecar))
        del lent
        assert backend.staging_memory(40 << 20) is None
    wait_until(lambda: backend.staging_memory(40 << 20) is not None)


def test_a_put_that_is_stopped_stores_one_object_or_none(sidecar, backend):
    there = name(STOPS_WRITING)
    memory = bytearray(b"a" * SIZE)
    with going_on(sidecar):
        (result,) = backend.put([there], [memoryview(memory)], timeout_seconds=1.5)
        assert isinstance(result, BackendTimeout)
        # The caller's memory is its own again, and so is every other part of the region.
        memory[:] = b"b" * SIZE
        others = [bytearray(b"c" * SIZE) for _ in range(100)]
        backend.put(
            [name() for _ in others], [memoryview(other) for other in others], timeout_seconds=0.5
        )
    wait_until(lambda: backend.exists([there], timeout_seconds=5) == [True])
    buffer = bytearray(SIZE)
    assert backend.get_into([there], [memoryview(buffer)], timeout_seconds=5) == [SIZE]
    assert buffer == b"a" * SIZE


def test_no_page_is_wrong_while_a_sidecar_stops_in_the_middle_of_copies(sidecar):
    """Engine and pipeline as they are: staging buffers are used again and again meanwhile."""
    layout = PageLayout.mha(
        dtype=DType.BF16, token_count=16, layer_count=4, head_count=2, head_size=64
    )
    case = Case(name="stopped", layout=layout, spec="kv4")
    keys = [f"{number:064x}" for number in range(40)]
    bad = next(
        key
        for key in (f"{number:064x}" for number in range(10**9))
        if case.namespace.object_name(key).endswith(STOPS_READING)
    )
    rows = [np.stack([array] * (len(keys) + 1)) for array in case.rows()]
    views = PageViews.of_arrays(layout, rows)
    url = sidecar.unix_url + "?region_bytes=4MiB"
    options = StoreOptions(
        buffer_bytes=1 << 20,
        exists_timeout_seconds=2,
        prefetch_timeout_seconds=1.5,
        breaker_failures=0,
    )
    pipeline = Pipeline(SidecarBackend.from_url(url), options)
    store = PageStore(pipeline, case.namespace, CodecSpec.parse("kv4"))
    store.chunk_pages = 4
    assert all(store.backup([*keys, bad], views))
    target = [np.zeros_like(array) for array in rows]
    decoded = PageViews.of_arrays(layout, target)
    wait_until(lambda: all(store.prefetch(keys, decoded.select(range(len(keys))))))
    right = [array.copy() for array in target]
    for _ in range(2):
        with going_on(sidecar):
            results = store.prefetch([bad, *keys], decoded)
            wait_until(lambda: is_stopped(sidecar))
            assert not results[0]
        # It goes on, and writes on, while these are read through the same few buffers.
        stop_at = time.monotonic() + 0.5
        while time.monotonic() < stop_at:
            for array in target:
                array[:] = 0
            found = store.prefetch(keys, decoded.select(range(len(keys))))
            for array, wanted in zip(target, right, strict=True):
                for index in np.flatnonzero(found):
                    assert np.array_equal(array[index], wanted[index])
    assert not [counter for counter in pipeline.counters() if "corrupt" in counter]
    assert pipeline.counters()["backend.calls_in_doubt"] >= 2
    pipeline.close()


# A sidecar that dies


def test_memory_is_idle_once_its_sidecar_is_dead(sidecar, backend):
    there = name(STOPS_READING)
    backend.put([there], [memoryview(b"x" * SIZE)], timeout_seconds=5)
    lent = backend.staging_memory(SIZE)
    with going_on(sidecar):
        backend.get_into([there], [lent], timeout_seconds=1.5)
        wait_until(lambda: is_stopped(sidecar))
        assert not backend.is_idle(lent)
        sidecar.kill()
        wait_until(lambda: backend.is_idle(lent))
        sidecar.start()


@pytest.mark.parametrize("door", ["unix_url", "url"])
def test_a_restarted_sidecar_is_used_again_soon(sidecar, door):
    backend = SidecarBackend.from_url(getattr(sidecar, door))
    data, buffer = memoryview(b"data"), memoryview(bytearray(4))
    there = name()
    assert backend.put([there], [data], timeout_seconds=5) == [None]
    sidecar.kill()
    for _ in range(20):
        started = time.monotonic()
        (put,) = backend.put([there], [data], timeout_seconds=10)
        (got,) = backend.get_into([there], [buffer], timeout_seconds=10)
        assert isinstance(put, BackendError)
        assert isinstance(got, BackendError)
        assert backend.exists([there], timeout_seconds=10) == [False]
        with pytest.raises(BackendError):
            backend.stat(there, timeout_seconds=10)
        assert time.monotonic() - started < 8, "a dead sidecar costs no deadline"
        time.sleep(0.05)
    sidecar.start()
    # Well under a second where nothing else runs; a loaded machine may add to that.
    wait_until(lambda: backend.put([there], [data], timeout_seconds=1) == [None], seconds=10)
    backend.close()


@pytest.mark.parametrize("door", ["unix_url", "url"])
def test_a_sidecar_may_be_restarted_again_and_again(tmp_path, door):
    """Under load: engines go on asking while it is away, which gRPC alone does not take well."""
    with Sidecar(tmp_path, "memory://") as sidecar:
        backend = SidecarBackend.from_url(getattr(sidecar, door))
        data, there, took = memoryview(b"data"), name(), []
        ending = threading.Event()

        def ask() -> None:
            while not ending.wait(0.01):
                backend.exists([there], timeout_seconds=2)

        asking = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
        for thread in asking:
            thread.start()
        for _ in range(RESTARTS):
            sidecar.kill()
            sidecar.start()
            wait_until(lambda: is_open(sidecar.port))
            put = partial(backend.put, [there], [data], timeout_seconds=1)
            took.append(wait_until(lambda: put() == [None], seconds=20))  # noqa: B023 - at once
        ending.set()
        for thread in asking:
            thread.join()
        backend.close()
    assert statistics.median(took) < 2, took


def test_a_refused_call_keeps_its_connection(tmp_path):
    """Who opens another each time makes a crowd larger."""
    with (
        Sidecar(tmp_path, "memory://", max_streams=1) as sidecar,
        grpc.insecure_channel(f"127.0.0.1:{sidecar.port}") as channel,
    ):
        held = PageServiceStub(channel).PutStream.future(iter(lambda: time.sleep(9), 0))
        wait_until(lambda: stats(sidecar).calls == 2)
        backend, buffer = SidecarBackend.from_url(sidecar.url), memoryview(bytearray(9))
        door, connections = backend._opened(), set()
        line = door._line
        for _ in range(5):
            (answer,) = backend.get_into([name()], [buffer], timeout_seconds=20)
            assert "max_streams" in str(answer)
            (answer,) = backend.put([name()], [memoryview(bytes(9 << 20))], timeout_seconds=20)
            assert "max_streams" in str(answer)
            connections |= {call for _, call in door._idle}
        assert door._line is line
        assert len(connections) == 1
        backend.close()
        held.cancel()


@pytest.mark.parametrize("greedy", [True, False])
def test_a_client_of_many_connections_crowds_itself(tmp_path, greedy):
    """They count as one where it says so, and ours does: another of the same host is let in."""
    with Sidecar(tmp_path, "memory://", max_streams=3) as sidecar:
        backend, buffer = SidecarBackend.from_url(sidecar.url), memoryview(bytearray(9))
        own = dict(backend._opened().stub(Deadline(5))[1])["kvcodec-client"]
        channels = [grpc.insecure_channel(f"127.0.0.1:{sidecar.port}") for _ in range(3)]
        held = [
            PageServiceStub(channel).PutStream.future(
                iter(lambda: time.sleep(9), 0),
                metadata=[("kvcodec-client", "greedy" if greedy else str(number))],
            )
            for number, channel in enumerate(channels)
        ]
        wait_until(lambda: stats(sidecar).calls == 4)
        (answer,) = backend.get_into([name()], [buffer], timeout_seconds=20)
        if greedy:
            assert answer is None
        else:
            assert "max_streams" in str(answer)
        assert len(own) == 16
        backend.close()
        for call, channel in zip(held, channels, strict=True):
            call.cancel()
            channel.close()


def test_a_client_opened_before_its_sidecar_finds_it_later(tmp_path):
    early = Sidecar(tmp_path, "memory://")
    backend = SidecarBackend.from_url(early.unix_url)
    (answer,) = backend.put([name()], [memoryview(b"data")], timeout_seconds=1)
    assert type(answer) is BackendError
    with early:
        wait_until(lambda: backend.put([name()], [memoryview(b"d")], timeout_seconds=1) == [None])
        early.stop()  # as an operator does it
        (answer,) = backend.put([name()], [memoryview(b"data")], timeout_seconds=1)
        assert type(answer) is BackendError
    backend.close()


# Clients that die


CLIENT = """
import os, sys, time
from kvcodec_server.client import SidecarBackend
backend = SidecarBackend.from_url(sys.argv[1] + "?region_bytes=32MiB")
memory = backend.staging_memory(16 << 20)
memory[:] = b"x" * len(memory)
name = "6" * 32 + "/" + "0" * 60 + sys.argv[2]
print(backend.put([name], [memory], timeout_seconds=5), flush=True)
backend.get_into([name], [memory], timeout_seconds=1.0)
print("here", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("end", ["0000", HANGS])
def test_a_killed_client_leaves_nothing_behind(sidecar, end):
    """Even where the store still reads into its memory: then when it is done."""
    before = stats(sidecar)
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, sidecar.unix_url, end], stdout=subprocess.PIPE, text=True
    )
    assert client.stdout.readline() == "[None]\n"
    assert client.stdout.readline() == "here\n"
    during = stats(sidecar)
    assert during.sessions == before.sessions + 1
    assert during.region_bytes == before.region_bytes + (32 << 20)
    client.kill()
    client.wait()
    if end == HANGS:
        time.sleep(0.5)
        assert stats(sidecar).region_bytes == during.region_bytes
    wait_until(
        lambda: (
            (stats(sidecar).sessions, stats(sidecar).region_bytes)
            == (before.sessions, before.region_bytes)
        ),
        seconds=HANGS_SECONDS + 20,
    )


# A store that hangs, or raises


@pytest.mark.parametrize("door", ["unix_url", "url"])
def test_a_store_that_hangs_holds_up_its_own_call_alone(sidecar, door):
    backend = SidecarBackend.from_url(getattr(sidecar, door))
    there, other = name(HANGS), name()
    data = memoryview(b"d" * SIZE)
    assert backend.put([there, other], [data, data], timeout_seconds=5) == [None, None]
    results = []

    def hang() -> None:
        buffer = memoryview(bytearray(SIZE))
        started = time.monotonic()
        (result,) = backend.get_into([there], [buffer], timeout_seconds=0.5)
        results.append((time.monotonic() - started, result))

    threads = [threading.Thread(target=hang) for _ in range(3)]
    for thread in threads:
        thread.start()
    buffer = memoryview(bytearray(SIZE))
    for _ in range(10):
        assert backend.get_into([other], [buffer], timeout_seconds=5) == [SIZE]
    for thread in threads:
        thread.join()
    for seconds, result in results:
        assert seconds < HANGS_SECONDS - 1
        assert isinstance(result, BackendTimeout)
    backend.close()
    # The calls end in the store before the next test begins.
    time.sleep(HANGS_SECONDS - 0.5)


@pytest.mark.parametrize("door", ["unix_url", "url"])
def test_a_store_that_raises_is_an_error_of_the_store(sidecar, door):
    backend = SidecarBackend.from_url(getattr(sidecar, door))
    (result,) = backend.get_into([name(RAISES)], [memoryview(bytearray(9))], timeout_seconds=5)
    assert type(result) is BackendError
    assert stats(sidecar).counters["get.raised"] >= 1
    backend.close()


# A network that forgets


@pytest.mark.parametrize("call", ["put", "get", "exists"])
def test_a_connection_that_was_forgotten_costs_one_deadline(sidecar, call):
    """Half-open: what was sent on it is gone, and nobody says so; new connections work."""
    with FaultyProxy("127.0.0.1", sidecar.port) as proxy:
        backend = SidecarBackend.from_url(f"sidecar://127.0.0.1:{proxy.port}")
        there, buffer = name(), memoryview(bytearray(4))
        assert backend.put([there], [memoryview(b"data")], timeout_seconds=5) == [None]
        proxy.rate = 0
        calls = {
            "put": lambda: backend.put([there], [memoryview(b"data")], timeout_seconds=1.0),
            "get": lambda: backend.get_into([there], [buffer], timeout_seconds=1.0),
            "exists": lambda: backend.exists([there], timeout_seconds=1.0),
        }
        started = time.monotonic()
        (answer,) = calls[call]()
        assert answer is False or isinstance(answer, BackendTimeout)
        assert time.monotonic() - started < 1.0 + SLACK_SECONDS
        proxy.forget()
        started = time.monotonic()
        assert backend.get_into([there], [buffer], timeout_seconds=30) == [4]
        assert time.monotonic() - started < SLACK_SECONDS
        backend.close()
