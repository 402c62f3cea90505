"""``kvcodec scrub``: the progress bar while it works, the summary when it is done."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from rich.console import Console

from kvcodec.backend import Backend, ObjectInfo, display_url
from kvcodec.cli.crew import parse_rate
from kvcodec.cli.disposal import deletion, quarantine
from kvcodec.cli.listing import Sort, listed
from kvcodec.cli.output import ExitCode, write_json
from kvcodec.cli.progress import Meter, metered
from kvcodec.cli.scrub import Scrub, ScrubState
from kvcodec.cli.stores import check_namespace, opened
from kvcodec.cli.verification import Verification, Verifier
from kvcodec.cli.verification_text import show_verification
from kvcodec.errors import ConfigError

__all__ = ["ScrubOptions", "run_scrub"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubOptions:
    """The options of `kvcodec.cli.store_commands.scrub`."""

    namespace: str
    rate: str
    state: str
    max_seconds: float | None
    delete_bad: bool
    quarantine: str
    threads: int
    timeout: float


def run_scrub(url: str, options: ScrubOptions, *, as_json: bool) -> ExitCode:
    """Check a store, or the part of it that is left, at a rate."""
    check_namespace(options.namespace)
    rate = parse_rate(options.rate)
    if options.delete_bad and options.quarantine:
        raise ConfigError("--quarantine deletes a bad page once it is copied: omit --delete-bad")
    if options.quarantine and not os.path.isdir(options.quarantine):
        raise ConfigError(f"--quarantine {options.quarantine!r} is not a directory")
    shown = display_url(url)
    state = ScrubState(shown, options.namespace)
    if options.state:
        state = ScrubState.read(options.state, shown, options.namespace)
    started = time.monotonic()
    with opened(url) as backend, metered() as meter:
        listing = listed(backend, options.namespace, meter.listed).sorted(Sort.NAME)
        scrub = Scrub(
            listing,
            state,
            options.state,
            bytes_per_second=rate,
            max_seconds=options.max_seconds,
        )
        result = _scrubbed(backend, scrub, options, meter)
    seconds = time.monotonic() - started
    result.unasked = remaining = scrub.remaining
    if as_json:
        document = result.as_json() | {
            "url": shown,
            "namespace": options.namespace or None,
            "rate_bytes_per_second": rate,
            "state": options.state or None,
            "complete": remaining == 0,
        }
        write_json(document | {"seconds": round(seconds, 3)})
    else:
        _show(result, seconds, remaining, options)
    return result.exit_code


def _scrubbed(backend: Backend, scrub: Scrub, options: ScrubOptions, meter: Meter) -> Verification:
    dispose = None
    if options.delete_bad:
        dispose = deletion(backend, options.timeout)
    elif options.quarantine:
        dispose = quarantine(backend, options.quarantine, options.timeout)
    verifier = Verifier(
        backend, threads=options.threads, timeout_seconds=options.timeout, dispose=dispose
    )
    meter.begin(scrub.remaining_bytes)

    def heard(index: int, info: ObjectInfo, answered: bool) -> None:
        scrub.finish(index, answered)
        found = verifier.result
        text = f"{found.checked} pages, {scrub.remaining} left, {len(found.bad)} bad"
        meter.advance(info.stored_bytes, text)

    try:
        return verifier.run(scrub.objects(), heard)
    finally:
        # Also when interrupted: that is the usual end of a long scrub.
        scrub.save()


def _show(result: Verification, seconds: float, remaining: int, options: ScrubOptions) -> None:
    console = Console(highlight=False, emoji=False)
    show_verification(console, result, seconds)
    if options.delete_bad:
        console.print(f"{result.deleted} of {len(result.bad)} bad pages deleted")
    elif options.quarantine:
        console.print(f"{result.deleted} of {len(result.bad)} bad pages moved to quarantine")
    if remaining:
        hint = "the next run goes on there" if options.state else "--state FILE would go on there"
        console.print(f"{remaining} pages are left: {hint}", soft_wrap=True)
