"""``kvcodec copy``."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cli_pages import (
    Dated,
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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from waiting import wait_until

from kvcodec.backend import ObjectInfo, open_backend
from kvcodec.cli import main, stores, verification
from kvcodec.errors import BackendError, BackendFull

SPACE = namespace_of(0)
NAMES = [SPACE.object_name(key) for key in "abcdefgh"]


@pytest.fixture
def source(tmp_path) -> tuple[str, dict[str, bytes]]:
    url = f"file://{tmp_path}/source"
    return url, filled(url)


@pytest.fixture
def target(tmp_path) -> str:
    return f"file://{tmp_path}/target"


@pytest.fixture
def fakes(monkeypatch) -> tuple[Dated, Dated]:
    """fake://source with eight pages, and fake://target."""
    both = {"fake://source": Dated(), "fake://target": Dated()}
    both["fake://source"].objects = {
        name: make_page(key=key, namespace=SPACE)
        for name, key in zip(NAMES, "abcdefgh", strict=True)
    }
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: both[url])
    return both["fake://source"], both["fake://target"]


FAKES = ["copy", "fake://source", "fake://target"]


def test_a_store_is_copied(capsys, source, target):
    url, pages = source
    code, document, err = run_json(capsys, "copy", url, target)
    assert (code, err) == (0, "")
    assert document.pop("seconds") >= 0
    assert document == {
        "source": url,
        "target": target,
        "namespace": None,
        "verify": True,
        "overwrite": False,
        "copied": 6,
        "copied_bytes": sum(map(len, pages.values())),
        "skipped": 0,
        "skipped_bytes": 0,
        "gone": 0,
        "bad": 0,
        "unsupported": 0,
        "unread": 0,
        "unwritten": 0,
        "unasked": 0,
        "reasons": {},
        "pages": [],
    }
    assert contents(target) == contents(url) == pages


def test_between_kinds_of_stores(capsys, source):
    url, pages = source
    name = "memory://copy-of-a-store"
    keeper = open_backend(name)
    assert "6 pages copied" in run_text(capsys, "copy", url, name)[1]
    assert contents(name) == pages
    keeper.close()


def test_what_is_there_is_not_copied_again(capsys, source, target):
    url, pages = source
    names = list(pages)
    fill(target, {names[0]: pages[names[0]], names[1]: pages[names[1]][:-1]})
    _, document, _ = run_json(capsys, "copy", url, target)
    assert (document["copied"], document["skipped"]) == (5, 1)
    assert document["skipped_bytes"] == len(pages[names[0]])
    assert contents(target) == pages
    code, out, _ = run_text(capsys, "copy", url, target)
    assert code == 0
    assert "0 pages copied" in out and "6 were there already" in out


def test_overwrite_replaces_what_is_there(capsys, source, target):
    url, pages = source
    fill(target, {name: flipped(page, -1) for name, page in pages.items()})
    run_json(capsys, "copy", url, target)
    assert contents(target) != pages
    _, document, _ = run_json(capsys, "copy", url, target, "--overwrite")
    assert (document["copied"], document["skipped"]) == (6, 0)
    assert contents(target) == pages


def test_other_pages_of_the_target_stay(capsys, source, target):
    url, pages = source
    other = {namespace_of(7).object_name("x"): b"other"}
    fill(target, other)
    run_json(capsys, "copy", url, target)
    assert contents(target) == pages | other


def test_a_namespace_is_copied_alone(capsys, source, target):
    url, pages = source
    run_json(capsys, "copy", url, target, "--namespace", SPACE.digest.hex())
    wanted = {name: page for name, page in pages.items() if name[:32] == SPACE.digest.hex()}
    assert contents(target) == wanted and len(wanted) == 3


def test_damage_is_reported_and_not_copied(capsys, source, target):
    url, pages = source
    first, second, third, *_ = pages
    newer = bytearray(pages[second])
    newer[8] = 9
    fill(
        url,
        {first: flipped(pages[first], -1), second: bytes(newer), third: make_page(key="other")},
    )
    code, document, _ = run_json(capsys, "copy", url, target)
    assert (code, document["copied"]) == (2, 3)
    assert document["reasons"] == {
        "corrupt:section_checksum": 1,
        "corrupt:name": 1,
        "unsupported:version": 1,
    }
    assert set(contents(target)) == set(pages) - {first, second, third}
    code, out, _ = run_text(capsys, "copy", url, target)
    assert code == 2 and "3 not copied" in out and first in out


def test_without_verification_everything_is_copied(capsys, source, target):
    url, pages = source
    name = next(iter(pages))
    fill(url, {name: b"no page at all"})
    code, document, _ = run_json(capsys, "copy", url, target, "--no-verify")
    assert (code, document["copied"], document["verify"]) == (0, 6, False)
    assert contents(target) == contents(url)


