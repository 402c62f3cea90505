"""Real stores that fail in the middle of a batch, and what a page store makes of it.

Each scenario is a store and a switch: `fail` breaks it, `mend` repairs it. `run` calls a page store
again and again while the switch is thrown at a random moment of every call, and notes what counts:
pages that came back wrong, exceptions, and how long after its deadline a call ended.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from faulty_proxy import FaultyProxy
from server_juicefs import juicefs_volume
from server_redis import RedisServer

from kvcodec.backend import Backend, GetResult, PutResult, open_backend
from kvcodec.errors import BackendError
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.spec import CodecSpec
from kvcodec.store import PageStore, Pipeline, StoreOptions
from kvcodec_backends.memory import MemoryBackend

LAYOUT = PageLayout.mha(dtype=DType.BF16, token_count=16, layer_count=8, head_count=4, head_size=64)
NAMESPACE = Namespace(Identity.of(model="faults", tp_rank=0), LAYOUT)
PAGES = 48
EXISTS_SECONDS, PREFETCH_SECONDS, BACKUP_SECONDS = 0.25, 0.5, 0.5


@dataclass
class Scenario:
    """A store with a switch, which is thrown up to so many seconds after a call began."""

    backend: Backend
    fail: Callable[[], None]
    mend: Callable[[], None]
    delay_seconds: float = 0.02


@dataclass
class Outcome:
    """What became of all calls of one scenario."""

    calls: int = 0
    hits: int = 0
    misses: int = 0
    wrong_pages: int = 0
    exceptions: int = 0
    late_seconds: list[float] = field(default_factory=list)
    recovered: bool = False

    @property
    def latest(self) -> float:
        """Seconds after its deadline at which the worst call ended; below 0: all were in time."""
        return max(self.late_seconds)


def _random_rows(rng: np.random.Generator) -> list[np.ndarray]:
    shape = (PAGES, LAYOUT.layer_count, 4, 16, 64)
    values = (rng.standard_normal(shape).astype(np.float32) for _ in LAYOUT.streams)
    return [(value.view(np.uint32) >> 16).astype(np.uint16) for value in values]


class _Run:
    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario, self.random = scenario, random.Random(seed)
        options = StoreOptions(
            exists_timeout_seconds=EXISTS_SECONDS,
            prefetch_timeout_seconds=PREFETCH_SECONDS,
            backup_timeout_seconds=BACKUP_SECONDS,
            breaker_failures=0,  # every call shall meet the fault
        )
        self.pipeline = Pipeline(scenario.backend, options)
        self.store = PageStore(self.pipeline, NAMESPACE, CodecSpec())
        self.rows = _random_rows(np.random.default_rng(seed))
        self.views = PageViews.of_arrays(LAYOUT, self.rows)
        self.fresh_keys = 0
        self.keys = [f"{index:064x}" for index in range(PAGES)]
        self.outcome = Outcome()

    def call(self) -> None:
        """One prefetch or backup, and the fault in the middle of it."""
        operation = self.random.choice([self.prefetch, self.backup])
        started = threading.Event()
        delay = self.random.uniform(0, self.scenario.delay_seconds)

        def throw() -> None:
            started.wait()
            time.sleep(delay)
            self.scenario.fail()

        if not self.scenario.delay_seconds:
            self.scenario.fail()
        thrower = threading.Thread(target=throw)
        thrower.start()
        try:
            operation(started)
        except Exception:  # noqa: BLE001 - none may come; each is counted
            self.outcome.exceptions += 1
        self.outcome.calls += 1
        thrower.join()

    def prefetch(self, started: threading.Event) -> None:
        chosen = self.random.sample(range(PAGES), self.random.randint(1, PAGES))
        targets = [np.full((len(chosen), *rows.shape[1:]), 0x7F7F, np.uint16) for rows in self.rows]
        started.set()
        begin = time.monotonic()
        found = self.store.prefetch(
            [self.keys[index] for index in chosen], PageViews.of_arrays(LAYOUT, targets)
        )
        self._note(begin, PREFETCH_SECONDS, found)
        for place, (index, there) in enumerate(zip(chosen, found, strict=True)):
            pairs = zip(targets, self.rows, strict=True)
            same = all((target[place] == rows[index]).all() for target, rows in pairs)
            self.outcome.wrong_pages += there and not same

    def backup(self, started: threading.Event) -> None:
        keys = [f"{self.fresh_keys + index:032x}{index:032x}" for index in range(PAGES)]
        self.fresh_keys += 1 << 16
        started.set()
        begin = time.monotonic()
        stored = self.store.backup(keys, self.views)
        self._note(begin, EXISTS_SECONDS + BACKUP_SECONDS, stored)

    def _note(self, begin: float, deadline: float, found: Sequence[bool]) -> None:
        self.outcome.late_seconds.append(time.monotonic() - begin - deadline)
        self.outcome.hits += sum(found)
        self.outcome.misses += len(found) - sum(found)

    def recovers(self, seconds: float) -> bool:
        """Whether everything works again, without opening anything anew."""
        stop_at = time.monotonic() + seconds
        while time.monotonic() < stop_at:
            self.pipeline.io.replace_stuck(BACKUP_SECONDS)
            if all(self.store.backup(self.keys, self.views)) and self._all_back():
                return True
            time.sleep(0.05)
        return False

    def _all_back(self) -> bool:
        targets = [np.zeros_like(rows) for rows in self.rows]
        found = self.store.prefetch(self.keys, PageViews.of_arrays(LAYOUT, targets))
        return all(found) and all(
            np.array_equal(target, rows) for target, rows in zip(targets, self.rows, strict=True)
        )


def run(scenario: Scenario, calls: int, seed: int = 0) -> Outcome:
    """So many calls with a fault and a repair each, and a look at the store after all."""
    work = _Run(scenario, seed)
    try:
        assert work.recovers(20.0), "the store does not work to begin with"
        for _ in range(calls):
            work.call()
            scenario.mend()
        work.outcome.recovered = work.recovers(20.0)
    finally:
        scenario.mend()
        work.pipeline.close()
    return work.outcome


# --- scenarios


@contextmanager
def _proxied(directory: Path, rate: int | None) -> Iterator[Scenario]:
    with RedisServer(directory) as server, FaultyProxy("127.0.0.1", server.port) as proxy:

        def set_rate(value: int | None) -> Callable[[], None]:
            return lambda: setattr(proxy, "rate", value)

        fail = proxy.cut if rate is None else set_rate(rate)
        yield Scenario(open_backend(f"redis://127.0.0.1:{proxy.port}"), fail, set_rate(None))


@contextmanager
def black_hole(directory: Path) -> Iterator[Scenario]:
    """The network swallows everything from some moment on."""
    with _proxied(directory, 0) as scenario:
        yield scenario


@contextmanager
def ten_kilobytes_per_second(directory: Path) -> Iterator[Scenario]:
    """The store answers, byte by byte."""
    with _proxied(directory, 10_000) as scenario:
        yield scenario


@contextmanager
def connections_reset(directory: Path) -> Iterator[Scenario]:
    """All connections are reset in the middle of a batch; new ones work."""
    with _proxied(directory, None) as scenario:
        yield scenario


@contextmanager
def server_stopped(directory: Path) -> Iterator[Scenario]:
    """The server's process stands still; the kernel goes on taking connections for it."""
    with RedisServer(directory) as server:

        def send(number: signal.Signals) -> Callable[[], None]:
            return lambda: os.kill(server.pid, number)

        yield Scenario(open_backend(server.url), send(signal.SIGSTOP), send(signal.SIGCONT))


