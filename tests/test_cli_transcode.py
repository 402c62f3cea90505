"""``kvcodec transcode``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cli_pages import (
    Dated,
    contents,
    fill,
    flipped,
    make_page,
    namespace_of,
    run_json,
    run_text,
)
from fake_backend import FakeBackend
from pages import decode_page, native_encode, rows_of_raw
from waiting import wait_until

from kvcodec.backend import open_backend
from kvcodec.cli import main, stores, transcoding, verification
from kvcodec.codec import Codec
from kvcodec.derotation import ROTARY_EXTENSION
from kvcodec.errors import BackendError, BackendFull
from kvcodec.extension import Extension
from kvcodec.format import EncodedPage
from kvcodec.layout import PageViews
from kvcodec.plan import PagePlan
from kvcodec.spec import CodecSpec
from kvcodec.store import PageStore, Pipeline

SPACE = namespace_of(0)
NAMES = [SPACE.object_name(key) for key in "abcdefgh"]
CONFIG = {"head_dim": 64, "rope_theta": 10000.0, "model_type": "llama"}


def pages_of(specs: dict[str, str], rank: int = 0) -> dict[str, bytes]:
    """By object name: a page for each key, in the spec given for it."""
    space = namespace_of(rank)
    return {
        space.object_name(key): make_page(key=key, spec=spec, namespace=space)
        for key, spec in specs.items()
    }


def expected(page: bytes, spec: str) -> bytes:
    """encode(decode(page)), by the plain way of both."""
    old = EncodedPage.parse(page)
    space, key = old.header.namespace, old.header.key
    plan = PagePlan.for_spec(space, CodecSpec.parse(spec), len(key.encode()))
    codec = Codec(1)
    try:
        return native_encode(codec, plan, key, rows_of_raw(space.layout, decode_page(old)))[0]
    finally:
        codec.close()


@pytest.fixture
def source(tmp_path: Path) -> tuple[str, dict[str, bytes]]:
    """A store of two ranks with three pages each, in kv8."""
    url = f"file://{tmp_path}/source"
    pages = {**pages_of(dict.fromkeys("abc", "kv8")), **pages_of(dict.fromkeys("abc", "kv8"), 1)}
    fill(url, pages)
    return url, pages


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> tuple[Dated, Dated]:
    """fake://source with eight pages in kv8, and fake://target."""
    both = {"fake://source": Dated(), "fake://target": Dated()}
    both["fake://source"].objects = pages_of(dict.fromkeys("abcdefgh", "kv8"))
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: both[url])
    return both["fake://source"], both["fake://target"]


FAKE = ["transcode", "fake://source", "--spec", "ecq-3"]


def puts(backend: FakeBackend) -> int:
    return sum(operation == "put" for operation, _ in backend.calls)


def test_pages_are_replaced_by_smaller_ones(capsys, source):
    url, pages = source
    code, document, err = run_json(capsys, "transcode", url, "--spec", "ecq-3")
    found = contents(url)
    assert found == {name: expected(page, "ecq-3") for name, page in pages.items()}
    assert (code, err) == (0, "")
    assert document.pop("seconds") >= 0
    left = ("already", "fewer_bits", "state", "raw", "other", "nonfinite", "no_gain", "unfit")
    assert document == {
        "source": url,
        "target": None,
        "namespace": None,
        "spec": "key=ecq-3-channel value=ecq-3",
        "from": [],
        "dry_run": False,
        "transcoded": 6,
        "bytes_before": sum(map(len, pages.values())),
        "bytes_after": sum(map(len, found.values())),
        "left": dict.fromkeys(left, 0),
        "unfit_reasons": [],
        "copied": 0,
        "copied_bytes": 0,
        "present": 0,
        "changed": 0,
        "gone": 0,
        "bad": 0,
        "unsupported": 0,
        "unread": 0,
        "unwritten": 0,
        "unasked": 0,
        "reasons": {},
        "pages": [],
    }


def test_a_second_run_has_nothing_to_do(capsys, fakes):
    run_json(capsys, *FAKE)
    written = puts(fakes[0])
    _, document, _ = run_json(capsys, *FAKE)
    assert (document["transcoded"], document["left"]["already"]) == (0, 8)
    assert puts(fakes[0]) == written == 8


