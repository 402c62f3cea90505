"""``kvcodec inspect``."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_pages import (
    fill,
    flipped,
    make_page,
    namespace_of,
    run_json,
    run_text,
)
from fake_backend import FakeBackend

from kvcodec.cli import pages, stores
from kvcodec.cli.app import inspect
from kvcodec.cli.quick import inspect_arguments
from kvcodec.errors import BackendError
from kvcodec.format import EncodedPage, Extension

KEY = "k" * 64


@pytest.fixture
def page_file(tmp_path: Path) -> Path:
    path = tmp_path / "page"
    path.write_bytes(make_page())
    return path


def write(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "page"
    path.write_bytes(data)
    return str(path)


# --- what it shows


def test_json_says_what_the_page_is(capsys, page_file):
    code, document, err = run_json(capsys, "inspect", str(page_file))
    assert (code, err) == (0, "")
    (page,) = document["pages"]
    header = EncodedPage.parse(page_file.read_bytes()).header
    assert page["status"] == "ok"
    assert page["problems"] == []
    assert page["key"] == KEY
    assert page["name"] == header.namespace.object_name(KEY)
    assert page["identity"] == {"model": "test/model", "rank": "0"}
    assert page["version"] == {"major": 1, "minor": 0}
    assert page["layout"]["dtype"] == "bf16"
    assert page["layout"]["layer_start"] == 2
    assert page["layout"]["streams"][0] == {
        "role": "key",
        "head_count": 2,
        "head_size": 64,
        "head_start": 0,
    }
    assert page["raw_bytes"] == 4 * 2 * 2 * 16 * 64 * 2
    assert page["page_bytes"] == page["available_bytes"] == page_file.stat().st_size
    assert page["ratio"] == pytest.approx(page["raw_bytes"] / page["page_bytes"], abs=1e-4)
    elements = page["raw_bytes"] / 2
    assert page["bits_per_element"] == pytest.approx(8 * page["page_bytes"] / elements, abs=1e-4)
    assert page["sections"] == {"count": 8, "ok": 8, "not_ok": []}


def test_overhead_and_codes_make_up_the_page(capsys, page_file):
    _, document, _ = run_json(capsys, "inspect", str(page_file))
    (page,) = document["pages"]
    parts = page["overhead"]
    codes = 4 * (2 * 16 * 64 + 2 * 16 * 64 // 2)
    assert parts["code_bytes"] == codes
    assert parts["parameter_bytes"] == 4 * 2 * 16 * (2 + 4)
    total = sum(parts[name] for name in parts if name.endswith("_bytes"))
    assert total == page["page_bytes"]
    assert parts["overhead_percent"] == pytest.approx(100 * (1 - codes / total), abs=1e-3)


def test_equal_layers_are_one_row_unless_layers_is_given(capsys, tmp_path):
    spec = "key=int8-g64 value=int4-asym-g64 layer.3=raw,int4-g64"
    path = write(tmp_path, make_page(spec=spec))
    _, document, _ = run_json(capsys, "inspect", path)
    rows = document["pages"][0]["layers"]
    assert [(row["first"], row["last"]) for row in rows] == [(2, 2), (3, 3), (4, 5)]
    assert rows[1]["key"] == {"codec": "raw", "stored_bytes": 4096, "bits_per_element": 16.0}
    assert rows[2]["value"]["codec"] == "int4-asym-g64"
    assert rows[2]["value"]["bits_per_element"] == 4.5
    _, document, _ = run_json(capsys, "inspect", "--layers", path)
    rows = document["pages"][0]["layers"]
    assert [(row["first"], row["last"]) for row in rows] == [(2, 2), (3, 3), (4, 4), (5, 5)]


def test_text_has_a_line_per_run_of_layers(capsys, page_file):
    code, out, _ = run_text(capsys, "inspect", str(page_file))
    assert code == 0
    assert "2-5     int8-g64" in out
    assert "status    ok" in out
    _, out, _ = run_text(capsys, "inspect", str(page_file), "--layers")
    assert "2-5" not in out
    assert len([line for line in out.splitlines() if "int4-asym-g64" in line]) == 4


@pytest.mark.parametrize("spec", ["key=int8-g64 value=raw", "key=raw value=int4-asym-g64"])
def test_scale_range_follows_the_data(capsys, tmp_path, spec):
    scales = []
    for scale in (1.0, 2.0):
        path = write(tmp_path, make_page(spec=spec, scale=scale))
        _, document, _ = run_json(capsys, "inspect", path)
        scales.append(document["pages"][0]["scales"])
    assert scales[0]["groups"] == 4 * 2 * 16
    assert 0 < scales[0]["minimum"] < scales[0]["maximum"]
    assert scales[1]["maximum"] == 2 * scales[0]["maximum"]
    assert scales[1]["minimum"] == 2 * scales[0]["minimum"]


def test_groups_outside_the_domain_are_counted(capsys, tmp_path):
    path = write(tmp_path, make_page(nan=True))
    _, document, _ = run_json(capsys, "inspect", path)
    assert document["pages"][0]["scales"]["nonfinite_groups"] == 8
    _, out, _ = run_text(capsys, "inspect", path)
    assert "8 outside the codec's domain" in out


def test_raw_page_has_no_scales(capsys, tmp_path):
    path = write(tmp_path, make_page(spec="raw"))
    _, document, _ = run_json(capsys, "inspect", path)
    assert document["pages"][0]["scales"] == {
        "groups": 0,
        "minimum": None,
        "maximum": None,
        "nonfinite_groups": 0,
    }


def test_extensions_are_listed(capsys, tmp_path):
    extensions = [Extension(1, b"\xab" * 40), Extension(77, b"xyz")]
    path = write(tmp_path, make_page(extensions=extensions))
    code, document, _ = run_json(capsys, "inspect", path)
    assert code == 0
    first, second = document["pages"][0]["extensions"]
    assert (first["type"], first["name"], first["bytes"]) == (1, "profile", 40)
    assert (first["data_hex"], first["truncated"]) == ("ab" * 32, True)
    assert (second["type"], second["name"], second["data_hex"]) == (77, None, "78797a")
    _, out, _ = run_text(capsys, "inspect", path)
    assert "type 77 (unknown), 3 B: 78797a" in out


# --- damage


def test_flip_in_a_section_is_bad_and_located(capsys, tmp_path):
    path = write(tmp_path, flipped(make_page(), -1))
    code, document, _ = run_json(capsys, "inspect", path)
    assert code == 2
    (page,) = document["pages"]
    assert page["status"] == "bad"
    assert page["problems"][0]["reason"] == "corrupt:section_checksum"
    assert page["sections"]["ok"] == 7
    (bad,) = page["sections"]["not_ok"]
    state = "corrupt:section_checksum"
    assert bad == {"section": 7, "layer": 5, "role": "value", "state": state}
    code, out, _ = run_text(capsys, "inspect", path)
    assert code == 2
    assert "7 of 8 have their checksum; 1 corrupt:section_checksum (7)" in out


def test_scales_come_from_sound_sections_only(capsys, tmp_path):
    header = EncodedPage.parse(make_page()).header
    path = write(tmp_path, flipped(make_page(), header.section_offsets[7]))
    _, document, _ = run_json(capsys, "inspect", path)
    assert document["pages"][0]["scales"]["groups"] == 7 * 2 * 16


@pytest.mark.parametrize("offset", [0, 3, 8 * 7, 70, 130, 400])
def test_flip_in_the_header_still_shows_what_can_be_read(capsys, tmp_path, offset):
    """Whatever bit of the header turned, the answer is exit code 2, and often the fields."""
    path = write(tmp_path, flipped(make_page(), offset))
    code, document, _ = run_json(capsys, "inspect", path)
    assert code == 2
    (page,) = document["pages"]
    assert page["status"] == "bad"
    assert not page["header_is_sound"]


def test_header_without_its_checksum_is_shown_as_doubtful(capsys, tmp_path):
    data = make_page()
    path = write(tmp_path, flipped(data, data.index(KEY.encode())))
    code, document, _ = run_json(capsys, "inspect", path)
    (page,) = document["pages"]
    assert code == 2
    assert page["problems"][0]["reason"] == "corrupt:header_checksum"
    assert page["key"] == "j" + KEY[1:]
    assert page["sections"]["ok"] == 8
    _, out, _ = run_text(capsys, "inspect", path)
    assert "the header is damaged" in out


def test_damaged_magic_is_named_and_the_rest_is_read(capsys, tmp_path):
    path = write(tmp_path, flipped(make_page(), 1))
    code, document, _ = run_json(capsys, "inspect", path)
    (page,) = document["pages"]
    assert code == 2
    assert [p["reason"] for p in page["problems"]] == ["corrupt:magic", "corrupt:header_checksum"]
    assert page["key"] == KEY


def test_damaged_page_bytes_field_is_mended(capsys, tmp_path):
    path = write(tmp_path, flipped(make_page(), 18))
    code, document, _ = run_json(capsys, "inspect", path)
    (page,) = document["pages"]
    assert code == 2
    assert page["problems"][0]["reason"] == "corrupt:length"
    assert page["sections"]["ok"] == 8


def test_truncated_page_shows_the_sections_that_are_left(capsys, tmp_path):
    data = make_page()
    header = EncodedPage.parse(data).header
    path = write(tmp_path, data[: header.section_offsets[3] + 10])
    code, document, _ = run_json(capsys, "inspect", path)
    (page,) = document["pages"]
    assert code == 2
    assert page["header_is_sound"]
    assert [p["reason"] for p in page["problems"]] == ["corrupt:length"]
    assert page["sections"]["ok"] == 3
    assert {bad["state"] for bad in page["sections"]["not_ok"]} == {"corrupt:missing"}


def test_bytes_after_the_page_are_damage(capsys, tmp_path):
    path = write(tmp_path, make_page() + bytes(64))
    code, document, _ = run_json(capsys, "inspect", path)
    assert code == 2
    assert document["pages"][0]["problems"][0]["reason"] == "corrupt:length"
    assert document["pages"][0]["sections"]["ok"] == 8


@pytest.mark.parametrize("size", [0, 1, 63, 64, 127, 128, 300])
def test_cut_header_is_damage(capsys, tmp_path, size):
    path = write(tmp_path, make_page()[:size])
    code, document, _ = run_json(capsys, "inspect", path)
    assert code == 2
    assert document["pages"][0]["available_bytes"] == size
    code, out, _ = run_text(capsys, "inspect", path)
    assert code == 2
    assert f"{size} bytes, of which no header can be read" in out


def test_garbage_is_damage(capsys, tmp_path):
    code, document, _ = run_json(capsys, "inspect", write(tmp_path, os.urandom(4096)))
    assert code == 2
    assert document["pages"][0]["problems"][0]["reason"] == "corrupt:magic"


def test_unknown_version_is_its_own_exit_code(capsys, tmp_path):
    data = bytearray(make_page())
    data[8] = 2
    code, document, _ = run_json(capsys, "inspect", write(tmp_path, bytes(data)))
    assert code == 3
    (page,) = document["pages"]
    assert page["status"] == "unsupported"
    assert page["problems"] == [
        {"reason": "unsupported:version", "message": "version: found 2, this reader supports 1"}
    ]


def test_claimed_size_allocates_nothing(capsys, tmp_path):
    """A small object that says it is 2^60 bytes long is answered, not believed."""
    data = bytearray(make_page())
    data[16:24] = (1 << 60).to_bytes(8, "little")
    code, document, _ = run_json(capsys, "inspect", write(tmp_path, bytes(data)))
    assert code == 2
    assert document["pages"][0]["sections"]["ok"] == 8


# --- files that are no files, and other mistakes


def test_directory_is_an_error_with_a_way_out(capsys, tmp_path):
    code, out, err = run_text(capsys, "inspect", str(tmp_path))
    assert (code, out) == (1, "")
    assert f"kvcodec inspect file://{tmp_path} KEY" in err
    assert err.count("\n") == 1


def test_fifo_does_not_block(capsys, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    code, _, err = run_text(capsys, "inspect", str(tmp_path / "fifo"))
    assert code == 1
    assert "not a regular file" in err


def test_missing_file_is_an_error_in_json_too(capsys, tmp_path):
    code, document, err = run_json(capsys, "inspect", str(tmp_path / "none"))
    assert code == 1
    assert document["error"]["kind"] == "ConfigError"
    assert document["error"]["exit_code"] == 1
    assert "No such file" in document["error"]["message"]
    assert err.count("\n") == 1


def test_nul_in_the_path_is_an_error(capsys):
    code, _, err = run_text(capsys, "inspect", "a\0b")
    assert code == 1
    assert "\0" not in err


def test_file_beyond_the_limit_is_not_read(capsys, page_file, monkeypatch):
    monkeypatch.setattr(pages, "MAX_PAGE_BYTES", 1000)
    code, _, err = run_text(capsys, "inspect", str(page_file))
    assert code == 1
    assert "1000" in err


@pytest.mark.parametrize(
    "words",
    [
        ["inspect"],
        ["inspect", "--unknown", "x"],
        ["inspect", "a", "b", "c"],
        ["inspect", "x", "--timeout", "soon"],
        ["inspect", "x", "--timeout", "0"],
        ["inspect", "x", "--timeout", "nan"],
        ["inspect", "x", "--namespace"],
        ["inspect", "file:///x"],
        ["inspect", "nosuch://x", "key"],
        ["inspect", "file://[x", "key"],
        ["unknown"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_1(capsys, words: Sequence[str]):
    code, out, err = run_text(capsys, *words)
    assert (code, out) == (1, "")
    assert err.startswith("kvcodec: ")
    assert err.count("\n") == 1
    code, document, _ = run_json(capsys, *words)
    assert code == document["error"]["exit_code"] == 1


def test_file_takes_no_key_and_no_namespace(capsys, page_file):
    for words in ([KEY], ["--namespace", "0" * 32]):
        code, _, err = run_text(capsys, "inspect", str(page_file), *words)
        assert code == 1
        assert "need the URL of a store" in err


# --- terminals


HOSTILE = "\x1b]0;owned\x07\x1b[31m\r\n\u202eabc\x9b"


def test_control_characters_never_reach_the_terminal(capsys, tmp_path):
    namespace = namespace_of(model=HOSTILE)
    path = tmp_path / "bad\x1b[31m\nname"
    path.write_bytes(make_page(key=HOSTILE, namespace=namespace))
    for words in (["inspect", str(path)], ["inspect", str(path) + HOSTILE]):
        _, out, err = run_text(capsys, *words)
        assert all(c.isprintable() or c == "\n" for c in out + err)
    _, out, _ = run_text(capsys, "inspect", str(path))
    assert r"\x1b]0;owned\x07" in out
    _, document, _ = run_json(capsys, "inspect", str(path))
    assert document["pages"][0]["key"] == HOSTILE


def test_json_is_ascii(capsys, tmp_path):
    path = write(tmp_path, make_page(key="ключ" + HOSTILE))
    _, out, _ = run_text(capsys, "inspect", "--json", path)
    assert out.isascii()
    assert all(c.isprintable() or c == "\n" for c in out)


def start(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from kvcodec.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_output_in_a_narrow_encoding_is_escaped(tmp_path):
    path = write(tmp_path, make_page(key="ключ"))
    run = start("inspect", path, PYTHONIOENCODING="ascii")
    assert run.returncode == 0, run.stderr
    assert r"\u043a\u043b\u044e\u0447" in run.stdout


def test_reader_that_stops_early_is_no_error(page_file):
    code = "import sys; from kvcodec.cli import main; sys.exit(main())"
    command = f"{sys.executable} -c '{code}' inspect {page_file} | true"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert run.stderr == ""


# --- stores


def test_store_page_by_object_name_and_by_key(capsys, tmp_path):
    url = f"file://{tmp_path}"
    name = namespace_of().object_name(KEY)
    fill(url, {name: make_page()})
    for words in ([name], [KEY], ["--namespace", name[:32], KEY]):
        code, document, _ = run_json(capsys, "inspect", url, *words)
        assert code == 0
        assert [page["object_name"] for page in document["pages"]] == [name]
        assert document["pages"][0]["modified"] is not None


def test_key_is_found_in_every_namespace(capsys, tmp_path):
    url = f"file://{tmp_path}"
    spaces = [namespace_of(rank) for rank in range(3)]
    names = [space.object_name(KEY) for space in spaces]
    found = dict(zip(names[:2], [make_page(namespace=s) for s in spaces[:2]], strict=True))
    other = spaces[2].object_name("other")
    fill(url, found | {other: make_page(key="other", namespace=spaces[2])})
    code, document, _ = run_json(capsys, "inspect", url, KEY)
    assert code == 0
    assert {page["object_name"] for page in document["pages"]} == set(names[:2])
    code, document, _ = run_json(capsys, "inspect", url, KEY, "--namespace", names[1][:32])
    assert [page["object_name"] for page in document["pages"]] == [names[1]]
    code, out, _ = run_text(capsys, "inspect", url, KEY)
    assert out.count("status    ok") == 2


def test_absent_page_has_its_own_exit_code(capsys, tmp_path):
    stores.open_backend(url := f"file://{tmp_path}").close()
    for words in (["nokey"], ["0" * 32 + "/" + "1" * 64], ["--namespace", "0" * 32, KEY]):
        code, document, err = run_json(capsys, "inspect", url, *words)
        assert code == 5
        assert document["error"]["kind"] == "NoSuchPage"
        assert err.count("\n") == 1


def test_bad_namespace_is_a_usage_error(capsys, tmp_path):
    (tmp_path / "objects").mkdir()
    code, _, err = run_text(capsys, "inspect", f"file://{tmp_path}", KEY, "--namespace", "ABC")
    assert code == 1
    assert "'ABC' is not 32 hex digits" in err


def test_worst_page_decides_the_exit_code(capsys, tmp_path):
    url = f"file://{tmp_path}"
    spaces = [namespace_of(rank) for rank in range(2)]
    sound, bad = (make_page(namespace=space) for space in spaces)
    fill(url, {spaces[0].object_name(KEY): sound, spaces[1].object_name(KEY): flipped(bad, -1)})
    code, document, _ = run_json(capsys, "inspect", url, KEY)
    assert code == 2
    assert sorted(page["status"] for page in document["pages"]) == ["bad", "ok"]


def test_page_under_a_wrong_name_is_bad(capsys, tmp_path):
    url = f"file://{tmp_path}"
    name = namespace_of().object_name(KEY)
    fill(url, {name: make_page(key="other")})
    code, document, _ = run_json(capsys, "inspect", url, name)
    assert code == 2
    assert document["pages"][0]["problems"][0]["reason"] == "corrupt:name"


class TimedBackend(FakeBackend):
    """Remembers the time-outs it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.timeouts: set[float] = set()

    def exists(self, names, *, timeout_seconds):
        self.timeouts.add(timeout_seconds)
        return super().exists(names, timeout_seconds=timeout_seconds)

    def stat(self, name, *, timeout_seconds):
        self.timeouts.add(timeout_seconds)
        return super().stat(name, timeout_seconds=timeout_seconds)

    def get_into(self, names, buffers, *, timeout_seconds):
        self.timeouts.add(timeout_seconds)
        return super().get_into(names, buffers, timeout_seconds=timeout_seconds)


