"""``kvcodec scrub``: what it has beyond ``kvcodec verify``, with which it shares the checking."""

from __future__ import annotations

import json
import threading
import time

import pytest
from cli_pages import (
    contents,
    fill,
    filled,
    flipped,
    make_page,
    namespace_of,
    put,
    run_json,
    run_text,
)
from fake_backend import FakeBackend
from hypothesis import given
from hypothesis import strategies as st

from kvcodec.backend import open_backend
from kvcodec.cli import scrub as scrub_module
from kvcodec.cli import stores, verification
from kvcodec.cli.crew import Pace, parse_rate
from kvcodec.cli.scrub import Position
from kvcodec.errors import BackendError, ConfigError

SPACE = namespace_of(0)


@pytest.fixture
def store(tmp_path) -> tuple[str, dict[str, bytes]]:
    url = f"file://{tmp_path}/store"
    return url, filled(url)


@pytest.fixture
def fake(monkeypatch) -> FakeBackend:
    backend = FakeBackend()
    backend.objects = {
        SPACE.object_name(key): make_page(key=key, namespace=SPACE) for key in "abcdefgh"
    }
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: backend)
    return backend


def reads_of(backend: FakeBackend) -> list[str]:
    """The names that are read from now on, in their order."""
    names: list[str] = []
    backend.hook = lambda operation, asked: names.extend(asked if operation == "get" else [])
    return names


def test_a_sound_store_is_fine(capsys, store):
    url, pages = store
    code, document, err = run_json(capsys, "scrub", url)
    assert (code, err) == (0, "")
    assert document.pop("seconds") >= 0
    assert document == {
        "url": url,
        "namespace": None,
        "rate_bytes_per_second": None,
        "state": None,
        "complete": True,
        "checked": 6,
        "sound": 6,
        "bad": 0,
        "unsupported": 0,
        "unread": 0,
        "unasked": 0,
        "gone": 0,
        "deleted": 0,
        "bytes_read": sum(map(len, pages.values())),
        "reasons": {},
        "pages": [],
    }
    assert "6 pages checked" in run_text(capsys, "scrub", url)[1]


def test_a_namespace_is_scrubbed_alone(capsys, store):
    url, _ = store
    _, document, _ = run_json(capsys, "scrub", url, "--namespace", SPACE.digest.hex())
    assert document["checked"] == 3


def test_damage_is_found_and_stays(capsys, store):
    url, pages = store
    name = next(iter(pages))
    fill(url, {name: flipped(pages[name], -1)})
    code, document, _ = run_json(capsys, "scrub", url)
    assert (code, document["bad"], document["deleted"]) == (2, 1, 0)
    assert name in contents(url)


def test_delete_bad_deletes(capsys, store):
    url, pages = store
    name = next(iter(pages))
    fill(url, {name: flipped(pages[name], -1)})
    code, out, _ = run_text(capsys, "scrub", url, "--delete-bad")
    assert code == 2 and "1 of 1 bad pages deleted" in out
    assert name not in contents(url)


def test_quarantine_keeps_what_was_bad(capsys, store, tmp_path):
    url, pages = store
    first, second, *_ = pages
    damaged = flipped(pages[first], -1)
    newer = bytearray(pages[second])
    newer[8] = 9
    fill(url, {first: damaged, second: bytes(newer)})
    (tmp_path / "bad").mkdir()
    code, out, _ = run_text(capsys, "scrub", url, "--quarantine", f"{tmp_path}/bad")
    assert code == 2 and "1 of 1 bad pages moved to quarantine" in out
    (kept,) = (tmp_path / "bad").iterdir()
    assert kept.name == first.replace("/", "-")
    assert kept.read_bytes() == damaged
    assert set(contents(url)) == set(pages) - {first}


def test_what_cannot_be_kept_is_not_deleted(capsys, store, tmp_path, monkeypatch):
    url, pages = store
    name = next(iter(pages))
    fill(url, {name: flipped(pages[name], -1)})
    (tmp_path / "bad" / f"{name.replace('/', '-')}").mkdir(parents=True)
    code, document, _ = run_json(capsys, "scrub", url, "--quarantine", f"{tmp_path}/bad")
    assert code == 4 and "stays in the store" in document["error"]["message"]
    assert name in contents(url)
    assert len(list((tmp_path / "bad").iterdir())) == 1


# --- state


def test_a_scrub_goes_on_where_it_stopped(capsys, fake, tmp_path):
    state = tmp_path / "state"
    names = sorted(fake.objects)
    reads = reads_of(fake)
    words = ["scrub", "fake://u:geheim@h", "--state", str(state), "--threads", "1"]

    def stop_at(at: int) -> None:
        def hook(operation, asked):
            if operation == "get" and asked[0] == names[at]:
                raise ConfigError("stop")
            reads.extend(asked if operation == "get" else [])

        fake.hook = hook

    stop_at(3)
    assert run_json(capsys, *words)[1]["error"]["message"] == "stop"
    assert reads == names[:3]
    assert json.loads(state.read_text())["after"] == names[2]
    assert "geheim" not in state.read_text()
    stop_at(5)
    run_json(capsys, *words)
    assert reads == names[:5]
    reads = reads_of(fake)
    code, document, _ = run_json(capsys, *words)
    assert (code, document["complete"], document["checked"]) == (0, True, 3)
    assert reads == names[5:]
    kept = json.loads(state.read_text())
    assert kept["after"] == "" and abs(kept["pass_finished_seconds"] - time.time()) < 60
    reads.clear()
    assert run_json(capsys, *words)[1]["checked"] == 8
    assert reads == names


