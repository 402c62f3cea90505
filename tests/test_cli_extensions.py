"""Commands of other packages: found by entry point, added by their own function, or left out."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import typer

from kvcodec.cli import extensions


class Entry:
    """Stands for an installed entry point."""

    def __init__(self, name, load):
        self.name, self.load = name, load


@pytest.fixture
def added(monkeypatch):
    """The names of the commands that these entries add, and what stderr says."""

    def add(capsys, *entries):
        monkeypatch.setattr(extensions, "entry_points", lambda group: list(entries))
        app = typer.Typer()
        app.command("own")(lambda: None)
        extensions.add_commands(app)
        return [command.name for command in app.registered_commands], capsys.readouterr().err

    return add


def test_entry_adds_what_it_likes(added, capsys):
    def register(app):
        for name in ("one", "two"):
            app.command(name)(lambda: None)

    assert added(capsys, Entry("x", lambda: register)) == (["own", "one", "two"], "")


def test_entries_come_in_the_order_of_their_names(added, capsys):
    entries = [
        Entry(name, lambda name=name: lambda app: app.command(name)(lambda: None)) for name in "ba"
    ]
    assert added(capsys, *entries)[0] == ["own", "a", "b"]


def test_entry_that_cannot_be_imported_is_named_and_left_out(added, capsys):
    broken = EntryPoint("broken\x1b", "no.such:module", extensions.GROUP)
    fine = Entry("fine", lambda: lambda app: app.command("fine")(lambda: None))
    names, error = added(capsys, broken, fine)
    assert names == ["own", "fine"]
    assert error.startswith("kvcodec: the commands of 'broken") and error.count("\n") == 1
    assert "\x1b" not in error


def test_command_line_imports_nothing_heavy_for_them():
    heavy = ("grpc", "kvcodec_server.app", "kvcodec_server.config", "prometheus_client")
    code = f"import sys, kvcodec.cli.app; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "[]\n"
