"""``kvcodec rm``."""

from __future__ import annotations

import io

import pytest
from cli_pages import contents, filled, namespace_of, run_json, run_text
from fake_backend import FakeBackend

from kvcodec.backend import ObjectInfo
from kvcodec.cli import removal, stores
from kvcodec.errors import BackendError, BackendTimeout

SPACES = [namespace_of(rank) for rank in range(2)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def store(tmp_path) -> tuple[str, dict[str, bytes]]:
    url = f"file://{tmp_path}"
    return url, filled(url)


@pytest.fixture
def fake(monkeypatch) -> FakeBackend:
    backend = FakeBackend()
    backend.objects = {SPACES[0].object_name(key): b"data" for key in "abcdef"}
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: backend)
    return backend


def test_a_key_goes_from_every_namespace(capsys, store):
    url, pages = store
    code, document, err = run_json(capsys, "rm", url, "a", "c", "--yes")
    assert (code, err) == (0, "")
    gone = [space.object_name(key) for space in SPACES for key in "ac"]
    assert document == {
        "url": url,
        "namespace": None,
        "dry_run": False,
        "pages": 4,
        "stored_bytes": sum(len(pages[name]) for name in gone),
        "deleted": 4,
        "deleted_bytes": sum(len(pages[name]) for name in gone),
        "gone": 0,
        "failed": 0,
        "unasked": 0,
        "failures": [],
        "missing": [],
    }
    assert set(contents(url)) == set(pages) - set(gone)


def test_a_key_goes_from_one_namespace_only(capsys, store):
    url, pages = store
    run_json(capsys, "rm", url, "a", "--namespace", SPACES[1].digest.hex(), "--yes")
    assert set(contents(url)) == set(pages) - {SPACES[1].object_name("a")}


def test_an_object_name_is_a_key_too_and_counts_once(capsys, store):
    url, pages = store
    name = SPACES[1].object_name("b")
    _, document, _ = run_json(capsys, "rm", url, name, name, "--yes")
    assert (document["pages"], document["deleted"]) == (1, 1)
    assert set(contents(url)) == set(pages) - {name}


def test_a_namespace_goes_whole(capsys, store):
    url, _ = store
    code, out, _ = run_text(capsys, "rm", url, "--namespace", SPACES[0].digest.hex(), "--yes")
    assert (code, out.splitlines()[0][:15]) == (0, "3 pages deleted")
    assert set(contents(url)) == {SPACES[1].object_name(key) for key in "abc"}


def test_everything_goes(capsys, store):
    url, _ = store
    assert run_json(capsys, "rm", url, "--all", "--yes")[1]["deleted"] == 6
    assert contents(url) == {}
    assert run_json(capsys, "rm", url, "--all", "--yes")[0] == 0


def test_a_dry_run_deletes_nothing_and_asks_nobody(capsys, store):
    url, pages = store
    code, document, _ = run_json(capsys, "rm", url, "--all", "--dry-run")
    assert (code, document["pages"], document["deleted"]) == (0, 6, 0)
    code, out, _ = run_text(capsys, "rm", url, "a", "--dry-run")
    assert (code, out) == (0, "2 pages (26.25 KiB) would be deleted\n")
    assert contents(url) == pages


def test_a_key_without_a_page_is_named_and_the_others_go(capsys, store):
    url, _ = store
    code, document, err = run_json(capsys, "rm", url, "nix\x1b", "a", "--yes")
    assert (code, document["missing"], document["deleted"]) == (5, ["nix\x1b"], 2)
    code, out, err = run_text(capsys, "rm", url, "nix\x1b", "--yes")
    assert code == 5 and "\x1b" not in out + err and "nix" in err
    assert len(contents(url)) == 4


def test_without_a_terminal_nothing_is_deleted(capsys, store):
    url, pages = store
    code, out, err = run_text(capsys, "rm", url, "--all")
    assert (code, out) == (1, "")
    assert "--yes" in err
    assert contents(url) == pages


@pytest.mark.parametrize(("answer", "goes"), [("y\n", True), ("YES\n", True), ("n\n", False)])
def test_a_terminal_is_asked(capsys, store, monkeypatch, answer, goes):
    url, pages = store
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    code, _, err = run_json(capsys, "rm", url, "--all")
    assert "delete 6 pages (78.75 KiB) of file://" in err
    assert code == (0 if goes else 130)
    assert contents(url) == ({} if goes else pages)


