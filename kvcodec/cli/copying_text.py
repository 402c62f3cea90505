"""``kvcodec copy``: the progress bar while it works, the summary when it is done."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console

from kvcodec.backend import Backend, ObjectInfo, display_url
from kvcodec.cli.copying import Copier, Copying, missing_from
from kvcodec.cli.crew import Pace, parse_rate
from kvcodec.cli.listing import Listing, Sort, listed
from kvcodec.cli.output import ExitCode, bytes_text, write_json
from kvcodec.cli.progress import Meter, metered
from kvcodec.cli.stores import check_namespace, opened
from kvcodec.cli.verification_text import show_findings

__all__ = ["CopyOptions", "run_copy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyOptions:
    """The options of `kvcodec.cli.store_commands.copy`."""

    namespace: str
    verify: bool
    overwrite: bool
    rate: str
    threads: int
    timeout: float


def run_copy(source_url: str, target_url: str, options: CopyOptions, *, as_json: bool) -> ExitCode:
    """Copy the pages of a store."""
    check_namespace(options.namespace)
    pace = Pace(parse_rate(options.rate))
    started = time.monotonic()
    # The target is made if need be, but only once the source is known to be there.
    with (
        opened(source_url) as source,
        opened(target_url, create=True) as target,
        metered() as meter,
    ):
        result = _copied(source, target, options, pace, meter)
    seconds = time.monotonic() - started
    if as_json:
        document = result.as_json() | {
            "source": display_url(source_url),
            "target": display_url(target_url),
            "namespace": options.namespace or None,
            "verify": options.verify,
            "overwrite": options.overwrite,
        }
        write_json(document | {"seconds": round(seconds, 3)})
    else:
        _show(result, seconds)
    return result.exit_code


def _copied(
    source: Backend, target: Backend, options: CopyOptions, pace: Pace, meter: Meter
) -> Copying:
    listing = listed(source, options.namespace, meter.listed)
    wanted: Listing | None = listing
    if not options.overwrite:
        wanted = missing_from(target, listing.sorted(Sort.NAME), options.namespace)
    copier = Copier(
        source,
        target,
        threads=options.threads,
        timeout_seconds=options.timeout,
        verify=options.verify,
        ask_target=wanted is None,
        pace=pace,
    )
    todo = listing if wanted is None else wanted
    found = copier.result
    found.skipped = len(listing) - len(todo)
    found.skipped_bytes = listing.stored_bytes - todo.stored_bytes
    meter.begin(todo.stored_bytes)

    def heard(info: ObjectInfo) -> None:
        text = f"{found.copied}/{len(todo)} copied, {len(found.faulty)} not"
        meter.advance(info.stored_bytes, text)

    # The oldest first: the start of a prefix is then there before its rest, whenever this ends,
    # and a target that evicts keeps the newest.
    copier.run(todo.oldest_first(), heard)
    found.unasked = len(listing) - found.handled
    return found


def _show(result: Copying, seconds: float) -> None:
    console = Console(highlight=False, emoji=False)
    rate = bytes_text(result.copied_bytes / max(seconds, 1e-9))
    console.print(
        f"{result.copied} pages copied, {bytes_text(result.copied_bytes)} in {seconds:.1f} s "
        f"({rate}/s)",
        soft_wrap=True,
    )
    if result.skipped:
        console.print(f"{result.skipped} were there already, {bytes_text(result.skipped_bytes)}")
    if result.gone:
        console.print(f"{result.gone} had gone before they were read")
    if result.faulty:
        console.print(f"[red]{len(result.faulty)} not copied:[/]")
    show_findings(console, result)
