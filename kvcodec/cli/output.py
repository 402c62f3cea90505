"""What every command shares: exit codes, the one JSON document, text that is safe on a terminal."""

from __future__ import annotations

import enum
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from kvcodec.errors import (
    BackendError,
    ConfigError,
    KVCodecError,
    NativeError,
    PageError,
    UnsupportedPage,
)

__all__ = [
    "ExitCode",
    "Json",
    "NoSuchPage",
    "bytes_text",
    "escaped",
    "exit_code_of",
    "paint",
    "table_text",
    "write_json",
    "write_line",
]

Json = Mapping[str, "Json"] | Sequence["Json"] | str | int | float | bool | None

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "bold": "1"}


class ExitCode(enum.IntEnum):
    """What a command tells the shell."""

    OK = 0
    USAGE = 1  #: an argument, option, URL or file that cannot be used
    BAD_PAGE = 2  #: a page is damaged, or is not the page its name says
    UNSUPPORTED = 3  #: a page of a version or with a feature this kvcodec does not know
    FAILED = 4  #: the store, the native library or the installation does not work
    NO_PAGE = 5  #: the store has no page of that key
    INTERRUPTED = 130


class NoSuchPage(KVCodecError):
    """The store answers, and has no page of that key."""


def exit_code_of(error: KVCodecError) -> ExitCode:
    """The exit code for an error that ends a command."""
    if isinstance(error, NoSuchPage):
        return ExitCode.NO_PAGE
    if isinstance(error, UnsupportedPage):
        return ExitCode.UNSUPPORTED
    if isinstance(error, PageError):
        return ExitCode.BAD_PAGE
    if isinstance(error, BackendError | NativeError):
        return ExitCode.FAILED
    assert isinstance(error, ConfigError), f"no exit code for {type(error).__name__}"
    return ExitCode.USAGE


def escaped(text: str) -> str:
    """`text` with everything that is not printable written as an escape.

    Keys and identities come from stores and may hold terminal sequences, line breaks or characters
    that turn the direction of writing.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write_line(stream: TextIO, text: str) -> None:
    """One line, flushed; a stream that cannot show a character gets its escape."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def write_json(document: Json) -> None:
    """The one document a command with ``--json`` writes: indented, ASCII, to stdout."""
    write_line(sys.stdout, json.dumps(document, indent=2, allow_nan=False))


def paint(colour: str, text: str) -> str:
    """`text` in a colour if stdout is a terminal and NO_COLOR is not set."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def bytes_text(count: float) -> str:
    """A number of bytes for people: ``1.02 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def table_text(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Iterable[int] = (),
    indent: str = "",
) -> list[str]:
    """A plain table; the columns of `numbers` are aligned to the right.

    Drawn here and not by rich, whose import takes longer than everything else `inspect` does.
    """
    lines = [list(head), *(list(row) for row in rows)]
    right = set(numbers)
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return [
        indent
        + "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