def test_an_interrupted_scrub_keeps_its_place(capsys, fake, tmp_path):
    names = sorted(fake.objects)
    seen = threading.Semaphore(0)

    class Interrupted:
        def __init__(self, rate):
            self.count = 0

        def wait(self, stored_bytes, at_most_seconds):
            self.count += 1
            if self.count == 4:
                for _ in range(3):
                    seen.acquire()
                raise KeyboardInterrupt

    reads = []

    def hook(operation, asked):
        if operation == "get":
            reads.extend(asked)

    fake.hook = hook
    original = Position.finish

    def finish(self, index, answered):
        original(self, index, answered)
        seen.release()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scrub_module, "Pace", Interrupted)
        patch.setattr(Position, "finish", finish)
        words = ["scrub", "fake://", "--state", f"{tmp_path}/state"]
        code, document, _ = run_json(capsys, *words)
    assert (code, document["error"]["kind"]) == (130, "Interrupted")
    assert fake.closed
    assert sorted(reads) == names[:3]
    assert run_json(capsys, *words)[1]["checked"] == 5


def test_pages_of_a_store_that_went_away_are_read_again(capsys, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "MOST_FAILURES_IN_A_ROW", 3)
    names = sorted(fake.objects)
    get_into = fake.get_into

    def failing(asked, buffers, *, timeout_seconds):
        if asked[0] >= names[2]:
            return [BackendError("away")]
        return get_into(asked, buffers, timeout_seconds=timeout_seconds)

    monkeypatch.setattr(fake, "get_into", failing)
    words = ["scrub", "fake://", "--state", f"{tmp_path}/state", "--threads", "1"]
    code, document, _ = run_json(capsys, *words)
    assert (code, document["checked"], document["unread"], document["unasked"]) == (4, 2, 3, 6)
    assert document["complete"] is False
    monkeypatch.setattr(fake, "get_into", get_into)
    reads = reads_of(fake)
    code, document, _ = run_json(capsys, *words)
    assert (code, document["checked"]) == (0, 6)
    assert reads == names[2:]


def test_the_place_holds_though_its_page_is_gone(capsys, store, tmp_path):
    url, pages = store
    state = tmp_path / "state"
    names = sorted(pages)
    kept = {"version": 1, "url": url, "namespace": "", "after": names[2]}
    state.write_text(json.dumps(kept | {"pass_started_seconds": 1.0, "pass_finished_seconds": 0.0}))
    backend = open_backend(url)
    backend.delete([names[2]], timeout_seconds=5)
    backend.close()
    assert run_json(capsys, "scrub", url, "--state", str(state))[1]["checked"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no state of a scrub"),
        ("[]", "no state of a scrub"),
        ('{"version": 2}', "no state of a scrub"),
        ('{"version": 1, "url": "URL", "namespace": "", "colour": 1}', "no state of a scrub"),
        ('{"version": 1, "url": "URL", "namespace": "", "after": "x"}', "no state of a scrub"),
        ('{"version": 1, "url": "URL", "namespace": 3}', "no state of a scrub"),
        ('{"version": 1, "url": "file:///other", "namespace": ""}', "is of the scrub of"),
        ('{"version": 1, "url": "URL", "namespace": "%s"}' % ("0" * 32), "is of the scrub of"),
    ],
)
def test_a_state_of_something_else_is_refused(capsys, store, tmp_path, text, message):
    url, _ = store
    state = tmp_path / "state"
    state.write_text(text.replace("URL", url))
    code, document, _ = run_json(capsys, "scrub", url, "--state", str(state))
    assert code == 1 and message in document["error"]["message"]
    assert state.read_text() == text.replace("URL", url)


def test_a_state_that_cannot_be_written_is_an_error(capsys, store, tmp_path):
    code, document, _ = run_json(capsys, "scrub", store[0], "--state", f"{tmp_path}/no/state")
    assert code == 1 and "cannot be written" in document["error"]["message"]


