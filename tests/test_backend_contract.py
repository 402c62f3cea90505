"""The backend contract: names, options, the registry, and that the conformance suite has teeth."""

from __future__ import annotations

import os
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcodec.backend
from kvcodec.backend import (
    Backend,
    GetResult,
    ObjectInfo,
    PutResult,
    check_name,
    display_url,
    open_backend,
    parse_byte_count,
    parse_options,
)
from kvcodec.errors import BackendError, ConfigError
from kvcodec.testing import BackendTests
from kvcodec_backends._file_io import object_path
from kvcodec_backends.file import FileBackend
from kvcodec_backends.memory import MemoryBackend

# --- names

HEX = "0123456789abcdef"
names = st.builds(
    "{}/{}".format, st.text(HEX, min_size=32, max_size=32), st.text(HEX, min_size=64, max_size=64)
)
almost_names = st.one_of(
    st.text(max_size=200),
    st.text(HEX + "/.\\\0\nA", min_size=90, max_size=100),
    st.builds(
        lambda name, at, put: name[:at] + put + name[at + 1 :],
        names,
        st.integers(0, 97),
        st.sampled_from(["", "..", "/", "\\", "\0", "\n", " ", "G", "A", "%2e", "\u0660", "a/"]),
    ),
)


@given(name=names)
def test_a_right_name_leads_below_its_directory(name: str):
    assert check_name(name) == name
    path = object_path("/store/objects", name)
    assert os.path.normpath(path) == path
    assert path.startswith("/store/objects/")
    assert path.count("/") == 5


@settings(max_examples=1000)
@given(name=almost_names)
def test_no_other_name_gets_past_the_check(name: str):
    namespace, slash, digest = name.partition("/")
    is_right = (len(namespace), slash, len(digest)) == (32, "/", 64)
    if is_right and set(namespace + digest) <= set(HEX):
        assert check_name(name) == name
    else:
        with pytest.raises(ConfigError):
            check_name(name)


# --- options


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1b", 1),
        ("1k", 1000),
        ("1KiB", 1024),
        ("64MiB", 64 << 20),
        ("10GB", 10**10),
        ("2 TiB", 2 << 40),
        (" 7mb ", 7_000_000),
    ],
)
def test_byte_counts_are_read(text: str, expected: int):
    assert parse_byte_count("max_bytes", text) == expected


@pytest.mark.parametrize("text", ["", "-1", "1.5GB", "GB", "1PB", "0x10", "1iB", "1 G B", "1e9"])
def test_other_byte_counts_are_refused(text: str):
    with pytest.raises(ConfigError, match=r"max_bytes is .* wanted a number of bytes"):
        parse_byte_count("max_bytes", text)


def test_options_are_known_and_given_once():
    parts, options = parse_options("file:///a/b?max_bytes=1&fsync=", ["fsync", "max_bytes"])
    assert parts.path == "/a/b"
    assert options == {"max_bytes": "1", "fsync": ""}
    with pytest.raises(ConfigError, match="unknown option 'max', known: fsync, max_bytes"):
        parse_options("file:///a?max=1", ["max_bytes", "fsync"])
    with pytest.raises(ConfigError, match="'fsync' is given twice"):
        parse_options("file:///a?fsync=1&fsync=0", ["fsync"])


def test_a_url_that_is_refused_keeps_its_secrets():
    for options in ("max=1", "max_bytes=1&max_bytes=2"):
        with pytest.raises(ConfigError) as raised:
            parse_options(f"redis://user:geheim@host?{options}", ["max_bytes"])
        assert "geheim" not in str(raised.value)
        assert "redis://user:***@host" in str(raised.value)


def test_a_plus_in_an_option_stays_one():
    """Schemes have it, and an option may be the URL of another store."""
    _, options = parse_options("tier+ram://?store=fsspec+s3://bucket/a%26b%2B", ["store"])
    assert options == {"store": "fsspec+s3://bucket/a&b+"}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://user:geheim@host:6379/0", "redis://user:***@host:6379/0"),
        ("redis://:geheim@host", "redis://:***@host"),
        ("fsspec+s3://b?key=AKIA1&secret=geheim&a=1", "fsspec+s3://b?key=***&secret=***&a=1"),
        ("fsspec+az://c?sas_token=geheim", "fsspec+az://c?sas_token=***"),
        ("file:///a/b?max_bytes=1", "file:///a/b?max_bytes=1"),
        ("redis+unix:///run/redis.sock?db=1", "redis+unix:///run/redis.sock?db=1"),
        ("file:///a#b", "file:///a#b"),
        ("redis://:geheim@[host", "redis://***"),
        ("/a/path", "/a/path"),
        ("tier+ram://?store=redis://:geheim@host", "tier+ram://?store=redis://:***@host"),
        ("tier+ram://?store=a://b%3Fkey=c", "tier+ram://?store=a://b?key=***"),
        ("hicache+x://?json=%7B%22u%22:%22s3://k:geheim%22%7D", "hicache+x://?json=***"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str):
    assert display_url(url) == shown