@pytest.fixture
def fake(monkeypatch) -> TimedBackend:
    backend = TimedBackend()
    backend.objects[namespace_of().object_name(KEY)] = make_page()
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: backend)
    return backend


def test_timeout_reaches_the_store(capsys, fake):
    run_json(capsys, "inspect", "fake://", KEY)
    assert fake.timeouts == {10.0}
    fake.timeouts.clear()
    run_json(capsys, "inspect", "fake://", KEY, "--timeout", "2.5")
    assert fake.timeouts == {2.5}
    assert fake.closed


def test_failing_store_is_its_own_exit_code(capsys, fake, monkeypatch):
    monkeypatch.setattr(fake, "get_into", lambda *a, **k: [BackendError("disk\x1b on fire")])
    code, document, err = run_json(capsys, "inspect", "fake://", KEY)
    assert code == 4
    assert document["error"]["kind"] == "BackendError"
    assert err == "kvcodec: disk\\x1b on fire\n"


def test_object_that_grows_while_it_is_read_is_read_again(capsys, fake, monkeypatch):
    stat = fake.stat
    monkeypatch.setattr(fake, "stat", lambda name, **k: type(stat(name, **k))(name, 100, 0.0))
    code, document, _ = run_json(capsys, "inspect", "fake://", KEY)
    assert code == 0
    assert document["pages"][0]["status"] == "ok"