def test_unsupported_pages_alone_have_their_own_exit_code(capsys, source, target):
    url, pages = source
    name = next(iter(pages))
    newer = bytearray(pages[name])
    newer[8] = 9
    fill(url, {name: bytes(newer)})
    assert run_json(capsys, "copy", url, target)[0] == 3


page_sets = st.dictionaries(st.sampled_from("abcdef"), st.booleans(), max_size=6)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(page_sets, page_sets, st.booleans())
def test_copying_is_idempotent(capsys, tmp_path_factory, wanted, there, overwrite):
    """Whatever both hold: sound pages arrive, nothing else changes, and a second time it is all
    there.
    """
    folder = tmp_path_factory.mktemp("stores")
    urls = [f"file://{folder}/source", f"file://{folder}/target"]
    sound = {key: make_page(key=key, namespace=SPACE) for key in "abcdef"}
    for url, chosen in zip(urls, (wanted, there), strict=True):
        open_backend(url).close()
        fill(
            url,
            {
                SPACE.object_name(key): sound[key] if whole else sound[key][:-64]
                for key, whole in chosen.items()
            },
        )
    before = contents(urls[1])
    words = ["copy", *urls, *(["--overwrite"] if overwrite else [])]
    code, document, _ = run_json(capsys, *words)
    damaged = {SPACE.object_name(key) for key, whole in wanted.items() if not whole}
    assert (code == 2) == bool({page["name"] for page in document["pages"]})
    expected = before | {
        SPACE.object_name(key): sound[key] for key, whole in wanted.items() if whole
    }
    assert contents(urls[1]) == expected
    assert {page["name"] for page in document["pages"]} <= damaged
    _, again, _ = run_json(capsys, *words)
    assert contents(urls[1]) == expected
    assert again["copied"] == (document["copied"] if overwrite else 0)


def test_the_oldest_are_copied_first(capsys, fakes):
    source, target = fakes
    order = []
    target.hook = lambda operation, names: order.extend(names if operation == "put" else [])
    run_json(capsys, *FAKES, "--threads", "1")
    assert order == sorted(NAMES, reverse=True)
    assert source.closed and target.closed


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_copy_at_the_same_time(capsys, fakes, threads):
    source, _ = fakes
    barrier = threading.Barrier(threads, timeout=30)
    source.hook = lambda operation, names: operation == "get" and barrier.wait()
    code, document, _ = run_json(capsys, *FAKES, "--threads", str(threads))
    assert (code, document["copied"]) == (0, 8)


def test_the_rate_holds_the_copy_back(capsys, source, target):
    started = time.monotonic()
    assert run_json(capsys, "copy", source[0], target, "--rate", "134400/s")[1]["copied"] == 6
    assert time.monotonic() - started >= 5 / 10 - 0.25


# --- stores that fail


def test_what_cannot_be_read_or_written_is_reported(capsys, fakes, monkeypatch):
    source, target = fakes
    get_into, put_all = source.get_into, target.put

    def get(names, buffers, *, timeout_seconds):
        assert timeout_seconds == 2.5
        if names[0] == NAMES[1]:
            return [BackendError("\x1bunwell")]
        return get_into(names, buffers, timeout_seconds=timeout_seconds)

    def store(names, objects, *, timeout_seconds):
        assert timeout_seconds == 2.5
        if names[0] == NAMES[2]:
            return [BackendFull("no room")]
        return put_all(names, objects, timeout_seconds=timeout_seconds)

    monkeypatch.setattr(source, "get_into", get)
    monkeypatch.setattr(target, "put", store)
    code, document, _ = run_json(capsys, *FAKES, "--timeout", "2.5")
    assert (code, document["copied"]) == (4, 6)
    assert document["reasons"] == {"source:BackendError": 1, "target:BackendFull": 1}
    assert (document["unread"], document["unwritten"]) == (1, 1)
    assert "\x1b" not in run_text(capsys, *FAKES, "--timeout", "2.5")[1]
    monkeypatch.setattr(source, "get_into", get_into)
    monkeypatch.setattr(target, "put", put_all)
    code, document, _ = run_json(capsys, *FAKES)
    assert (code, document["copied"], document["skipped"]) == (0, 2, 6)


@pytest.mark.parametrize("side", [0, 1])
def test_a_store_that_is_away_is_given_up(capsys, fakes, monkeypatch, side):
    monkeypatch.setattr(verification, "MOST_FAILURES_IN_A_ROW", 3)
    monkeypatch.setattr(
        fakes[side], ("get_into", "put")[side], lambda *a, **k: [BackendError("away")]
    )
    code, document, _ = run_json(capsys, *FAKES, "--threads", "1")
    assert (code, document["copied"], document["unasked"]) == (4, 0, 5)
    assert "given up: 3" in run_text(capsys, *FAKES, "--threads", "1")[1]