# --- the registry


class Entry:
    def __init__(self, name: str, backend_class: type[Backend]) -> None:
        self.name = name
        self.backend_class = backend_class

    def load(self) -> type[Backend]:
        return self.backend_class


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry("memory", MemoryBackend), Entry("file", FileBackend)]
    monkeypatch.setattr(kvcodec.backend, "entry_points", lambda group: entries)


@pytest.mark.usefixtures("registered")
def test_a_url_is_opened_by_its_scheme(tmp_path: Path):
    assert isinstance(open_backend("memory://"), MemoryBackend)
    with_files = open_backend(f"file://{tmp_path}/store?max_bytes=1MiB")
    assert isinstance(with_files, FileBackend)
    with_files.close()


@pytest.mark.usefixtures("registered")
def test_the_part_of_a_scheme_before_a_plus_finds_its_backend():
    assert isinstance(open_backend("memory+other://"), MemoryBackend)


@pytest.mark.usefixtures("registered")
def test_a_store_that_must_exist_is_not_made_by_opening_it(tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no store in this directory"):
        open_backend(f"file://{tmp_path}/typo", create=False)
    assert not (tmp_path / "typo").exists()


def test_a_backend_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    class Unloadable(Entry):
        def load(self) -> type[Backend]:
            raise ModuleNotFoundError("No module named 'cloud'")

    entries = [Unloadable("cloud", MemoryBackend)]
    monkeypatch.setattr(kvcodec.backend, "entry_points", lambda group: entries)
    with pytest.raises(ConfigError, match=r"No module named 'cloud'; pip install 'kvcodec\[cloud"):
        open_backend("cloud://")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("url", ["", "/a/path", "s3://bucket", "files:///a"])
def test_an_unknown_scheme_names_the_known_ones(url: str):
    with pytest.raises(ConfigError, match="known schemes: file://, memory://"):
        open_backend(url)


# --- the suite finds what is broken


class Shared(MemoryBackend):
    """A store for one test; each subclass breaks one promise."""

    def __init__(self) -> None:
        super().__init__(STORE_NAME)


STORE_NAME = "contract"


class LosesTheLastByte(Shared):
    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        cut = [view[: max(1, len(view) - 1)] for view in objects]
        return super().put(names, cut, timeout_seconds=timeout_seconds)


class KeepsTheFirst(Shared):
    """As a store that skips what is there already: a damaged object is never replaced."""

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        there = super().exists(names, timeout_seconds=timeout_seconds)
        new = [pair for pair, old in zip(zip(names, objects), there) if not old]  # noqa: B905
        super().put(
            [name for name, _ in new], [view for _, view in new], timeout_seconds=timeout_seconds
        )
        return [None] * len(names)


class ShiftsAfterAMiss(Shared):
    """Hits move up into the places of misses."""

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        there = super().exists(names, timeout_seconds=timeout_seconds)
        hits = [name for name, found in zip(names, there, strict=True) if found]
        results = super().get_into(hits, buffers[: len(hits)], timeout_seconds=timeout_seconds)
        return results + [None] * (len(names) - len(hits))


class FillsTheBuffer(Shared):
    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        results = super().get_into(names, buffers, timeout_seconds=timeout_seconds)
        for buffer, result in zip(buffers, results, strict=True):
            if isinstance(result, int) and result < len(buffer):
                buffer[result:] = bytes(len(buffer) - result)
        return results


class CutsToTheBuffer(Shared):
    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        results = super().get_into(names, buffers, timeout_seconds=timeout_seconds)
        return [
            min(result, len(buffer)) if isinstance(result, int) else result
            for result, buffer in zip(results, buffers, strict=True)
        ]


class IgnoresTheDeadline(Shared):
    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        return super().put(names, objects, timeout_seconds=60)


class RaisesWhenClosed(Shared):
    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        results = super().get_into(names, buffers, timeout_seconds=timeout_seconds)
        for result in results:
            if isinstance(result, BackendError) and timeout_seconds:
                raise result
        return results


class WorksAfterClose(Shared):
    def close(self) -> None:
        pass


class ListsEverything(Shared):
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return super().list()


class AcceptsAnyName(Shared):
    def exists(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        return [
            len(name) == 97
            and name.isprintable()
            and name[32] == "/"
            and set(name) <= set(string.hexdigits + "/.")
            and super(AcceptsAnyName, self).exists([name], timeout_seconds=timeout_seconds)[0]
            for name in names
        ]


class WritesInPieces(Shared):
    """Two writers of one name meet in the middle."""

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        for name, view in zip(names, objects, strict=True):
            half = len(view) // 2
            if half:
                super().put([name], [view[:half]], timeout_seconds=timeout_seconds)
                time.sleep(0.001)
        return super().put(names, objects, timeout_seconds=timeout_seconds)


class DeletesBlindly(Shared):
    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        super().delete(names, timeout_seconds=timeout_seconds)
        return [True] * len(names)


STALL = threading.Event()


@contextmanager
def stalled_store() -> Iterator[None]:
    STALL.set()
    try:
        yield
    finally:
        STALL.clear()


class WaitsForEver(Shared):
    """As a client without a time-out of its own."""

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        if STALL.is_set():
            time.sleep(4.0)
        return super().put(names, objects, timeout_seconds=timeout_seconds)


class MakesWhatIsMissing(MemoryBackend):
    @classmethod
    def from_url(cls, url: str, *, create: bool = True) -> MemoryBackend:
        return super().from_url(url)


class CountsHits(Shared):
    """The number of objects found, wherever they stand."""

    def exists_prefix(self, names: Sequence[str], *, timeout_seconds: float) -> int:
        return sum(super().exists(names, timeout_seconds=timeout_seconds))


class LendsWhatChanges(Shared):
    """As a store that lends memory it uses again."""

    block = bytearray(5000)

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        self.block[: len(objects[-1])] = objects[-1]
        return super().put(names, objects, timeout_seconds=timeout_seconds)

    def lend(self, name: str) -> AbstractContextManager[memoryview] | None:
        return nullcontext(memoryview(self.block).toreadonly())


class LendsAfterClose(Shared):
    def close(self) -> None:
        pass


class ForgetsOnReopening(MemoryBackend):
    def __init__(self) -> None:
        super().__init__("")


FOUND_BY = {
    LosesTheLastByte: "objects_of_any_size_come_back_as_they_were_put",
    KeepsTheFirst: "a_put_of_the_same_name_replaces_the_object",
    ShiftsAfterAMiss: "a_missing_object_is_none_and_moves_no_other_result",
    FillsTheBuffer: "reading_leaves_the_rest_of_a_buffer_alone",
    CutsToTheBuffer: "an_object_larger_than_its_buffer_answers_with_its_length",
    IgnoresTheDeadline: "a_deadline_of_zero_answers_at_once",
    RaisesWhenClosed: "a_closed_backend_answers_with_errors",
    WorksAfterClose: "a_closed_backend_answers_with_errors",
    ListsEverything: "a_list_has_one_namespace_or_all",
    AcceptsAnyName: "a_wrong_name_is_a_config_error_everywhere",
    WritesInPieces: "concurrent_writers_of_one_name_never_mix",
    DeletesBlindly: "exists_delete_list_and_stat_agree",
    WaitsForEver: "a_store_that_hangs_costs_a_call_its_deadline",
    MakesWhatIsMissing: "a_store_that_must_exist_is_not_made",
    CountsHits: "the_leading_run_ends_at_the_first_gap",
    LendsWhatChanges: "what_is_lent_is_what_was_put_whatever_happens_meanwhile",
    LendsAfterClose: "nothing_is_lent_that_is_not_there",
    ForgetsOnReopening: "a_reopened_store_has_its_objects",
}


def run_suite(backend_class: Callable[[], Backend], test: str) -> None:
    class Suite(BackendTests):
        timeout_seconds = 5.0

        def open_backend(self) -> Backend:
            return backend_class()

        def stalled(self) -> AbstractContextManager[None]:
            return stalled_store()

        def url_of_missing_store(self) -> tuple[type[Backend], str]:
            return MakesWhatIsMissing, f"memory://{os.urandom(8).hex()}"

    getattr(Suite(), f"test_{test}")()


@pytest.mark.parametrize("broken", FOUND_BY, ids=lambda broken: broken.__name__)
def test_the_suite_finds_a_broken_promise(broken: Callable[[], Backend]):
    with pytest.raises((AssertionError, BackendError)):
        run_suite(broken, FOUND_BY[broken])


def test_the_comparison_with_a_dict_finds_a_broken_promise():
    with pytest.raises(AssertionError):
        run_suite(DeletesBlindly, "any_sequence_of_calls_agrees_with_a_dict")


def test_kvcodec_testing_needs_neither_pytest_nor_hypothesis():
    code = "import sys, kvcodec.testing; assert not {'pytest', 'hypothesis'} & set(sys.modules)"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
