"""The progress bar of commands that read a whole store."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

__all__ = ["Meter", "metered"]


class Meter:
    """One bar, or nothing where nobody watches. Thread-safe."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._task = None if bar is None else bar.add_task("listing", total=None)

    def listed(self, object_count: int) -> None:
        """So many objects are known so far."""
        self._update(description=f"listing {object_count}")

    def begin(self, total_bytes: int) -> None:
        """The listing is done, and this is how much there is to do."""
        self._update(total=float(total_bytes))

    def advance(self, stored_bytes: int, text: str) -> None:
        """So many more bytes are done with."""
        self._update(advance=float(stored_bytes), description=text)

    def _update(
        self,
        *,
        total: float | None = None,
        advance: float | None = None,
        description: str | None = None,
    ) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total, advance=advance, description=description)


@contextmanager
def metered() -> Iterator[Meter]:
    """A bar on stderr.

    A pipe or a log file gets none: only its last state would be of use, and the summary has it.
    """
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield Meter(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield Meter(bar)