def test_a_target_that_cannot_be_listed_is_asked_page_by_page(capsys, fakes, monkeypatch):
    source, target = fakes
    put(target, NAMES[0], source.objects[NAMES[0]])
    put(target, NAMES[1], b"of another size")

    def no_list(prefix: str = ""):
        raise BackendError("this store cannot list")

    monkeypatch.setattr(target, "list", no_list)
    code, document, _ = run_json(capsys, *FAKES)
    assert (code, document["copied"], document["skipped"]) == (0, 7, 1)
    assert document["skipped_bytes"] == len(source.objects[NAMES[0]])
    assert target.objects == source.objects
    _, document, _ = run_json(capsys, *FAKES, "--overwrite")
    assert (document["copied"], document["skipped"]) == (8, 0)


def test_a_source_that_cannot_be_listed_is_a_failure(capsys, fakes):
    def hook(operation, names):
        if operation == "list":
            raise BackendError("this store cannot list")

    fakes[0].hook = hook
    code, document, _ = run_json(capsys, *FAKES)
    assert (code, document["error"]["message"]) == (4, "this store cannot list")


def test_a_page_that_goes_meanwhile_is_no_fault(capsys, fakes, monkeypatch):
    source, _ = fakes
    gone = ObjectInfo(SPACE.object_name("gone"), 100, 0.0)
    listing = source.list
    monkeypatch.setattr(source, "list", lambda prefix="": [*listing(prefix), gone])
    code, document, _ = run_json(capsys, *FAKES)
    assert (code, document["copied"], document["gone"]) == (0, 8, 1)


def test_an_interrupted_copy_ends_with_130_and_goes_on(capsys, fakes):
    source, target = fakes
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def hook(operation, names):
        if operation == "get" and names[0] == NAMES[4]:
            signal.pthread_kill(main_thread, signal.SIGINT)
            time.sleep(0.2)

    source.hook = hook
    code, document, _ = run_json(capsys, *FAKES, "--threads", "1", "--rate", "10GB/s")
    assert (code, document["error"]["kind"]) == (130, "Interrupted")
    assert 0 < len(target.objects) < 8
    assert all(target.objects[name] == source.objects[name] for name in target.objects)
    source.hook = lambda operation, names: None
    there = len(target.objects)
    code, document, _ = run_json(capsys, *FAKES)
    assert (code, document["skipped"], document["copied"]) == (0, there, 8 - there)
    assert target.objects == source.objects


def test_an_interrupt_waits_for_what_is_under_way(capsys, fakes):
    """The target is not closed, and the process not ended, in the middle of a put."""
    _, target = fakes
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    closed = []

    def hook(operation, names):
        if operation == "put":
            signal.pthread_kill(main_thread, signal.SIGINT)
            time.sleep(0.5)
            closed.append(target.closed)

    target.hook = hook
    assert run_json(capsys, *FAKES, "--threads", "1")[0] == 130
    assert (closed, target.closed) == ([False], True)


def test_a_killed_copy_leaves_whole_pages_and_goes_on(capsys, source, target):
    """Ctrl-C as a shell sends it, to a process of its own."""
    url, pages = source
    script = "import sys; from kvcodec.cli import main; sys.exit(main())"
    words = [sys.executable, "-c", script, "copy", url, target, "--rate", "40kB/s"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: list(Path(target[7:]).glob("objects/*/*/*")))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "kvcodec: interrupted\n")
    assert list(Path(target[7:], "tmp").iterdir()) == []
    found = contents(target)
    assert 0 < len(found) < 6
    assert all(pages[name] == page for name, page in found.items())
    _, document, _ = run_json(capsys, "copy", url, target)
    assert (document["skipped"], document["copied"]) == (len(found), 6 - len(found))
    assert contents(target) == pages


def test_a_mistyped_source_makes_no_target(capsys, tmp_path):
    code, _, err = run_text(capsys, "copy", f"file://{tmp_path}/typo", f"file://{tmp_path}/target")
    assert code == 1 and "there is no store" in err
    assert list(tmp_path.iterdir()) == []


def test_progress_and_secrets(capsys, source, target, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "6/6 copied, 0 not" in run_json(capsys, "copy", source[0], target)[2]
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: Dated())
    _, document, _ = run_json(capsys, "copy", "fake://u:geheim@h", "fake://u:geheim@h")
    assert (document["source"], document["target"]) == ("fake://u:***@h",) * 2


@pytest.mark.parametrize(
    "words",
    [
        ["copy", "memory://"],
        ["copy", "memory://", "memory://", "memory://"],
        ["copy", "memory://a", "memory://b", "--namespace", "x"],
        ["copy", "memory://a", "memory://b", "--rate", "fast"],
        ["copy", "memory://a", "memory://b", "--threads", "0"],
        ["copy", "memory://nowhere", "memory://b"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_1(capsys, words):
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
