"""The worker pool of libkvcodec under threads, forks, cancellation and interpreter exit."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import native_pages as pages
import numpy as np
import pytest
from native_pages import Shape, make_plan, run

from kvcodec import native
from kvcodec.errors import NativeError
from kvcodec.layout import DType
from kvcodec.reference import from_float32
from kvcodec.spec import RAW, SectionCodec

CODEC = SectionCodec.integer(4, asymmetric=True, group_size=64)
SHAPE = Shape(dtype=DType.BF16, codecs=(CODEC,) * 6, head_count=4, token_count=32, head_size=128)

Rows = np.ndarray


@pytest.fixture
def pool() -> Iterator[native.Pool]:
    pool = native.Pool(2)
    yield pool
    pool.close()


def make_rows(seed: int, scale: float = 1.0) -> Rows:
    values = np.random.default_rng(seed).standard_normal(SHAPE.rows) * scale
    return from_float32(values.astype(np.float32), DType.BF16).astype(np.uint16)


# --- threads


def test_eight_threads_share_a_pool(pool: native.Pool):
    rows = [make_rows(seed) for seed in range(8)]
    plan = make_plan(SHAPE, rows[0])
    expected = [pages.encoded(pool, plan, array).tobytes() for array in rows]
    failures: list[str] = []

    def work(index: int) -> None:
        order = [index, (index + 1) % 8, (index + 2) % 8]
        for _ in range(20):
            targets = [np.zeros(plan.page_bytes, np.uint8) for _ in order]
            batch = pages.start(pool, native.ENCODE, plan, targets, [rows[i] for i in order])
            batch.wait()
            if [target.tobytes() for target in targets] != [expected[i] for i in order]:
                failures.append(f"encode in thread {index}")
            outs = [np.zeros_like(rows[0]) for _ in order]
            batch = pages.start(pool, native.DECODE, plan, targets, outs)
            while not batch.wait(0.001):
                pass
            if batch.status.any():
                failures.append(f"decode in thread {index}: {batch.status}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_batch_of_no_pages_is_done(pool: native.Pool):
    plan = make_plan(SHAPE, make_rows(0))
    batch = pages.start(pool, native.DECODE, plan, [], [])
    assert batch.wait(0)
    assert batch.status.tolist() == []


def test_threads_are_started_by_the_first_batch_and_named():
    def names() -> list[str]:
        tasks = [f"/proc/self/task/{task}/comm" for task in os.listdir("/proc/self/task")]
        found = []
        for task in tasks:
            with open(task) as file:
                found.append(file.read().strip())
        return sorted(name for name in found if name.startswith("kvcodec-"))

    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc")
    before = names()
    pool = native.Pool(3)
    assert names() == before
    rows = make_rows(0)
    plan = make_plan(SHAPE, rows)
    targets = [np.zeros(plan.page_bytes, np.uint8) for _ in range(8)]
    pages.start(pool, native.ENCODE, plan, targets, [rows] * 8).wait()
    started = names()
    for name in before:
        started.remove(name)
    assert started == ["kvcodec-0", "kvcodec-1", "kvcodec-2"]
    pool.close()
    assert names() == before


def test_signals_never_reach_a_worker(pool: native.Pool):
    """A handler of the process runs on threads that Python knows: workers have all blocked."""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc")
    rows = make_rows(0)
    pages.encoded(pool, make_plan(SHAPE, rows), rows)
    blocked = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/status") as file:
            fields = dict(
                line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line
            )
        if fields["Name"].startswith("kvcodec-"):
            blocked.append(int(fields["SigBlk"], 16))
    assert blocked
    for mask in blocked:
        assert mask >> (signal.SIGINT - 1) & 1
        assert mask >> (signal.SIGALRM - 1) & 1


def test_flush_to_zero_of_the_caller_does_not_reach_the_kernels():
    """A thread inherits the floating-point mode of the one that started it."""
    word, bits = {"x86_64": (7, 0x8040), "aarch64": (0, 1 << 24)}.get(platform.machine(), (0, 0))
    if not bits:
        pytest.skip("the floating-point environment of this machine is not known here")
    libm = ctypes.CDLL("libm.so.6")
    rows = make_rows(3, scale=1e-39)
    rows[0, 0, 0, :4] = [1, 2, 3, 0x8001]
    plan = make_plan(SHAPE, rows)
    results = []

    def work(flush: bool) -> None:
        environment = (ctypes.c_uint32 * 16)()
        libm.fegetenv(environment)
        environment[word] |= bits * flush
        libm.fesetenv(environment)
        assert (np.float32(1e-39) * np.float32(0.5) == 0) == flush
        pool = native.Pool(1)
        page = pages.encoded(pool, plan, rows)
        out = np.zeros_like(rows)
        run(pool, native.DECODE, plan, page, out)
        pool.close()
        results.append((page.tobytes(), out.tobytes()))

    for flush in (False, True):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(work, flush).result()
    assert results[0] == results[1]
    expected, _ = pages.reference_section(SHAPE, rows, 0)
    page = np.frombuffer(results[1][0], np.uint8)
    assert pages.section_of(plan, SHAPE, page, 0)[: len(expected)] == expected


# --- cancellation and waiting


@cache
def large_page() -> tuple[native.Plan, Rows, Rows]:
    shape = Shape(dtype=DType.U8, codecs=(RAW,), head_count=1, token_count=64, head_size=8192)
    rows = np.zeros(shape.rows, np.uint8)
    plan, pool = make_plan(shape, rows), native.Pool(1)
    page = pages.encoded(pool, plan, rows)
    pool.close()
    return plan, rows, page


def endless(pool: native.Pool, count: int = 3000) -> native.Batch:
    """A batch that takes much longer than a call."""
    plan, rows, page = large_page()
    return pages.start(pool, native.VERIFY, plan, [page] * count, [rows] * count)


def test_cancel_ends_a_batch_early(pool: native.Pool):
    batch = endless(pool)
    batch.cancel()
    assert batch.wait(10)
    status = batch.status
    assert set(status.tolist()) <= {native.OK, native.CANCELLED}
    assert status[-1] == native.CANCELLED


def test_result_of_a_running_batch_is_refused(pool: native.Pool):
    batch = endless(pool)
    with pytest.raises(NativeError, match="still running"):
        assert batch.status is None
    assert not batch.wait(0)
    batch.cancel()
    batch.wait()


def test_wait_keeps_its_deadline(pool: native.Pool):
    batch = endless(pool, 100_000)
    start = time.monotonic()
    assert not batch.wait(0.05)
    assert 0.04 < time.monotonic() - start < 5
    batch.cancel()
    batch.wait()


def test_batches_end_in_the_order_of_their_arrival():
    pool = native.Pool(1)
    first = endless(pool, 500)
    rows = make_rows(0)
    plan = make_plan(SHAPE, rows)
    page = np.zeros(plan.page_bytes, np.uint8)
    second = pages.start(pool, native.ENCODE, plan, [page], [rows])
    second.wait()
    assert first.wait(0)
    pool.close()


def test_dropped_batch_is_waited_for(pool: native.Pool):
    rows = make_rows(1)
    plan = make_plan(SHAPE, rows)
    expected = pages.encoded(pool, plan, rows)
    targets = [np.zeros(plan.page_bytes, np.uint8) for _ in range(32)]
    batch = pages.start(pool, native.ENCODE, plan, targets, [rows] * 32)
    del batch
    gc.collect()
    assert all(np.array_equal(target, expected) for target in targets)


def test_borrowed_memory_lives_as_long_as_the_batch_runs(pool: native.Pool):
    rows = make_rows(1)
    plan = make_plan(SHAPE, rows)
    # What other tests have left need not be looked through twenty times.
    gc.freeze()
    for _ in range(20):
        batch = pages.start(
            pool,
            native.ENCODE,
            plan,
            [np.zeros(plan.page_bytes, np.uint8) for _ in range(8)],
            [rows.copy() for _ in range(8)],
        )
        gc.collect()
        assert batch.wait()
        assert not batch.status.any()
    gc.unfreeze()


def test_close_finishes_what_was_submitted():
    pool = native.Pool(2)
    batch = endless(pool, 300)
    pool.close()
    assert batch.wait(0)
    assert not batch.status.any()
    pool.close()
    with pytest.raises(NativeError, match="closed"):
        endless(pool)


# --- fork and exit


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_at_any_moment_leaves_a_working_pool_on_both_sides(pool: native.Pool):
    """200 children, each forked while batches run; one that hangs is killed by its alarm."""
    rows = make_rows(2)
    plan = make_plan(SHAPE, rows)
    expected = pages.encoded(pool, plan, rows).tobytes()
    stop = threading.Event()

    def keep_busy() -> None:
        targets = [np.zeros(plan.page_bytes, np.uint8) for _ in range(4)]
        while not stop.is_set():
            pages.start(pool, native.ENCODE, plan, targets, [rows] * 4).wait()

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        for turn in range(200):
            running = endless(pool, 20)
            child = os.fork()
            if child == 0:
                signal.alarm(10)
                code = 1
                try:
                    code = int(pages.encoded(pool, plan, rows).tobytes() != expected)
                    if turn % 2:
                        pool.close()
                    del running
                finally:
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            assert status == 0, f"child {turn}: wait status {status}"
            assert running.wait(10)
    finally:
        stop.set()
        busy.join()
    assert pages.encoded(pool, plan, rows).tobytes() == expected


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_batch_of_the_parent_is_lost_to_the_child(pool: native.Pool):
    batch = endless(pool, 100_000)
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            batch.wait()
        except NativeError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    batch.cancel()
    assert batch.wait(10)


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "del batch",
        "batch.wait()",
        "pool.close()",
        "import sys; sys.exit(0)",
        "threading.Thread(target=for_ever, daemon=True).start(); time.sleep(0.05)",
    ],
)
def test_interpreter_ends_cleanly_while_a_batch_runs(ending: str):
    code = """
        import sys, threading, time
        import numpy as np
        import native_pages as pages
        from kvcodec import native
        from kvcodec.layout import DType
        from kvcodec.spec import SectionCodec

        shape = pages.Shape(dtype=DType.BF16, codecs=(SectionCodec.integer(4),) * 4,
                            head_count=8, token_count=64, head_size=128)
        rows = np.zeros(shape.rows, np.uint16)
        plan = pages.make_plan(shape, rows)
        pool = native.Pool(2)

        def begin():
            return pages.start(pool, native.ENCODE, plan,
                               [np.zeros(plan.page_bytes, np.uint8) for _ in range(100)],
                               [rows.copy() for _ in range(100)])

        def for_ever():
            while True:
                begin()

        batch = begin()
    """
    here = os.path.dirname(__file__)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])}
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(code) + ending],
        env=env,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (result.returncode, result.stderr) == (0, "")