# --- speed


def test_inspect_imports_nothing_heavy(page_file):
    """Start-up is most of the time the command takes."""
    code = (
        "import sys\nfrom kvcodec.cli import main\n"
        f"assert main(['inspect', {str(page_file)!r}]) == 0\n"
        "print('\\n' + ' '.join(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.splitlines()[-1].split())
    heavy = {"torch", "sglang", "rich", "typer", "click", "pydantic", "kvcodec.native", "zstandard"}
    assert heavy & loaded == set()


COMMAND_LINES = [
    list(words)
    for count in range(4)
    for words in itertools.permutations(
        ["a", "b", "--json", "--layers", "--namespace=n", "--timeout=2", "--timeout 3", "--"],
        count,
    )
]


def test_quick_reading_of_arguments_equals_typers(monkeypatch):
    """Every line that is read without typer means the same with it."""
    from kvcodec.cli import app, inspection_text

    calls: list[dict[str, object]] = []
    names = list(inspect_arguments(["inspect", "x"]) or {})
    monkeypatch.setattr(
        inspection_text,
        "run_inspect",
        lambda *values: calls.append(dict(zip(names, values, strict=True))) or 0,
    )
    read = 0
    for words in COMMAND_LINES:
        line = ["inspect", *(part for word in words for part in word.split(" "))]
        quick = inspect_arguments(line)
        if quick is not None:
            app.run(line)
            assert calls.pop() == quick, line
            read += 1
    assert read > 50


def test_quick_reading_knows_every_option():
    parameters = inspect.__annotations__.keys() - {"return"}
    assert set(inspect_arguments(["inspect", "x"]) or {}) == parameters


@pytest.mark.parametrize(
    "words", [["inspect", "--help"], ["inspect"], ["verify", "x"], [], ["inspect", "x", "-1"]]
)
def test_quick_reading_leaves_the_rest_to_typer(words):
    assert inspect_arguments(words) is None


def test_version_and_help(capsys):
    code, out, _ = run_text(capsys, "--version")
    assert code == 0
    assert out.startswith("kvcodec ")
    code, out, _ = run_text(capsys, "inspect", "--help")
    assert code == 0
    assert "--layers" in out
    code, out, _ = run_text(capsys)
    assert code == 1
    assert "inspect" in out


def test_document_is_plain_json(page_file):
    run = start("inspect", "--json", str(page_file))
    assert run.returncode == 0
    assert json.loads(run.stdout)["pages"][0]["status"] == "ok"
    assert run.stderr == ""
