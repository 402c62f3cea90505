"""``kvcodec verify``."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_pages import fill, flipped, make_page, namespace_of, run_json, run_text
from fake_backend import FakeBackend

from kvcodec.backend import ObjectInfo, open_backend
from kvcodec.cli import stores, verification
from kvcodec.errors import BackendError

SPACES = [namespace_of(rank) for rank in range(2)]


@pytest.fixture
def store(tmp_path: Path) -> tuple[str, dict[str, bytes]]:
    """A store of six sound pages in two namespaces."""
    pages = {
        space.object_name(key): make_page(key=key, namespace=space)
        for space in SPACES
        for key in ("a", "b", "c")
    }
    url = f"file://{tmp_path}"
    fill(url, pages)
    return url, pages


def newer(page: bytes) -> bytes:
    data = bytearray(page)
    data[8] = 9
    return bytes(data)


def test_sound_store_is_fine(capsys, store):
    url, pages = store
    code, document, err = run_json(capsys, "verify", url)
    assert (code, err) == (0, "")
    seconds = document.pop("seconds")
    assert seconds >= 0
    assert document == {
        "url": url,
        "namespace": None,
        "delete_bad": False,
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
    code, out, err = run_text(capsys, "verify", url)
    assert (code, err) == (0, "")
    assert "6 pages checked" in out


def test_bad_pages_are_counted_by_reason_and_named(capsys, store):
    url, pages = store
    names = list(pages)
    fill(
        url,
        {
            names[0]: flipped(pages[names[0]], -1),
            names[1]: flipped(pages[names[1]], -1),
            names[2]: pages[names[2]][:100],
            names[3]: pages[names[4]],
        },
    )
    code, document, _ = run_json(capsys, "verify", url)
    assert code == 2
    assert document["reasons"] == {
        "corrupt:section_checksum": 2,
        "corrupt:length": 1,
        "corrupt:name": 1,
    }
    assert {page["name"] for page in document["pages"]} == set(names[:4])
    assert (document["sound"], document["bad"]) == (2, 4)
    assert set(document["pages"][0]) == {"name", "reason", "message", "stored_bytes"}
    code, out, _ = run_text(capsys, "verify", url)
    assert code == 2
    assert all(name in out for name in names[:4])
    assert "--delete-bad" in out


def test_namespace_limits_the_search(capsys, store):
    url, pages = store
    names = list(pages)
    fill(url, {names[0]: flipped(pages[names[0]], -1)})
    code, document, _ = run_json(capsys, "verify", url, "--namespace", SPACES[1].digest.hex())
    assert (code, document["checked"]) == (0, 3)
    code, document, _ = run_json(capsys, "verify", url, "--namespace", SPACES[0].digest.hex())
    assert (code, document["checked"]) == (2, 3)


def test_nothing_is_deleted_without_the_flag(capsys, store):
    url, pages = store
    names = list(pages)
    fill(url, {names[0]: flipped(pages[names[0]], -1)})
    run_json(capsys, "verify", url)
    assert run_json(capsys, "verify", url)[1]["bad"] == 1


def test_delete_bad_removes_damaged_pages_only(capsys, store):
    url, pages = store
    names = list(pages)
    fill(url, {names[0]: flipped(pages[names[0]], -1), names[1]: newer(pages[names[1]])})
    code, document, _ = run_json(capsys, "verify", url, "--delete-bad")
    assert code == 2
    assert (document["bad"], document["unsupported"], document["deleted"]) == (1, 1, 1)
    backend = open_backend(url)
    assert {info.name for info in backend.list()} == set(names[1:])
    backend.close()
    code, document, _ = run_json(capsys, "verify", url)
    assert (code, document["checked"]) == (3, 5)


def test_unsupported_pages_have_their_own_exit_code(capsys, store):
    url, pages = store
    names = list(pages)
    fill(url, {names[0]: newer(pages[names[0]])})
    code, document, _ = run_json(capsys, "verify", url)
    assert (code, document["reasons"]) == (3, {"unsupported:version": 1})


def test_empty_store_is_fine(capsys, tmp_path):
    open_backend(f"file://{tmp_path}").close()
    code, document, _ = run_json(capsys, "verify", f"file://{tmp_path}")
    assert (code, document["checked"]) == (0, 0)
    _, out, _ = run_text(capsys, "verify", f"file://{tmp_path}")
    assert "has no pages" in out


def test_a_mistyped_url_is_an_error_and_makes_no_store(capsys, tmp_path):
    code, document, _ = run_json(capsys, "verify", f"file://{tmp_path}/typo")
    assert code == 1 and "there is no store" in document["error"]["message"]
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["verify"],
        ["verify", "nosuch://x"],
        ["verify", "/a/path"],
        ["verify", "memory://", "--namespace", "xyz"],
        ["verify", "memory://", "--threads", "0"],
        ["verify", "memory://", "--threads", "65"],
        ["verify", "memory://", "--timeout", "-1"],
        ["verify", "memory://?max_byte=3"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_1(capsys, words):
    code, out, err = run_text(capsys, *words)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1


# --- stores that fail


class TimedBackend(FakeBackend):
    def __init__(self) -> None:
        super().__init__()
        self.timeouts: set[float] = set()
        self.listed: list[ObjectInfo] = []

    def get_into(self, names, buffers, *, timeout_seconds):
        self.timeouts.add(timeout_seconds)
        return super().get_into(names, buffers, timeout_seconds=timeout_seconds)

    def delete(self, names, *, timeout_seconds):
        self.timeouts.add(timeout_seconds)
        return super().delete(names, timeout_seconds=timeout_seconds)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        yield from super().list(prefix)
        yield from self.listed


@pytest.fixture
def fake(monkeypatch) -> TimedBackend:
    backend = TimedBackend()
    for key in "abcdefgh":
        backend.objects[SPACES[0].object_name(key)] = make_page(key=key, namespace=SPACES[0])
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: backend)
    return backend


def test_unreadable_pages_are_not_bad_ones(capsys, fake, monkeypatch):
    monkeypatch.setattr(fake, "get_into", lambda *a, **k: [BackendError("\x1bgone wrong")])
    code, document, _ = run_json(capsys, "verify", "fake://", "--delete-bad")
    assert code == 4
    assert (document["unread"], document["checked"], document["deleted"]) == (8, 0, 0)
    assert document["reasons"] == {"store:BackendError": 8}
    _, out, _ = run_text(capsys, "verify", "fake://")
    assert "\x1b" not in out
    assert "\\x1bgone wrong" in out
    assert len(fake.objects) == 8


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_backend_that_raises_ends_the_command(capsys, fake):
    def hook(operation, names):
        if operation == "get":
            raise RuntimeError("a bug")

    fake.hook = hook
    for index in range(40):
        fake.objects[SPACES[0].object_name(str(index))] = b""
    code, document, _ = run_json(capsys, "verify", "fake://", "--threads", "2")
    assert (code, document["error"]["kind"]) == (4, "BackendError")


def test_listing_that_fails_is_one_line(capsys, fake):
    def hook(operation, names):
        if operation == "list":
            raise PermissionError(13, "not for you")

    fake.hook = hook
    code, out, err = run_text(capsys, "verify", "fake://")
    assert (code, out) == (4, "")
    assert err == "kvcodec: [Errno 13] not for you\n"


def test_page_that_goes_meanwhile_is_counted_apart(capsys, fake):
    fake.listed = [ObjectInfo(SPACES[0].object_name("gone"), 100, 0.0)]
    code, document, _ = run_json(capsys, "verify", "fake://")
    assert (code, document["gone"], document["checked"]) == (0, 1, 8)


def test_page_that_grew_since_it_was_listed_is_read_whole(capsys, fake):
    name = SPACES[0].object_name("z")
    page = fake.objects.setdefault(name, make_page(key="z", namespace=SPACES[0]))
    fake.listed = [ObjectInfo(name, 10, 0.0)]
    code, document, _ = run_json(capsys, "verify", "fake://", "--threads", "1")
    assert (code, document["sound"]) == (0, 10)
    assert len(page) > 10


def test_object_beyond_the_limit_is_not_read(capsys, fake, monkeypatch):
    monkeypatch.setattr(stores, "MAX_PAGE_BYTES", 100)
    code, document, _ = run_json(capsys, "verify", "fake://")
    assert (code, document["reasons"]) == (4, {"store:too_large": 8})
    assert fake.timeouts == set()


def test_timeout_reaches_the_store(capsys, fake):
    name = next(iter(fake.objects))
    fake.objects[name] = flipped(fake.objects[name], -1)
    run_json(capsys, "verify", "fake://", "--timeout", "2.5", "--delete-bad")
    assert fake.timeouts == {2.5}
    assert ("delete", 1) in fake.calls
    assert fake.closed


def test_listing_of_impossible_names_is_a_store_failure(capsys, fake):
    fake.listed = [ObjectInfo("../../etc/passwd\x1b", 1, 0.0)]
    code, _, err = run_text(capsys, "verify", "fake://")
    assert code == 4
    assert "\x1b" not in err


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_read_at_the_same_time(capsys, fake, threads):
    """With N threads exactly N reads are under way at once."""
    barrier = threading.Barrier(threads, timeout=30)
    running: set[int] = set()
    most = 0
    lock = threading.Lock()

    def hook(operation, names):
        nonlocal most
        if operation != "get":
            return
        with lock:
            running.add(threading.get_ident())
            most = max(most, len(running))
        barrier.wait()
        with lock:
            running.discard(threading.get_ident())

    fake.hook = hook
    code, _, _ = run_json(capsys, "verify", "fake://", "--threads", str(threads))
    assert code == 0
    assert most == threads


def test_a_store_that_is_away_is_not_asked_for_every_page(capsys, fake, monkeypatch):
    monkeypatch.setattr(verification, "MOST_FAILURES_IN_A_ROW", 3)
    monkeypatch.setattr(fake, "get_into", lambda *a, **k: [BackendError("away")])
    code, document, _ = run_json(capsys, "verify", "fake://", "--threads", "1")
    assert (code, document["unread"], document["unasked"]) == (4, 3, 5)
    _, out, _ = run_text(capsys, "verify", "fake://", "--threads", "1")
    assert "given up: 3 pages failed in a row" in out


def test_secrets_of_the_url_are_not_shown(capsys, fake):
    _, document, _ = run_json(capsys, "verify", "fake://user:geheim@host")
    assert document["url"] == "fake://user:***@host"


def test_progress_goes_to_stderr_and_only_to_a_terminal(capsys, store, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, document, err = run_json(capsys, "verify", store[0])
    assert (code, document["sound"]) == (0, 6)
    assert "6/6 pages, 0 bad" in err