def test_an_engine_reads_the_new_pages(capsys, source):
    """The same keys in the same namespace, whatever spec the reader has."""
    url, pages = source
    run_json(capsys, "transcode", url, "--spec", "ecq-3")
    pipeline = Pipeline(open_backend(url))
    shape = (3, 4, 2, 16, 64)
    arrays = [np.zeros(shape, np.uint16) for _ in "kv"]
    store = PageStore(pipeline, SPACE, CodecSpec.parse("kv8"))
    assert store.prefetch(list("abc"), PageViews.of_arrays(SPACE.layout, arrays)) == [True] * 3
    pipeline.close()
    for index, name in enumerate(NAMES[:3]):
        page = EncodedPage.parse(expected(pages[name], "ecq-3"))
        for array, rows in zip(arrays, rows_of_raw(SPACE.layout, decode_page(page)), strict=True):
            np.testing.assert_array_equal(array[index], rows)


def test_what_stays_is_counted_and_said(capsys, tmp_path):
    url = f"file://{tmp_path}/store"
    specs = dict(zip("abcdef", ("raw", "kv2", "kv4", "k8v4", "kv8", "lossless"), strict=True))
    pages = pages_of(specs)
    fill(url, pages)
    _, document, _ = run_json(capsys, "transcode", url, "--spec", "kv4")
    assert document["transcoded"] == 3
    assert (document["left"]["raw"], document["left"]["already"]) == (1, 1)
    assert document["left"]["fewer_bits"] == 1
    found = contents(url)
    assert [found[name] == pages[name] for name in NAMES[:6]] == [True] * 3 + [False] * 3
    out = run_text(capsys, "transcode", url, "--spec", "kv4")[1]
    assert "1 are raw, perhaps on purpose: --from raw takes them too" in out
    assert "4 are encoded so already" in out and "1 have as few bits already" in out


def test_from_names_the_pages_that_are_meant(capsys, tmp_path):
    url = f"file://{tmp_path}/store"
    pages = pages_of(dict(zip("abcd", ("raw", "kv8", "k8v4", "lossless"), strict=True)))
    fill(url, pages)
    words = ["transcode", url, "--spec", "kv2", "--from", "raw", "--from", "k8v4"]
    _, document, _ = run_json(capsys, *words)
    assert (document["transcoded"], document["left"]["other"]) == (2, 2)
    assert document["from"] == ["key=raw value=raw", "key=int8-g64 value=int4-g64"]
    found = contents(url)
    assert [found[name] == pages[name] for name in NAMES[:4]] == [False, True, False, True]
    assert "2 are encoded otherwise than --from says" in run_text(capsys, *words)[1]


def test_nan_stays_raw(capsys, tmp_path):
    url = f"file://{tmp_path}/store"
    pages = {NAMES[0]: make_page(key="a", spec="raw", namespace=SPACE, nan=True)}
    fill(url, pages)
    _, document, _ = run_json(capsys, "transcode", url, "--spec", "kv4", "--from", "raw")
    assert document["left"]["nonfinite"] == 1
    assert contents(url) == pages


def test_a_spec_that_does_not_fit_is_said_once(capsys, source):
    url, pages = source
    words = ["transcode", url, "--spec", "key=int4 value=int4 layer.99=int2,int2"]
    _, document, _ = run_json(capsys, *words)
    assert document["left"]["unfit"] == 6
    assert len(document["unfit_reasons"]) == 1 and "layer" in document["unfit_reasons"][0]
    assert document["unfit_reasons"][0] in run_text(capsys, *words)[1]
    assert contents(url) == pages


# --- damage, and things that are no pages


def test_damage_is_reported_and_not_touched(capsys, source):
    url, pages = source
    first, second, third, *_ = pages
    newer = bytearray(pages[second])
    newer[8] = 9
    broken = {first: flipped(pages[first], -1), second: bytes(newer), third: make_page(key="other")}
    fill(url, broken)
    code, document, _ = run_json(capsys, "transcode", url, "--spec", "ecq-3")
    assert (code, document["transcoded"]) == (2, 3)
    assert document["reasons"] == {
        "corrupt:section_checksum": 1,
        "corrupt:name": 1,
        "unsupported:version": 1,
    }
    found = contents(url)
    assert {name: found[name] for name in broken} == broken
    code, out, _ = run_text(capsys, "transcode", url, "--spec", "ecq-3")
    assert code == 2 and "3 could not be transcoded" in out and first in out


def test_what_is_no_page_of_ours_stays(capsys, source):
    url, _ = source
    folder = Path(url[7:])
    others = [folder / "objects" / "README", folder / "somebody-else.db"]
    for other in others:
        other.write_bytes(b"not ours")
    code, document, _ = run_json(capsys, "transcode", url, "--spec", "ecq-3")
    assert (code, document["transcoded"]) == (0, 6)
    assert [other.read_bytes() for other in others] == [b"not ours"] * 2


