"""docs/cli.md says what the command line does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from kvcodec.cli.app import app
from kvcodec.cli.output import ExitCode, exit_code_of
from kvcodec.errors import ConfigError, KVCodecError

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
ROOT = typer.main.get_command(app)
COMMANDS = {
    f"kvcodec {name}": ROOT.commands[name]
    for name in ("inspect", "ls", "stat", "verify", "scrub", "rm", "gc", "copy", "transcode")
    + ("doctor", "serve", "health", "eval", "tune")
} | {
    f"kvcodec {group} {name}": ROOT.commands[group].commands[name]
    for group, name in (("bench", "codec"), ("config", "show"))
}


def synopsis(title: str) -> str:
    section = DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return section.split("```")[1]


def test_every_command_has_a_section():
    found = {
        f"kvcodec {name} {below}".strip()
        for name, command in ROOT.commands.items()
        for below in getattr(command, "commands", [""])
    }
    assert found == set(COMMANDS)
    for title in COMMANDS:
        assert f"[`{title}`]" in DOCUMENT


@pytest.mark.parametrize("title", list(COMMANDS))
def test_synopsis_has_every_option_and_no_other(title):
    options = {
        name
        for parameter in COMMANDS[title].params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name[:2] == "--"
    }
    assert set(re.findall(r"--[a-z-]+", synopsis(title))) == options - {"--help"}


def test_exit_codes_are_listed():
    rows = re.findall(r"^\| (\d+) \|", DOCUMENT, re.MULTILINE)
    assert [int(row) for row in rows] == [int(code) for code in ExitCode]


def leaves(kind: type[KVCodecError]) -> list[type[KVCodecError]]:
    below = [leaf for child in kind.__subclasses__() for leaf in leaves(child)]
    return [kind, *below] if kind is not KVCodecError else below


@pytest.mark.parametrize("kind", leaves(KVCodecError), ids=lambda kind: kind.__name__)
def test_every_error_has_an_exit_code(kind):
    assert exit_code_of(kind.__new__(kind)) is not ExitCode.OK
    assert (exit_code_of(kind.__new__(kind)) is ExitCode.USAGE) == issubclass(kind, ConfigError)
