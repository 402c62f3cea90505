"""``kvcodec stat``."""

from __future__ import annotations

import pytest
from cli_pages import fill, filled, flipped, make_page, namespace_of, run_json, run_text
from fake_backend import FakeBackend

from kvcodec.backend import ObjectInfo
from kvcodec.cli import stores
from kvcodec.errors import BackendError

SPACES = [namespace_of(rank) for rank in range(2)]


@pytest.fixture
def url(tmp_path) -> str:
    """Four pages as kv8, one raw one, in two namespaces."""
    url = f"file://{tmp_path}"
    pages = {
        space.object_name(key): make_page(key=key, namespace=space, spec="kv8")
        for space in SPACES
        for key in "ab"
    }
    pages[SPACES[1].object_name("c")] = make_page(key="c", namespace=SPACES[1], spec="raw")
    fill(url, pages)
    return url


def test_totals_sizes_codecs_and_identities(capsys, url):
    code, document, err = run_json(capsys, "stat", url)
    assert (code, err) == (0, "")
    coded, raw = len(make_page(spec="kv8", key="a")), len(make_page(spec="raw", key="a"))
    raw_page = SPACES[0].layout.raw_bytes
    assert (document["url"], document["namespace"]) == (url, None)
    assert (document["pages"], document["namespaces"]) == (5, 2)
    assert document["stored_bytes"] == 4 * coded + raw
    assert document["oldest"] <= document["newest"]
    assert document["sizes"] == [
        {"from_bytes": 16384, "pages": 4, "stored_bytes": 4 * coded},
        {"from_bytes": 32768, "pages": 1, "stored_bytes": raw},
    ]
    assert document["sample"] == {
        "pages": 5,
        "stored_bytes": 4 * coded + raw,
        "raw_bytes": 5 * raw_page,
        "ratio": round(5 * raw_page / (4 * coded + raw), 4),
        "unreadable": {},
    }
    assert [(row["codec"], row["pages"]) for row in document["codecs"]] == [
        ("key=int8-g64 value=int8-g64", 4),
        ("key=raw value=raw", 1),
    ]
    assert document["codecs"][0]["ratio"] == round(raw_page / coded, 4)
    assert [(row["identity"]["rank"], row["pages"]) for row in document["identities"]] == [
        ("1", 3),
        ("0", 2),
    ]
    assert document["identities"][0]["layout"].startswith("bf16, 16 tokens")
    assert "evicted_objects" in document["counters"]


def test_the_text_says_the_same(capsys, url):
    code, out, _ = run_text(capsys, "stat", url)
    assert code == 0
    assert "5 in 2 namespaces" in out
    assert "16.00 KiB to 32.00 KiB" in out
    assert "key=int8-g64 value=int8-g64" in out
    assert "model=test/model rank=1" in out
    assert "ratio      " in out
    assert "evicted_objects" in out


def test_layers_of_several_codecs_are_one_text(capsys, tmp_path):
    url = f"file://{tmp_path}"
    name = SPACES[0].object_name("a")
    fill(url, {name: make_page(key="a", spec="key=int8-g64 value=int4-g64 layer.3=int8-g64,raw")})
    (row,) = run_json(capsys, "stat", url)[1]["codecs"]
    assert row["codec"] == "key=int8-g64 value=int4-g64+raw"


def test_a_namespace_is_counted_alone(capsys, url):
    _, document, _ = run_json(capsys, "stat", url, "--namespace", SPACES[0].digest.hex())
    assert (document["pages"], document["namespaces"], document["sample"]["pages"]) == (2, 1, 2)


@pytest.mark.parametrize(("count", "expected"), [("0", 0), ("2", 2), ("5", 5), ("9", 5)])
def test_only_the_sample_is_read(capsys, url, count, expected):
    _, document, _ = run_json(capsys, "stat", url, "--sample", count)
    assert document["sample"]["pages"] == expected
    assert sum(row["pages"] for row in document["codecs"]) == expected
    assert document["pages"] == 5


def test_every_page_has_a_chance_to_be_in_the_sample(monkeypatch, capsys):
    fake = FakeBackend()
    fake.objects = {f"{0:032x}/{number:064x}": b"x" for number in range(200)}
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: fake)
    read = []
    fake.hook = lambda operation, names: read.extend(names if operation == "get" else [])
    run_json(capsys, "stat", "fake://", "--sample", "40")
    assert len(set(read)) == 40
    numbers = sorted(int(name[33:], 16) for name in read)
    assert numbers[0] < 20 and numbers[-1] >= 180


def test_what_cannot_be_read_is_counted_by_reason(capsys, tmp_path):
    url = f"file://{tmp_path}"
    pages = filled(url)
    names = list(pages)
    fill(url, {names[0]: flipped(pages[names[0]], 3), names[1]: pages[names[1]][:200]})
    code, document, _ = run_json(capsys, "stat", url)
    assert code == 0
    assert document["sample"]["unreadable"] == {"corrupt:magic": 1, "corrupt:length": 1}
    assert document["sample"]["pages"] == 4
    assert "1 of the sample: corrupt:magic" in run_text(capsys, "stat", url)[1]


def test_the_oldest_and_the_newest_are_found(capsys, monkeypatch):
    fake = FakeBackend()
    infos = [ObjectInfo(f"{0:032x}/{at:064x}", 1, 1e9 + at) for at in (2, 0, 5, 3)]
    monkeypatch.setattr(fake, "list", lambda prefix="": iter(infos))
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: fake)
    document = run_json(capsys, "stat", "fake://")[1]
    assert document["oldest"] == "2001-09-09T01:46:40+00:00"
    assert document["newest"] == "2001-09-09T01:46:45+00:00"


def test_a_store_that_fails_on_the_sample_still_has_totals(capsys, monkeypatch):
    fake = FakeBackend()
    fake.objects = {f"{0:032x}/{number:064x}": b"x" for number in range(3)}
    timeouts = set()

    def get_into(names, buffers, *, timeout_seconds):
        timeouts.add(timeout_seconds)
        return [BackendError("away")]

    monkeypatch.setattr(fake, "get_into", get_into)
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: fake)
    code, document, _ = run_json(capsys, "stat", "fake://k:geheim@h", "--timeout", "1.5")
    assert (code, document["pages"]) == (0, 3)
    assert document["sample"]["unreadable"] == {"store:error": 3}
    assert document["url"] == "fake://k:***@h"
    assert timeouts == {1.5}


def test_an_empty_store_has_no_pages(capsys, tmp_path):
    filled(f"file://{tmp_path}", keys="")
    assert "has no pages" in run_text(capsys, "stat", f"file://{tmp_path}")[1]
    document = run_json(capsys, "stat", f"file://{tmp_path}")[1]
    assert (document["pages"], document["oldest"], document["sizes"]) == (0, None, [])


@pytest.mark.parametrize(
    "words",
    [["stat"], ["stat", "memory://", "--sample", "-1"], ["stat", "memory://", "--namespace", "x"]],
)
def test_wrong_usage_is_one_line_and_exit_code_1(capsys, words):
    code, out, err = run_text(capsys, *words)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