def test_a_mistake_of_ours_costs_no_page(capsys, fakes, monkeypatch):
    """A new page that is not sound is not written."""
    before = dict(fakes[0].objects)

    class Careless(transcoding.Transcoder):
        def transcode(self, page):
            outcome, found = super().transcode(page)
            found[-1] ^= 1
            return outcome, found

    monkeypatch.setattr("kvcodec.cli.transcoding_text.Transcoder", Careless)
    code, document, _ = run_json(capsys, *FAKE)
    assert (code, document["transcoded"], document["bad"]) == (2, 0, 8)
    assert fakes[0].objects == before


# --- another store


def test_another_store_gets_everything_and_the_first_stays(capsys, tmp_path):
    url, target = f"file://{tmp_path}/source", f"file://{tmp_path}/target"
    pages = pages_of(dict(zip("abcd", ("raw", "kv8", "kv2", "lossless"), strict=True)))
    fill(url, pages)
    code, document, _ = run_json(capsys, "transcode", url, target, "--spec", "kv4")
    assert (code, document["transcoded"], document["copied"]) == (0, 2, 2)
    assert document["copied_bytes"] == len(pages[NAMES[0]]) + len(pages[NAMES[2]])
    assert contents(url) == pages
    assert contents(target) == {
        name: expected(page, "kv4") if name in (NAMES[1], NAMES[3]) else page
        for name, page in pages.items()
    }
    _, document, _ = run_json(capsys, "transcode", url, target, "--spec", "ecq-2.5")
    assert (document["transcoded"], document["copied"], document["present"]) == (0, 0, 4)
    out = run_text(capsys, "transcode", url, target, "--spec", "kv4")[1]
    assert "4 were there already" in out


def test_a_target_that_cannot_be_listed_is_asked_page_by_page(capsys, fakes, monkeypatch):
    source, target = fakes
    target.objects[NAMES[0]] = b"there"

    def no_list(prefix: str = ""):
        raise BackendError("this store cannot list")

    monkeypatch.setattr(target, "list", no_list)
    words = ["transcode", "fake://source", "fake://target", "--spec", "ecq-3"]
    _, document, _ = run_json(capsys, *words)
    assert (document["transcoded"], document["present"]) == (7, 1)
    assert target.objects[NAMES[0]] == b"there"
    assert puts(source) == 0


# --- which pages, how fast, and whether at all


def test_only_old_pages_of_one_namespace(capsys, source):
    url, pages = source
    ours = [name for name in pages if name[:32] == SPACE.digest.hex()]
    old = next(Path(url[7:]).glob(f"objects/*/*/{ours[0].partition('/')[2]}"))
    os.utime(old, (time.time() - 7200,) * 2)
    words = ["transcode", url, "--spec", "ecq-3"]
    _, document, _ = run_json(capsys, *words, "--older-than", "1h")
    assert document["transcoded"] == 1
    changed = {name for name, page in contents(url).items() if page != pages[name]}
    assert changed == {ours[0]}
    _, document, _ = run_json(capsys, *words, "--namespace", SPACE.digest.hex())
    assert (document["transcoded"], document["left"]["already"]) == (2, 1)
    changed = {name for name, page in contents(url).items() if page != pages[name]}
    assert changed == set(ours)


def test_a_limit_takes_the_oldest_pages(capsys, fakes):
    source, _ = fakes
    before = dict(source.objects)
    for done in (3, 6, 8):
        _, document, _ = run_json(capsys, *FAKE, "--limit", "3", "--threads", "1")
        changed = {name for name, page in source.objects.items() if page != before[name]}
        assert len(changed) == done
    assert document["unasked"] == 0
    source.objects = before
    run_json(capsys, *FAKE, "--limit", "3")
    assert puts(source) == 11
    out = run_text(capsys, *FAKE, "--limit", "1", "--threads", "1")[1]
    assert "1 pages transcoded" in out and "are left for another run" in out


def test_a_dry_run_writes_nothing_and_knows_what_it_would_save(capsys, source, tmp_path):
    url, pages = source
    words = ["transcode", url, "--spec", "ecq-3"]
    _, dry, _ = run_json(capsys, *words, "--dry-run")
    assert contents(url) == pages
    _, real, _ = run_json(capsys, *words)
    assert (dry.pop("dry_run"), real.pop("dry_run")) == (True, False)
    assert dry.pop("seconds") >= 0 and real.pop("seconds") >= 0
    assert dry == real
    target = tmp_path / "target"
    words = ["transcode", url, f"file://{target}", "--spec", "ecq-2.5", "--dry-run"]
    assert "6 pages would be transcoded" in run_text(capsys, *words)[1]
    assert not target.exists()


