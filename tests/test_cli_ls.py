"""``kvcodec ls``."""

from __future__ import annotations

import os

import pytest
from cli_pages import filled, flipped, namespace_of, run_json, run_text
from fake_backend import FakeBackend
from hypothesis import given
from hypothesis import strategies as st

from kvcodec.backend import ObjectInfo
from kvcodec.cli import stores
from kvcodec.cli.listing import Listing, Sort
from kvcodec.errors import BackendError

DIGESTS = [namespace_of(rank).digest.hex() for rank in range(2)]
NAMES = [f"{digest}/{number:064x}" for digest in sorted(DIGESTS) for number in range(3)]


class Dated(FakeBackend):
    """Six objects: the later in the order of names, the smaller and the newer."""

    def list(self, prefix: str = ""):
        self._begin("list", [prefix])
        for at, name in enumerate(NAMES):
            if name.startswith(prefix):
                yield ObjectInfo(name, 600 - 100 * at, 1_000_000_000.0 + at)


@pytest.fixture
def fake(monkeypatch) -> Dated:
    backend = Dated()
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: backend)
    return backend


def test_namespaces_are_counted(capsys, fake):
    code, document, err = run_json(capsys, "ls", "fake://u:geheim@h")
    assert (code, err) == (0, "")
    assert (document["url"], document["pages"], document["stored_bytes"]) == (
        "fake://u:***@h",
        6,
        2100,
    )
    assert document["namespace_count"] == 2
    assert document["namespaces"] == [
        {
            "namespace": sorted(DIGESTS)[0],
            "pages": 3,
            "stored_bytes": 1500,
            "oldest": "2001-09-09T01:46:40+00:00",
            "newest": "2001-09-09T01:46:42+00:00",
        },
        {
            "namespace": sorted(DIGESTS)[1],
            "pages": 3,
            "stored_bytes": 600,
            "oldest": "2001-09-09T01:46:43+00:00",
            "newest": "2001-09-09T01:46:45+00:00",
        },
    ]
    code, out, _ = run_text(capsys, "ls", "fake://")
    assert code == 0
    assert "2 namespaces, 6 pages, 2.05 KiB" in out
    assert fake.closed


@pytest.mark.parametrize(
    ("sort", "expected"), [("name", [0, 1]), ("size", [0, 1]), ("time", [1, 0])]
)
def test_namespaces_are_sorted_and_limited(capsys, fake, sort, expected):
    _, document, _ = run_json(capsys, "ls", "fake://", "--sort", sort)
    found = [row["namespace"] for row in document["namespaces"]]
    assert found == [sorted(DIGESTS)[at] for at in expected]
    _, document, _ = run_json(capsys, "ls", "fake://", "--sort", sort, "--limit", "1")
    assert [row["namespace"] for row in document["namespaces"]] == found[:1]
    assert (document["namespace_count"], document["pages"]) == (2, 6)
    _, out, _ = run_text(capsys, "ls", "fake://", "--sort", sort, "--limit", "1")
    assert "1 not shown" in out


def test_pages_of_a_namespace_are_names_one_per_line(capsys, fake):
    wanted = NAMES[:3]
    code, out, _ = run_text(capsys, "ls", "fake://", "--namespace", wanted[0][:32])
    assert (code, out.splitlines()) == (0, wanted)
    _, out, _ = run_text(capsys, "ls", "fake://", "--namespace", wanted[0][:32], "--long")
    assert out.splitlines()[0] == f"{600:>12} 2001-09-09T01:46:40+00:00 {wanted[0]}"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [0, 1, 2]),
        (["--sort", "name"], [0, 1, 2]),
        (["--sort", "size"], [0, 1, 2]),
        (["--sort", "time"], [2, 1, 0]),
        (["--sort", "time", "--limit", "2"], [2, 1]),
        (["--limit", "1"], [0]),
    ],
)
def test_pages_are_sorted_and_limited(capsys, fake, options, expected):
    words = ["ls", "fake://", "--namespace", NAMES[0][:32], *options]
    _, out, _ = run_text(capsys, *words)
    assert out.splitlines() == [NAMES[at] for at in expected]
    _, document, _ = run_json(capsys, *words)
    assert [row["name"] for row in document["objects"]] == [NAMES[at] for at in expected]
    assert document["pages"] == len(expected)
    assert set(document["objects"][0]) == {"name", "stored_bytes", "modified"}


def test_long_says_whose_the_pages_are(capsys, tmp_path):
    url = f"file://{tmp_path}"
    filled(url)
    _, document, _ = run_json(capsys, "ls", url, "--long")
    found = {row["namespace"]: row for row in document["namespaces"]}
    assert found[DIGESTS[1]]["identity"] == {"model": "test/model", "rank": "1"}
    assert found[DIGESTS[1]]["layout"] == "bf16, 16 tokens, layers 2-5, key 2x64, value 2x64"
    _, out, _ = run_text(capsys, "ls", url, "--long")
    assert "model=test/model rank=0 | bf16, 16 tokens" in out
    _, document, _ = run_json(capsys, "ls", url)
    assert "identity" not in document["namespaces"][0]


