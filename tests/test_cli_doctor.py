"""``kvcodec doctor``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
from cli_pages import run_json, run_text
from fake_backend import FakeBackend

from kvcodec import native, reference
from kvcodec.cli import doctor, stores
from kvcodec.errors import BackendError, BackendReadOnly, NativeError


def by_name(document: Any) -> dict[str, Any]:
    return {check["name"]: check for check in document["checks"]}


def test_sound_installation_is_fine(capsys):
    before = native.isa()
    code, document, err = run_json(capsys, "doctor")
    assert (code, err) == (0, "")
    assert document["ok"] is True
    checks = by_name(document)
    assert {"kvcodec", "python", "numpy", "torch", "sglang", "backends"} <= set(checks)
    assert set(checks["kvcodec"]) == {"name", "status", "message"}
    assert f"uses {native.isa()}" in checks["native library"]["message"]
    assert checks["checksum"]["status"] == "ok"
    for isa in native.available_isas():
        assert checks[f"codec on {isa}"]["status"] == "ok"
    assert "file://" in checks["backends"]["message"]
    assert "store" not in checks
    assert native.isa() == before


def test_text_has_a_line_per_check(capsys):
    code, out, err = run_text(capsys, "doctor")
    assert (code, err) == (0, "")
    assert "\nok       native library" in out


def test_store_is_written_read_and_left_clean(capsys, tmp_path):
    code, document, _ = run_json(capsys, "doctor", f"file://{tmp_path}")
    assert code == 0
    assert "written, read, verified and deleted" in by_name(document)["store"]["message"]
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size] == []


def test_url_of_no_store_fails(capsys):
    code, document, _ = run_json(capsys, "doctor", "nosuch://x")
    assert (code, document["ok"]) == (4, False)
    store = by_name(document)["store"]
    assert store["status"] == "failed"
    assert "nosuch" in store["message"]
    code, out, _ = run_text(capsys, "doctor", "nosuch://x\x1b[31m")
    assert code == 4
    assert "\x1b" not in out
    assert "1 of " in out


class Store(FakeBackend):
    """A store whose answers can be replaced, and which remembers time-outs."""

    def __init__(self) -> None:
        super().__init__()
        self.timeouts: set[float] = set()
        self.put_answer: BackendError | None = None
        self.keeps = False
        self.damages = False

    def put(self, names, objects, *, timeout_seconds):
        self.timeouts.add(timeout_seconds)
        if self.put_answer is not None:
            return [self.put_answer]
        return super().put(names, objects, timeout_seconds=timeout_seconds)

    def get_into(self, names, buffers, *, timeout_seconds):
        self.timeouts.add(timeout_seconds)
        answer = super().get_into(names, buffers, timeout_seconds=timeout_seconds)
        if self.damages:
            buffers[0][-1] ^= 1
        return answer

    def delete(self, names, *, timeout_seconds):
        self.timeouts.add(timeout_seconds)
        if self.keeps:
            return [False]
        return super().delete(names, timeout_seconds=timeout_seconds)


@pytest.fixture
def store(monkeypatch) -> Store:
    backend = Store()
    monkeypatch.setattr(stores, "open_backend", lambda url, **_: backend)
    return backend


def test_store_that_cannot_be_written_fails(capsys, store):
    store.put_answer = BackendReadOnly("read-only file system")
    code, document, _ = run_json(capsys, "doctor", "fake://")
    assert code == 4
    message = by_name(document)["store"]["message"]
    assert message == "a page cannot be written: read-only file system"
    assert store.closed


def test_store_that_damages_pages_fails(capsys, store):
    store.damages = True
    code, document, _ = run_json(capsys, "doctor", "fake://")
    assert code == 4
    assert "comes back damaged" in by_name(document)["store"]["message"]
    assert store.objects == {}


def test_store_that_cannot_delete_fails(capsys, store):
    store.keeps = True
    code, document, _ = run_json(capsys, "doctor", "fake://")
    assert code == 4
    assert "cannot be deleted" in by_name(document)["store"]["message"]


def test_timeout_reaches_the_store(capsys, store):
    assert run_json(capsys, "doctor", "fake://", "--timeout", "2.5")[0] == 0
    assert store.timeouts == {2.5}


# --- the library


def test_wrong_checksum_fails(capsys, monkeypatch):
    monkeypatch.setattr(native, "checksum", lambda data: 0)
    code, document, _ = run_json(capsys, "doctor")
    assert code == 4
    assert by_name(document)["checksum"]["status"] == "failed"


@pytest.mark.parametrize("function", ["encode_section", "decode_section"])
def test_codec_that_differs_from_the_reference_fails(capsys, monkeypatch, function):
    original = getattr(reference, function)

    def other(data, *arguments):
        if function == "decode_section":
            return original(data, *arguments) ^ 1
        stored, outside = original(data, *arguments)
        return bytes([stored[0] ^ 1]) + stored[1:], outside

    monkeypatch.setattr(reference, function, other)
    code, document, _ = run_json(capsys, "doctor")
    assert code == 4
    for isa in native.available_isas():
        assert "than by the reference" in by_name(document)[f"codec on {isa}"]["message"]


def test_missing_library_is_one_failure_among_checks(capsys, monkeypatch):
    def missing():
        raise NativeError("libkvcodec.so cannot be loaded")

    for name, module in list(sys.modules.items()):
        if name.startswith("kvcodec.native") and hasattr(module, "library"):
            monkeypatch.setattr(module, "library", missing)
    code, document, _ = run_json(capsys, "doctor")
    assert code == 4
    checks = by_name(document)
    assert checks["native library"]["message"] == "libkvcodec.so cannot be loaded"
    assert checks["kvcodec"]["status"] == "ok"


def start(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from kvcodec.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_forced_isa_is_shown_or_refused():
    run = start("doctor", "--json", KVCODEC_FORCE_ISA="scalar")
    assert run.returncode == 0
    message = by_name(json.loads(run.stdout))["native library"]["message"]
    assert "uses scalar, forced by KVCODEC_FORCE_ISA=scalar" in message
    run = start("doctor", "--json", KVCODEC_FORCE_ISA="mmx")
    assert run.returncode == 4
    assert "Traceback" not in run.stderr
    assert "'mmx'" in by_name(json.loads(run.stdout))["native library"]["message"]


def test_no_engine_is_imported():
    code = (
        "import sys\nfrom kvcodec.cli import main\nmain(['doctor'])\n"
        "print('\\n' + ' '.join(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "sglang", "lmcache", "grpc"} & set(run.stdout.split("\n")[-2].split()) == set()


# --- the plugin


ENTRY = EntryPoint("kvcodec", "kvcodec.sglang.plugin:register", "sglang.srt.plugins")


def plugin_check(
    monkeypatch,
    *,
    sglang: str | None,
    entries: list[EntryPoint],
    tested: tuple[str, str] = ("0.5.11", "0.5.23"),
    plugins: str | None = None,
) -> doctor.Check:
    monkeypatch.setattr(doctor, "_installed", lambda name: sglang)
    monkeypatch.setattr(doctor, "entry_points", lambda group: entries)
    module = SimpleNamespace(TESTED_VERSIONS=tested)
    monkeypatch.setitem(sys.modules, "kvcodec_doctor_plugin", module)
    function = SimpleNamespace(__module__="kvcodec_doctor_plugin")
    monkeypatch.setattr(EntryPoint, "load", lambda entry: function)
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("SGLANG_PLUGINS", plugins)
    return doctor._plugin()


@pytest.mark.parametrize("version", ["0.5.11", "0.5.12.post1", "0.5.23", "0.5.23rc1"])
def test_tested_sglang_is_fine(monkeypatch, version):
    check = plugin_check(monkeypatch, sglang=version, entries=[ENTRY])
    assert check.status == doctor.OK
    assert version in check.message


@pytest.mark.parametrize("version", ["0.5.10", "0.5.24", "0.6.0", "1.0", "0.4.99"])
def test_other_sglang_is_a_warning(monkeypatch, version):
    check = plugin_check(monkeypatch, sglang=version, entries=[ENTRY])
    assert check.status == doctor.WARNING
    assert "0.5.11 to 0.5.23" in check.message


def test_without_sglang_the_plugin_is_a_note(monkeypatch):
    assert plugin_check(monkeypatch, sglang=None, entries=[ENTRY]).status == doctor.NOTE


def test_unregistered_plugin_fails_where_sglang_is(monkeypatch):
    assert plugin_check(monkeypatch, sglang="0.5.23", entries=[]).status == doctor.FAILED
    assert plugin_check(monkeypatch, sglang=None, entries=[]).status == doctor.WARNING


def test_plugin_left_out_by_the_environment_fails(monkeypatch):
    check = plugin_check(monkeypatch, sglang="0.5.23", entries=[ENTRY], plugins="other, more")
    assert check.status == doctor.FAILED
    assert "SGLANG_PLUGINS" in check.message
    check = plugin_check(monkeypatch, sglang="0.5.23", entries=[ENTRY], plugins="other, kvcodec")
    assert check.status == doctor.OK


def test_plugin_that_cannot_be_loaded_fails(monkeypatch):
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    broken = EntryPoint("kvcodec", "kvcodec.nothing:register", "sglang.srt.plugins")
    monkeypatch.setattr(doctor, "entry_points", lambda group: [broken])
    assert doctor._plugin().status == doctor.FAILED


def test_no_backend_at_all_fails(monkeypatch):
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert doctor._backends().status == doctor.FAILED


def test_plugin_names_the_versions_it_was_tested_with():
    """The doctor's only source for the range."""
    from kvcodec.sglang.plugin import TESTED_VERSIONS

    assert doctor._tested_versions(ENTRY) == TESTED_VERSIONS
