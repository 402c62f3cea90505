"""``kvcodec gc``."""

from __future__ import annotations

import os
import time

import pytest
from cli_pages import contents, filled, namespace_of, run_json, run_text
from fake_backend import FakeBackend
from hypothesis import given
from hypothesis import strategies as st

from kvcodec.backend import ObjectInfo
from kvcodec.cli import stores
from kvcodec.cli.listing import Listing
from kvcodec.cli.removal import chosen
from kvcodec.cli.scrub import parse_seconds
from kvcodec.errors import ConfigError

DIGESTS = [namespace_of(rank).digest.hex() for rank in range(3)]
HOUR = 3600.0


class Dated(FakeBackend):
    """Objects of 100 bytes with the ages they were given, in hours."""

    def __init__(self) -> None:
        super().__init__()
        self.ages: dict[str, float] = {}

    def add(self, digest: str, number: int, age_hours: float) -> str:
        name = f"{digest}/{number:064x}"
        self.objects[name] = bytes(100)
        self.ages[name] = age_hours
        return name

    def list(self, prefix: str = ""):
        now = time.time()
        for name, data in list(self.objects.items()):
            yield ObjectInfo(name, len(data), now - HOUR * self.ages[name])


@pytest.fixture
def fake(monkeypatch) -> Dated:
    backend = Dated()
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: backend)
    return backend


@pytest.fixture
def aged(fake) -> list[str]:
    """Six names, the oldest first; two of each namespace."""
    return [fake.add(DIGESTS[at % 3], at, 6.5 - at) for at in (3, 0, 5, 1, 4, 2)] and [
        f"{DIGESTS[at % 3]}/{at:064x}" for at in range(6)
    ]


@pytest.mark.parametrize(
    ("limit", "left"), [("600", 6), ("599", 5), ("250", 2), ("100B", 1), ("0", 0), ("1GB", 6)]
)
def test_the_oldest_go_until_the_rest_fits(capsys, fake, aged, limit, left):
    code, document, err = run_json(capsys, "gc", "fake://u:geheim@h", "--max-bytes", limit)
    assert (code, err) == (0, "")
    assert set(fake.objects) == set(aged[6 - left :])
    size = {"pages": 6 - left, "stored_bytes": 100 * (6 - left)}
    assert document == {
        "url": "fake://u:***@h",
        "dry_run": False,
        "pages": 6,
        "stored_bytes": 600,
        "condemned": {"size": size},
        "left_pages": left,
        "deleted": 6 - left,
        "deleted_bytes": 100 * (6 - left),
        "gone": 0,
        "failed": 0,
        "unasked": 0,
        "failures": [],
    }
    assert fake.closed


def test_what_is_too_old_goes(capsys, fake, aged):
    code, document, _ = run_json(capsys, "gc", "fake://", "--older-than", "3h")
    assert (code, document["condemned"]) == (0, {"age": {"pages": 4, "stored_bytes": 400}})
    assert set(fake.objects) == set(aged[4:])


def test_namespaces_that_are_not_kept_go(capsys, fake, aged):
    words = ["--keep-namespace", DIGESTS[0], "--keep-namespace", DIGESTS[2]]
    _, document, _ = run_json(capsys, "gc", "fake://", *words)
    assert document["condemned"] == {"namespace": {"pages": 2, "stored_bytes": 200}}
    assert {name[:32] for name in fake.objects} == {DIGESTS[0], DIGESTS[2]}


def test_rules_work_one_after_the_other(capsys, fake, aged):
    """A page counts for the first rule that condemns it, and what is gone makes room."""
    words = ["--keep-namespace", DIGESTS[0], "--keep-namespace", DIGESTS[1]]
    words += ["--older-than", "6h", "--max-bytes", "250"]
    _, document, _ = run_json(capsys, "gc", "fake://", *words)
    assert {reason: row["pages"] for reason, row in document["condemned"].items()} == {
        "namespace": 2,
        "age": 1,
        "size": 1,
    }
    assert set(fake.objects) == {aged[3], aged[4]}
    _, out, _ = run_text(capsys, "gc", "fake://", *words)
    assert "0 pages deleted, 0 B freed" in out
    assert "of namespaces that are not kept" in out
    assert "2 pages left" in out