def test_a_namespace_whose_pages_cannot_be_read_is_listed_all_the_same(capsys, fake, monkeypatch):
    timeouts = set()

    def get_into(names, buffers, *, timeout_seconds):
        timeouts.add(timeout_seconds)
        return [BackendError("\x1b[2Jaway")]

    monkeypatch.setattr(fake, "get_into", get_into)
    code, out, _ = run_text(capsys, "ls", "fake://", "--long", "--timeout", "2.5")
    assert code == 0
    assert "\\x1b[2Jaway" in out and "\x1b" not in out
    assert timeouts == {2.5}
    _, document, _ = run_json(capsys, "ls", "fake://", "--long")
    assert document["namespaces"][0]["problem"] == "\x1b[2Jaway"


def test_a_damaged_example_is_a_problem_and_no_failure(capsys, tmp_path):
    from cli_pages import fill

    url = f"file://{tmp_path}"
    pages = filled(url, keys="a", ranks=1)
    fill(url, {name: flipped(page, 3) for name, page in pages.items()})
    code, document, _ = run_json(capsys, "ls", url, "--long")
    assert code == 0 and "does not start like a page" in document["namespaces"][0]["problem"]


def test_an_empty_store_says_so(capsys, tmp_path):
    filled(f"file://{tmp_path}", keys="")
    assert run_text(capsys, "ls", f"file://{tmp_path}")[1].endswith("has no pages\n")
    code, document, _ = run_json(capsys, "ls", f"file://{tmp_path}")
    assert (code, document["namespaces"]) == (0, [])
    code, document, _ = run_json(capsys, "ls", f"file://{tmp_path}", "--namespace", DIGESTS[0])
    assert (code, document["objects"]) == (0, [])


@pytest.mark.parametrize("more", [[], ["--namespace", NAMES[0][:32]]])
def test_a_listing_that_breaks_off_leaves_no_half_document(capsys, fake, monkeypatch, more):
    def broken(prefix: str = ""):
        yield ObjectInfo(NAMES[0], 1, 0.0)
        raise BackendError("gone")

    monkeypatch.setattr(fake, "list", broken)
    code, document, _ = run_json(capsys, "ls", "fake://", *more)
    assert (code, document["error"]["kind"]) == (4, "BackendError")


def test_a_listing_is_shown_as_it_comes(fake, monkeypatch, capsys):
    """Unsorted, the first line is out before the store has listed the second page."""
    shown = []

    def slow(prefix: str = ""):
        for name in NAMES[:3]:
            shown.append(len(capsys.readouterr().out.splitlines()))
            yield ObjectInfo(name, 1, 0.0)

    monkeypatch.setattr(fake, "list", slow)
    run_text(capsys, "ls", "fake://", "--namespace", NAMES[0][:32])
    assert shown == [0, 1, 1]


@pytest.mark.parametrize(
    "words",
    [
        ["ls"],
        ["ls", "memory://", "--namespace", "xyz"],
        ["ls", "memory://", "--limit", "-1"],
        ["ls", "memory://", "--sort", "colour"],
        ["ls", "memory://nowhere"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_1(capsys, words):
    code, out, err = run_text(capsys, *words)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1


infos = st.lists(
    st.builds(
        ObjectInfo,
        st.builds("{:032x}/{:064x}".format, st.integers(0, 2**128 - 1), st.integers(0, 2**256 - 1)),
        st.integers(0, 2**40),
        st.floats(0, 2**32),
    ),
    max_size=20,
    unique_by=lambda info: info.name,
)


@given(infos)
def test_a_listing_keeps_everything_and_sorts_as_python_does(objects):
    listing = Listing.of(objects)
    assert list(listing) == objects
    assert listing.stored_bytes == sum(info.stored_bytes for info in objects)
    by_name = listing.sorted(Sort.NAME)
    assert list(by_name) == sorted(objects, key=lambda info: info.name)
    assert list(listing.sorted(Sort.SIZE)) == sorted(objects, key=lambda info: -info.stored_bytes)
    assert list(listing.sorted(Sort.TIME)) == sorted(
        objects, key=lambda info: -info.modified_seconds
    )
    assert list(listing.oldest_first()) == sorted(objects, key=lambda i: i.modified_seconds)
    assert by_name.stored_bytes == listing.stored_bytes
    for place, info in enumerate(by_name):
        assert by_name.place_of(info.name) == place
        found = listing.in_namespace(info.name[:32])
        assert [each for each, is_in in zip(objects, found, strict=True) if is_in] == [
            each for each in objects if each.name[:32] == info.name[:32]
        ]


def test_a_listing_takes_little_memory():
    """Millions of pages fit: 64 bytes each, and what a growing buffer holds in reserve."""
    import tracemalloc

    tracemalloc.start()
    listing = Listing()
    for _ in range(20_000):
        listing.add(ObjectInfo(f"{os.urandom(16).hex()}/{os.urandom(32).hex()}", 1, 0.0))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 90 * len(listing)