def test_the_rate_holds_it_back(capsys, source):
    url, pages = source
    rate = sum(map(len, pages.values())) * 2
    started = time.monotonic()
    words = ["transcode", url, "--spec", "ecq-3", "--rate", f"{rate}/s"]
    assert run_json(capsys, *words)[1]["transcoded"] == 6
    assert time.monotonic() - started >= 5 / 12 - 0.25


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_work_at_the_same_time(capsys, fakes, threads):
    barrier = threading.Barrier(threads, timeout=30)
    fakes[0].hook = lambda operation, names: operation == "get" and barrier.wait()
    _, document, _ = run_json(capsys, *FAKE, "--threads", str(threads))
    assert document["transcoded"] == 8


def test_rotary_is_for_pages_that_do_not_say(capsys, source, tmp_path):
    url, _ = source
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    run_json(capsys, "transcode", url, "--spec", "ecq-3", "--rotary", str(tmp_path))
    for page in contents(url).values():
        [extension] = EncodedPage.parse(page).header.extensions
        assert isinstance(extension, Extension) and extension.type == ROTARY_EXTENSION
    words = ["transcode", url, "--spec", "ecq-2.5", "--rotary"]
    for path, spec, message in (
        (str(config), "kv4", "--rotary has no effect: no keys"),
        (str(tmp_path / "nothing"), "ecq-2.5", "is no model's config"),
    ):
        words = ["transcode", url, "--spec", spec, "--rotary", path]
        code, _, err = run_text(capsys, *words)
        assert code == 1 and message in err
    config.write_text(json.dumps(CONFIG | {"rope_scaling": {"mrope_section": [1, 2]}}))
    code, _, err = run_text(capsys, "transcode", url, "--spec", "ecq-2.5", "--rotary", str(config))
    assert code == 1 and "mrope" in err


# --- others write, delete and fail meanwhile


@pytest.mark.parametrize("what", ["replaced", "deleted"])
def test_a_page_that_changed_meanwhile_is_left_to_who_did_it(capsys, fakes, what):
    """A finer page that an engine wrote stays, a deleted one does not come back."""
    source, _ = fakes
    finer = make_page(key="c", spec="raw", namespace=SPACE)

    def hook(operation, names):
        if operation == "stat" and names[0] == NAMES[2]:
            source.objects.pop(NAMES[2], None)
            if what == "replaced":
                source.objects[NAMES[2]] = finer

    source.hook = hook
    code, document, _ = run_json(capsys, *FAKE)
    assert (code, document["transcoded"]) == (0, 7)
    assert (document["changed"], document["gone"]) == ((1, 0) if what == "replaced" else (0, 1))
    assert source.objects.get(NAMES[2]) == (finer if what == "replaced" else None)


def test_engines_that_write_meanwhile_find_sound_pages(capsys, tmp_path):
    """Pages are rewritten and read all the time: every read is one whole page or the other."""
    url = f"file://{tmp_path}/store"
    pages = pages_of(dict.fromkeys("abcdefgh", "kv8"))
    fill(url, pages)
    smaller = {name: expected(page, "ecq-3") for name, page in pages.items()}
    stop, seen = threading.Event(), set()

    def engine() -> None:
        backend = open_backend(url)
        at = 0
        while not stop.is_set():
            name = NAMES[at % 8]
            buffer = bytearray(1 << 16)
            (size,) = backend.get_into([name], [memoryview(buffer)], timeout_seconds=5)
            assert isinstance(size, int)
            seen.add(bytes(buffer[:size]))
            if at % 5 == 0:
                backend.put([name], [memoryview(pages[name])], timeout_seconds=5)
            at += 1
        backend.close()

    thread = threading.Thread(target=engine)
    thread.start()
    try:
        for _ in range(5):
            code, document, _ = run_json(capsys, "transcode", url, "--spec", "ecq-3")
            assert (code, document["pages"]) == (0, [])
    finally:
        stop.set()
        thread.join()
    assert seen <= {*pages.values(), *smaller.values()}
    assert seen & {*smaller.values()}
    run_json(capsys, "transcode", url, "--spec", "ecq-3")
    assert contents(url) == smaller