@pytest.mark.parametrize("answer", ["", "\n", "yesterday\n"])
def test_no_answer_is_a_no(capsys, store, monkeypatch, answer):
    url, pages = store
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert run_text(capsys, "rm", url, "--all")[0] == 130
    assert contents(url) == pages


def test_yes_asks_nobody(capsys, store, monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    code, _, err = run_text(capsys, "rm", store[0], "--all", "--yes")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    "words",
    [
        ["rm", "memory://", "--yes"],
        ["rm", "memory://", "--all", "key", "--yes"],
        ["rm", "memory://", "--all", "--namespace", "0" * 32, "--yes"],
        ["rm", "memory://", "--namespace", "x", "--yes"],
        ["rm", "memory://nowhere", "--all", "--yes"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_1(capsys, words):
    code, out, err = run_text(capsys, *words)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1


# --- stores that fail


def test_what_went_meanwhile_is_no_failure(capsys, fake, monkeypatch):
    gone = SPACES[0].object_name("gone")
    monkeypatch.setattr(
        fake,
        "list",
        lambda prefix="": iter([ObjectInfo(name, 4, 0.0) for name in [*fake.objects, gone]]),
    )
    code, document, _ = run_json(capsys, "rm", "fake://", "--all", "--yes")
    assert (code, document["deleted"], document["gone"]) == (0, 6, 1)
    assert document["deleted_bytes"] == 24


def test_what_cannot_be_deleted_is_counted_and_named(capsys, fake, monkeypatch):
    kept = SPACES[0].object_name("b")
    timeouts = set()

    def delete(names, *, timeout_seconds):
        timeouts.add(timeout_seconds)
        return [name != kept and fake.objects.pop(name) is not None for name in names]

    monkeypatch.setattr(fake, "delete", delete)
    code, document, _ = run_json(capsys, "rm", "fake://", "--all", "--yes", "--timeout", "2.5")
    assert (code, document["deleted"], document["failed"]) == (4, 5, 1)
    assert document["failures"] == [{"name": kept, "message": "the store did not delete it"}]
    assert timeouts == {2.5}
    code, out, _ = run_text(capsys, "rm", "fake://", "--all", "--yes")
    assert code == 4 and kept in out


def test_a_store_that_is_away_is_given_up(capsys, fake, monkeypatch):
    asked = []

    def stat(name, *, timeout_seconds):
        asked.append(name)
        raise BackendTimeout("\x1bgone")

    monkeypatch.setattr(fake, "delete", lambda names, **_: [False] * len(names))
    monkeypatch.setattr(fake, "stat", stat)
    monkeypatch.setattr(removal, "MOST_FAILURES_IN_A_ROW", 3)
    monkeypatch.setattr(removal, "_BATCH", 2)
    code, document, _ = run_json(capsys, "rm", "fake://", "--all", "--yes")
    assert (code, document["failed"], document["unasked"], len(asked)) == (4, 3, 3, 3)
    code, out, _ = run_text(capsys, "rm", "fake://", "--all", "--yes")
    assert "\x1b" not in out and "given up: 3" in out


def test_a_listing_that_breaks_off_deletes_nothing(capsys, fake, monkeypatch):
    def broken(prefix: str = ""):
        yield ObjectInfo(next(iter(fake.objects)), 4, 0.0)
        raise BackendError("gone")

    monkeypatch.setattr(fake, "list", broken)
    code, document, _ = run_json(capsys, "rm", "fake://", "--all", "--yes")
    assert (code, document["error"]["kind"], len(fake.objects)) == (4, "BackendError", 6)


def test_an_interrupt_ends_with_130(capsys, fake):
    def hook(operation, names):
        if operation == "delete":
            raise KeyboardInterrupt

    fake.hook = hook
    code, document, _ = run_json(capsys, "rm", "fake://", "--all", "--yes")
    assert (code, document["error"]["exit_code"]) == (130, 130)
    assert fake.closed


def test_keys_cost_one_listing(capsys, fake):
    run_json(capsys, "rm", "fake://", "a", "b", "c", "--yes")
    assert [name for name, _ in fake.calls].count("list") == 1
