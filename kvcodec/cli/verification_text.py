"""``kvcodec verify``: the progress bar while it works, the summary when it is done."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from kvcodec.backend import Backend
from kvcodec.cli.output import ExitCode, bytes_text, escaped, write_json, write_line
from kvcodec.cli.stores import check_namespace, opened
from kvcodec.cli.verification import Listing, Verification, Verifier

__all__ = ["run_verify"]

_SHOWN_PAGES = 20
_LISTING_STEP = 1000


def run_verify(
    url: str, *, namespace: str, threads: int, timeout: float, delete_bad: bool, as_json: bool
) -> ExitCode:
    """Check every page of a store. The arguments are those of `kvcodec.cli.app.verify`."""
    check_namespace(namespace)
    started = time.monotonic()
    with opened(url) as backend:
        result = _verified(
            backend, namespace, threads=threads, timeout=timeout, delete_bad=delete_bad
        )
    seconds = time.monotonic() - started
    if as_json:
        document = result.as_json() | {"url": url, "namespace": namespace or None}
        write_json(document | {"delete_bad": delete_bad, "seconds": round(seconds, 3)})
    elif not result.checked and not result.unread:
        write_line(
            sys.stdout, f"{escaped(url)} has no pages{' in this namespace' if namespace else ''}"
        )
    else:
        _show(result, seconds, delete_bad=delete_bad)
    return result.exit_code


def _verified(
    backend: Backend, namespace: str, *, threads: int, timeout: float, delete_bad: bool
) -> Verification:
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    verifier = Verifier(backend, threads=threads, timeout_seconds=timeout, delete_bad=delete_bad)
    # A pipe or a log file gets no bar: only its last state would be of use, and the summary has it.
    shown = Progress(*columns, console=console) if console.is_terminal else nullcontext(None)
    with shown as bar:
        task = None if bar is None else bar.add_task("listing", total=None)
        listing = Listing()
        for info in backend.list(namespace):
            listing.add(info.name, info.stored_bytes)
            if bar is not None and task is not None and len(listing) % _LISTING_STEP == 0:
                bar.update(task, description=f"listing {len(listing)}")
        if bar is not None and task is not None:
            bar.update(task, total=listing.stored_bytes)

        def progress(stored_bytes: int) -> None:
            if bar is not None and task is not None:
                bad = len(verifier.result.bad)
                text = f"{verifier.result.checked}/{len(listing)} pages, {bad} bad"
                bar.update(task, advance=stored_bytes, description=text)

        return verifier.run(listing, progress)


def _show(result: Verification, seconds: float, *, delete_bad: bool) -> None:
    console = Console(highlight=False, emoji=False)
    rate = bytes_text(result.bytes_read / seconds)
    console.print(
        f"{result.checked} pages checked, {bytes_text(result.bytes_read)} in {seconds:.1f} s "
        f"({rate}/s)",
        soft_wrap=True,
    )
    counts = Table(show_header=True, box=None, pad_edge=False)
    counts.add_column("pages", justify="right")
    counts.add_column("state")
    counts.add_row(str(result.sound), "[green]sound[/]")
    for reason, count in result.reasons.items():
        counts.add_row(str(count), f"[red]{escape(escaped(reason))}[/]")
    if result.gone:
        counts.add_row(str(result.gone), "gone before they were read")
    console.print(counts)
    pages = [*result.bad, *result.unsupported, *result.unread]
    for page in pages[:_SHOWN_PAGES]:
        text = f"{page.name}  {page.reason}: {escaped(page.message)}"
        console.print(escape(text), soft_wrap=True)
    if len(pages) > _SHOWN_PAGES:
        console.print(f"and {len(pages) - _SHOWN_PAGES} more: see --json")
    if delete_bad:
        console.print(f"{result.deleted} of {len(result.bad)} bad pages deleted")
    elif result.bad:
        console.print("--delete-bad removes the bad ones; the engine then computes them again")