@contextmanager
def server_killed(directory: Path) -> Iterator[Scenario]:
    """The server is killed and started again, empty."""
    with RedisServer(directory) as server:

        def mend() -> None:
            if not server.is_running:
                server.start()

        yield Scenario(open_backend(server.url), server.kill, mend)


class _Flaky(MemoryBackend):
    """Three of ten answers are errors, and one call in twenty raises."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)
        self.fails = False

    def _spoil(self, results: list[GetResult]) -> list[GetResult]:
        if self.fails and self.random.random() < 0.05:
            raise OSError("broken")
        return [
            BackendError("broken") if self.fails and self.random.random() < 0.3 else result
            for result in results
        ]

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        results = super().put(names, objects, timeout_seconds=timeout_seconds)
        return [result for result in self._spoil(list(results)) if not isinstance(result, int)]

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        return self._spoil(super().get_into(names, buffers, timeout_seconds=timeout_seconds))


@contextmanager
def three_of_ten_fail(directory: Path) -> Iterator[Scenario]:
    """A store in this process: no real one can be made to fail at such a rate."""
    backend = _Flaky()

    def switch(value: bool) -> Callable[[], None]:
        return lambda: setattr(backend, "fails", value)

    yield Scenario(backend, switch(True), switch(False), delay_seconds=0.0)


@contextmanager
def disk_full(directory: Path, options: str = "max_bytes=12MB") -> Iterator[Scenario]:
    """Somebody else fills the disk, and frees it again."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m,mode=0700", "none", str(directory)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    ballast = directory / "ballast"

    def fill() -> None:
        with ballast.open("wb") as file:
            try:
                while file.write(bytes(1 << 18)):
                    pass
            except OSError:
                pass

    try:
        backend = open_backend(f"file://{directory}/store?{options}")
        yield Scenario(backend, fill, lambda: ballast.unlink(missing_ok=True))
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=False)


@contextmanager
def mount_killed(directory: Path) -> Iterator[Scenario]:
    """The process behind a JuiceFS mount is killed; an operator mounts again."""
    with juicefs_volume(directory) as volume, volume.mount() as mount:
        backend = open_backend(f"file://{mount.path}/store")

        def mend() -> None:
            if not mount.server.is_running:
                mount.mount_again()

        yield Scenario(backend, mount.server.kill, mend)


SCENARIOS = {
    "network swallows everything": black_hole,
    "store at 10 KB/s": ten_kilobytes_per_second,
    "connections reset": connections_reset,
    "server stopped": server_stopped,
    "server killed": server_killed,
    "3 of 10 answers are errors": three_of_ten_fail,
    "disk full": disk_full,
    "disk full, segments": partial(
        disk_full, options="engine=segments&max_bytes=16MiB&segment_bytes=4MiB"
    ),
    "JuiceFS mount killed": mount_killed,
}