def test_what_cannot_be_read_or_written_is_reported(capsys, fakes, monkeypatch):
    source, _ = fakes
    get_into, put_all = source.get_into, source.put

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
    monkeypatch.setattr(source, "put", store)
    code, document, _ = run_json(capsys, *FAKE, "--timeout", "2.5")
    assert (code, document["transcoded"]) == (4, 6)
    assert document["reasons"] == {"source:BackendError": 1, "source:BackendFull": 1}
    assert (document["unread"], document["unwritten"]) == (1, 1)
    assert "\x1b" not in run_text(capsys, *FAKE, "--timeout", "2.5")[1]


@pytest.mark.parametrize("method", ["get_into", "put"])
def test_a_store_that_is_away_is_given_up(capsys, fakes, monkeypatch, method):
    monkeypatch.setattr(verification, "MOST_FAILURES_IN_A_ROW", 3)
    monkeypatch.setattr(fakes[0], method, lambda *a, **k: [BackendError("away")])
    code, document, _ = run_json(capsys, *FAKE, "--threads", "1")
    assert (code, document["transcoded"], document["unasked"]) == (4, 0, 5)
    assert "given up: 3" in run_text(capsys, *FAKE, "--threads", "1")[1]


def test_read_back_sees_a_store_that_loses_bytes(capsys, fakes, monkeypatch):
    source, _ = fakes
    put_all = source.put

    def store(names, objects, *, timeout_seconds):
        damaged = [memoryview(flipped(bytes(data), -1)) for data in objects]
        return put_all(names, damaged, timeout_seconds=timeout_seconds)

    assert run_json(capsys, *FAKE, "--limit", "2", "--read-back")[1]["transcoded"] == 2
    monkeypatch.setattr(source, "put", store)
    code, document, _ = run_json(capsys, *FAKE, "--read-back")
    assert (code, document["bad"], document["transcoded"]) == (2, 6, 0)


def test_an_interrupted_run_goes_on(capsys, fakes):
    source, _ = fakes
    before = dict(source.objects)
    main_thread = threading.main_thread().ident
    assert main_thread is not None

    def hook(operation, names):
        if operation == "get" and names[0] == sorted(NAMES)[3]:
            signal.pthread_kill(main_thread, signal.SIGINT)
            time.sleep(0.2)

    source.hook = hook
    code, document, _ = run_json(capsys, *FAKE, "--threads", "1", "--rate", "10GB/s")
    assert (code, document["error"]["kind"]) == (130, "Interrupted")
    source.hook = lambda operation, names: None
    done = sum(page != before[name] for name, page in source.objects.items())
    assert 0 < done < 8
    _, document, _ = run_json(capsys, *FAKE)
    assert (document["left"]["already"], document["transcoded"]) == (done, 8 - done)


def test_a_killed_run_leaves_whole_pages(capsys, source):
    url, pages = source
    script = "import sys; from kvcodec.cli import main; sys.exit(main())"
    words = ["transcode", url, "--spec", "ecq-3", "--rate", "60kB/s"]
    process = subprocess.Popen([sys.executable, "-c", script, *words], stderr=subprocess.PIPE)
    try:
        wait_until(lambda: contents(url) != pages)
    finally:
        process.kill()
        process.communicate(timeout=30)
    found = contents(url)
    smaller = {name: expected(page, "ecq-3") for name, page in pages.items()}
    assert all(found[name] in (pages[name], smaller[name]) for name in pages)
    assert run_json(capsys, "transcode", url, "--spec", "ecq-3")[0] == 0
    assert contents(url) == smaller


def test_progress_and_secrets(capsys, source, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "6/6 pages" in run_json(capsys, "transcode", source[0], "--spec", "ecq-3")[2]
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: Dated())
    words = ["transcode", "fake://u:geheim@h", "fake://v:geheim@h", "--spec", "kv4"]
    _, document, _ = run_json(capsys, *words)
    assert (document["source"], document["target"]) == ("fake://u:***@h", "fake://v:***@h")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["memory://a"],
        ["memory://a", "--spec", "kv5"],
        ["memory://a", "--spec", "kv4", "--from", "kv5"],
        ["memory://a", "memory://a", "--spec", "kv4"],
        ["memory://a", "--spec", "kv4", "--namespace", "x"],
        ["memory://a", "--spec", "kv4", "--older-than", "long"],
        ["memory://a", "--spec", "kv4", "--limit", "-1"],
        ["memory://a", "--spec", "kv4", "--rate", "fast"],
        ["memory://nowhere", "--spec", "kv4"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_1(capsys, words):
    assert main(["transcode", *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
