"""Commands that other packages bring, found through the entry-point group ``kvcodec.commands``.

An entry is a function that is called with the `typer.Typer` of ``kvcodec`` and adds its commands to
it. It is imported whenever the command line starts, so it imports what its commands need when they
run.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import typer

from kvcodec.cli.output import escaped, write_line

__all__ = ["GROUP", "add_commands"]

GROUP = "kvcodec.commands"


def add_commands(app: typer.Typer) -> None:
    """Let every installed package add its commands; one that cannot is named, and left out."""
    for entry in sorted(entry_points(group=GROUP), key=lambda each: each.name):
        try:
            register = entry.load()
        except (ImportError, AttributeError) as error:
            text = f"kvcodec: the commands of {entry.name!r} cannot be loaded: {error}"
            write_line(sys.stderr, escaped(text))
            continue
        register(app)