def test_a_dry_run_deletes_nothing(capsys, fake, aged):
    code, document, _ = run_json(capsys, "gc", "fake://", "--max-bytes", "250", "--dry-run")
    assert (code, document["deleted"], document["left_pages"]) == (0, 0, 2)
    assert document["condemned"]["size"]["pages"] == 4
    _, out, _ = run_text(capsys, "gc", "fake://", "--max-bytes", "250", "--dry-run")
    assert "400 B in 4 pages would be freed" in out and "2 pages left" in out
    assert set(fake.objects) == set(aged)


def test_a_namespace_to_keep_that_has_no_page_is_a_typing_error(capsys, fake, aged):
    code, document, _ = run_json(
        capsys, "gc", "fake://", "--keep-namespace", DIGESTS[0], "--keep-namespace", "f" * 32
    )
    assert (code, document["error"]["kind"]) == (5, "NoSuchPage")
    assert set(fake.objects) == set(aged)


def test_a_page_that_stays_is_a_failure(capsys, fake, aged, monkeypatch):
    timeouts = set()

    def delete(names, *, timeout_seconds):
        timeouts.add(timeout_seconds)
        return [False] * len(names)

    monkeypatch.setattr(fake, "delete", delete)
    words = ["gc", "fake://", "--max-bytes", "0", "--timeout", "2.5"]
    code, document, _ = run_json(capsys, *words)
    assert (code, document["failed"], document["left_pages"]) == (4, 6, 6)
    assert timeouts == {2.5}


def test_files_are_collected_by_the_time_they_were_written(capsys, tmp_path):
    url = f"file://{tmp_path}"
    pages = filled(url)
    old = list(pages)[:2]
    for name in old:
        digest, page = name.split("/")
        (path,) = (tmp_path / "objects" / digest).glob(f"*/{page}")
        os.utime(path, (0, time.time() - 8 * 24 * HOUR))
    assert run_json(capsys, "gc", url, "--older-than", "9d")[1]["deleted"] == 0
    assert run_json(capsys, "gc", url, "--older-than", "7d")[1]["deleted"] == 2
    assert contents(url) == {name: page for name, page in pages.items() if name not in old}


def test_an_empty_store_is_fine(capsys, fake):
    code, document, _ = run_json(capsys, "gc", "fake://", "--max-bytes", "0", "--older-than", "0")
    assert (code, document["pages"], document["deleted"]) == (0, 0, 0)


@pytest.mark.parametrize(
    "words",
    [
        ["gc", "memory://"],
        ["gc", "memory://", "--dry-run"],
        ["gc", "memory://", "--max-bytes", "much"],
        ["gc", "memory://", "--older-than", "long ago"],
        ["gc", "memory://", "--keep-namespace", "x"],
        ["gc", "memory://", "--keep-namespace", ""],
        ["gc", "memory://nowhere", "--max-bytes", "0"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_1(capsys, words):
    code, out, err = run_text(capsys, *words)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7d", 604800), ("2w", 1209600), ("1.5h", 5400), ("15m", 900), ("90s", 90), ("90", 90)],
)
def test_a_time_has_a_unit(text, seconds):
    assert parse_seconds("--older-than", text) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1d", "7y", "1e3", "nan", "7 days"])
def test_no_other_text_is_a_time(text):
    with pytest.raises(ConfigError, match="wanted a time such as"):
        parse_seconds("--older-than", text)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(0, 5)), max_size=12),
    st.lists(st.integers(0, 2), max_size=2),
    st.none() | st.integers(0, 6),
    st.none() | st.integers(0, 60),
)
def test_the_choice_is_what_a_plain_loop_would_choose(rows, kept, before, max_bytes):
    objects = [
        ObjectInfo(f"{DIGESTS[space]}/{at:064x}", size, float(seconds))
        for at, (space, size, seconds) in enumerate(rows)
    ]
    digests = [DIGESTS[space] for space in kept]
    choices = chosen(
        Listing.of(objects),
        keep_namespaces=digests,
        written_before_seconds=before,
        max_bytes=max_bytes,
    )
    left = [info for info in objects if not digests or info.name[:32] in digests]
    left = [info for info in left if before is None or info.modified_seconds >= before]
    left.sort(key=lambda info: info.modified_seconds)
    while max_bytes is not None and sum(info.stored_bytes for info in left) > max_bytes:
        left.pop(0)
    condemned = [info.name for choice in choices for info in choice.listing]
    assert len(condemned) == len(set(condemned))
    assert set(condemned) == {info.name for info in objects} - {info.name for info in left}
    for choice in choices:
        times = [info.modified_seconds for info in choice.listing]
        assert times == sorted(times)