def test_a_long_scrub_writes_its_state_now_and_then(capsys, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(scrub_module, "_SAVE_SECONDS", 0.0)
    names = sorted(fake.objects)
    found = []

    def hook(operation, asked):
        if operation == "get" and asked[0] == names[5]:
            found.append(json.loads((tmp_path / "state").read_text())["after"])

    fake.hook = hook
    run_json(capsys, "scrub", "fake://", "--state", f"{tmp_path}/state", "--threads", "1")
    assert found == [names[4]]


@given(st.permutations(range(8)), st.lists(st.booleans(), min_size=8, max_size=8))
def test_the_position_passes_what_is_finished_and_was_answered(order, answers):
    position = Position()
    for count, index in enumerate(order, 1):
        position.finish(index, answers[index])
        done = set(order[:count])
        prefix = next((at for at in range(8) if at not in done), 8)
        answered = [at + 1 for at in range(prefix) if answers[at]]
        assert position.done_count == max(answered, default=0)


# --- time


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 3)), min_size=1, max_size=40),
)
def test_a_rate_is_kept_over_any_time(rate, steps):
    clock = Clock()
    pace = Pace(rate, clock=clock, sleep=clock.sleep)
    moved = []
    for size, idle in steps:
        clock.now += idle
        pace.wait(size)
        moved.append((clock.now, size))
    for first in range(len(moved)):
        for last in range(first, len(moved)):
            seconds = moved[last][0] - moved[first][0]
            # All but the last have been paid for, but for a quarter of a second's worth.
            paid = sum(size for _, size in moved[first:last])
            assert paid <= rate * (seconds + 0.25) + 1e-6 * paid


def test_a_rate_costs_no_more_time_than_it_has_to():
    clock = Clock()
    pace = Pace(100, clock=clock, sleep=clock.sleep)
    for _ in range(11):
        pace.wait(100)
    assert clock.now - 100.0 == pytest.approx(10.0)


def test_no_rate_never_waits():
    Pace(None, sleep=lambda seconds: pytest.fail("slept")).wait(1 << 40)


@pytest.mark.parametrize(
    ("text", "rate"), [("", None), ("100MB/s", 10**8), ("1MiB", 1 << 20), ("5/s", 5)]
)
def test_a_rate_is_bytes_per_second(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["fast", "0", "-1MB/s", "1MB/h", "/s"])
def test_no_other_text_is_a_rate(text):
    with pytest.raises(ConfigError, match="--rate"):
        parse_rate(text)


def test_the_rate_holds_the_scrub_back(capsys, store):
    """Six pages of 13440 bytes: all but the last paid for, less what may be had at once."""
    started = time.monotonic()
    code, document, _ = run_json(capsys, "scrub", store[0], "--rate", "134400/s")
    assert (code, document["rate_bytes_per_second"], document["checked"]) == (0, 134400, 6)
    assert time.monotonic() - started >= 5 / 10 - 0.25


def test_max_seconds_ends_the_scrub(capsys, store, tmp_path):
    words = ["scrub", store[0], "--rate", "1kB/s", "--state", f"{tmp_path}/state"]
    started = time.monotonic()
    code, document, _ = run_json(capsys, *words, "--max-seconds", "0.3")
    assert time.monotonic() - started < 5
    assert (code, document["complete"], document["checked"], document["unasked"]) == (
        0,
        False,
        1,
        5,
    )
    code, out, _ = run_text(capsys, *words, "--max-seconds", "0.1")
    assert code == 0 and "4 pages are left: the next run goes on there" in out
    _, out, _ = run_text(capsys, "scrub", store[0], "--max-seconds", "0")
    assert "6 pages are left: --state FILE would go on there" in out


def test_timeout_and_threads_reach_the_store(capsys, fake, monkeypatch):
    timeouts = set()
    get_into = fake.get_into

    def noting(names, buffers, *, timeout_seconds):
        timeouts.add(timeout_seconds)
        return get_into(names, buffers, timeout_seconds=timeout_seconds)

    monkeypatch.setattr(fake, "get_into", noting)
    barrier = threading.Barrier(4, timeout=30)
    fake.hook = lambda operation, names: operation == "get" and barrier.wait()
    words = ["scrub", "fake://", "--timeout", "2.5", "--threads", "4"]
    assert run_json(capsys, *words)[0] == 0
    assert timeouts == {2.5}


def test_new_pages_are_found_by_the_next_pass(capsys, store, tmp_path):
    url, _ = store
    words = ["scrub", url, "--state", f"{tmp_path}/state"]
    run_json(capsys, *words)
    backend = open_backend(url)
    put(backend, SPACE.object_name("new"), flipped(make_page(key="new", namespace=SPACE), -1))
    backend.close()
    assert run_json(capsys, *words)[1]["bad"] == 1


def test_progress_goes_to_a_terminal(capsys, store, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "6 pages, 0 left, 0 bad" in run_json(capsys, "scrub", store[0])[2]


@pytest.mark.parametrize(
    "words",
    [
        ["scrub"],
        ["scrub", "memory://", "--rate", "fast"],
        ["scrub", "memory://", "--max-seconds", "-1"],
        ["scrub", "memory://", "--namespace", "x"],
        ["scrub", "memory://", "--quarantine", "/no/such/directory"],
        ["scrub", "memory://", "--quarantine", "/tmp", "--delete-bad"],
        ["scrub", "memory://nowhere"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_1(capsys, words):
    code, out, err = run_text(capsys, *words)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
