"""``kvcodec verify``: the progress bar while it works, the summary when it is done."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvcodec.backend import ObjectInfo, display_url
from kvcodec.cli.disposal import deletion
from kvcodec.cli.listing import listed
from kvcodec.cli.output import ExitCode, bytes_text, escaped, write_json, write_line
from kvcodec.cli.progress import metered
from kvcodec.cli.stores import check_namespace, opened
from kvcodec.cli.verification import Findings, Verification, Verifier

__all__ = ["run_verify", "show_findings", "show_verification"]

_SHOWN_PAGES = 20


def run_verify(
    url: str, *, namespace: str, threads: int, timeout: float, delete_bad: bool, as_json: bool
) -> ExitCode:
    """Check every page of a store. The arguments are those of `kvcodec.cli.app.verify`."""
    check_namespace(namespace)
    started = time.monotonic()
    with opened(url) as backend, metered() as meter:
        listing = listed(backend, namespace, meter.listed)
        meter.begin(listing.stored_bytes)
        dispose = deletion(backend, timeout) if delete_bad else None
        verifier = Verifier(backend, threads=threads, timeout_seconds=timeout, dispose=dispose)

        def heard(_index: int, info: ObjectInfo, _answered: bool) -> None:
            found = verifier.result
            text = f"{found.checked}/{len(listing)} pages, {len(found.bad)} bad"
            meter.advance(info.stored_bytes, text)

        result = verifier.run(listing, heard)
        result.unasked = len(listing) - result.handled
    seconds = time.monotonic() - started
    if as_json:
        document = result.as_json() | {"url": display_url(url), "namespace": namespace or None}
        write_json(document | {"delete_bad": delete_bad, "seconds": round(seconds, 3)})
    elif not result.checked and not result.unread:
        where = " in this namespace" if namespace else ""
        write_line(sys.stdout, f"{escaped(display_url(url))} has no pages{where}")
    else:
        console = Console(highlight=False, emoji=False)
        show_verification(console, result, seconds)
        if delete_bad:
            console.print(f"{result.deleted} of {len(result.bad)} bad pages deleted")
        elif result.bad:
            console.print("--delete-bad removes the bad ones; the engine then computes them again")
    return result.exit_code


def show_verification(console: Console, result: Verification, seconds: float) -> None:
    """The counts, and the first pages that are not sound."""
    rate = bytes_text(result.bytes_read / max(seconds, 1e-9))
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
    show_findings(console, result)


def show_findings(console: Console, found: Findings) -> None:
    """The first pages that are not sound, and whether the rest was given up."""
    pages = found.faulty
    for page in pages[:_SHOWN_PAGES]:
        text = f"{page.name}  {page.reason}: {escaped(page.message)}"
        console.print(escape(text), soft_wrap=True)
    if len(pages) > _SHOWN_PAGES:
        console.print(f"and {len(pages) - _SHOWN_PAGES} more: see --json")
    if found.is_hopeless:
        failures = found.failures_in_a_row
        console.print(f"[red]given up: {failures} pages failed in a row[/]", soft_wrap=True)
