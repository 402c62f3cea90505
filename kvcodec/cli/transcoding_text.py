"""``kvcodec transcode``: the progress bar while it works, the summary when it is done."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from kvcodec.backend import Backend, ObjectInfo, display_url
from kvcodec.cli.copying import missing_from
from kvcodec.cli.crew import Pace, parse_rate
from kvcodec.cli.listing import Listing, Sort, listed
from kvcodec.cli.output import ExitCode, bytes_text, escaped, write_json
from kvcodec.cli.progress import Meter, metered
from kvcodec.cli.scrub import parse_seconds
from kvcodec.cli.stores import check_namespace, opened
from kvcodec.cli.transcoding import StoreTranscoder, Transcoding
from kvcodec.cli.verification_text import show_findings
from kvcodec.codec import Codec
from kvcodec.errors import ConfigError
from kvcodec.rotary import Rotary, read_rotary
from kvcodec.spec import CodecSpec
from kvcodec.transcoding import Outcome, Transcoder

__all__ = ["TranscodeOptions", "run_transcode"]

_LEFT = {
    Outcome.ALREADY: "are encoded so already",
    Outcome.FEWER_BITS: "have as few bits already",
    Outcome.STATE: "hold state that must not change",
    Outcome.RAW: "are raw, perhaps on purpose: --from raw takes them too",
    Outcome.OTHER: "are encoded otherwise than --from says",
    Outcome.NONFINITE: "hold NaN or infinities",
    Outcome.NO_GAIN: "would not become smaller",
    Outcome.UNFIT: "cannot be encoded so",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscodeOptions:
    """The options of `kvcodec.cli.store_commands.transcode`."""

    spec: str
    only: Sequence[str]
    namespace: str
    older_than: str
    limit: int
    rotary: str
    dry_run: bool
    read_back: bool
    rate: str
    threads: int
    timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """What is to be made of a page."""

    spec: CodecSpec
    only: tuple[CodecSpec, ...]
    rotary: Rotary | None


def run_transcode(
    source_url: str, target_url: str, options: TranscodeOptions, *, as_json: bool
) -> ExitCode:
    """Encode the pages of a store anew, in place if there is no `target_url`."""
    check_namespace(options.namespace)
    if source_url == target_url:
        raise ConfigError("SRC and DST are the same store: without DST, pages are replaced in it")
    recipe = _Recipe(
        spec=CodecSpec.load(options.spec),
        only=tuple(map(CodecSpec.load, options.only)),
        rotary=_rotary(options),
    )
    pace = Pace(parse_rate(options.rate))
    age = parse_seconds("--older-than", options.older_than) if options.older_than else None
    started = time.monotonic()
    writes_elsewhere = bool(target_url) and not options.dry_run
    with (
        opened(source_url) as source,
        opened(target_url, create=True) if writes_elsewhere else nullcontext() as target,
        metered() as meter,
    ):
        result = _transcoded(source, target, recipe, options, age, pace, meter)
    seconds = time.monotonic() - started
    if as_json:
        document = result.as_json() | {
            "source": display_url(source_url),
            "target": display_url(target_url) if target_url else None,
            "namespace": options.namespace or None,
            "spec": recipe.spec.text,
            "from": [spec.text for spec in recipe.only],
            "dry_run": options.dry_run,
        }
        write_json(document | {"seconds": round(seconds, 3)})
    else:
        _show(result, seconds, options)
    return result.exit_code


def _rotary(options: TranscodeOptions) -> Rotary | None:
    if not options.rotary:
        return None
    if not CodecSpec.load(options.spec).can_derotate:
        raise ConfigError(
            "--rotary has no effect: no keys are to be derotated, or stored as ecq per channel"
        )
    rotary, reason = read_rotary(Path(options.rotary))
    if rotary is None:
        raise ConfigError(f"--rotary {options.rotary!r} has no effect: {reason}")
    return rotary


def _transcoded(
    source: Backend,
    target: Backend | None,
    recipe: _Recipe,
    options: TranscodeOptions,
    age: float | None,
    pace: Pace,
    meter: Meter,
) -> Transcoding:
    listing = listed(source, options.namespace, meter.listed)
    if age is not None:
        listing = listing.taken(np.flatnonzero(listing.times() < time.time() - age))
    wanted: Listing | None = listing
    if target is not None:
        ordered = listing.sorted(Sort.NAME)
        wanted = missing_from(target, ordered, options.namespace, of_any_size=True)
    todo = listing if wanted is None else wanted
    codec = Codec(options.threads)
    worker = StoreTranscoder(
        source,
        target,
        threads=options.threads,
        timeout_seconds=options.timeout,
        limit=options.limit,
        dry_run=options.dry_run,
        read_back=options.read_back,
        ask_target=wanted is None,
        pace=pace,
        transcoder=lambda: Transcoder(codec, recipe.spec, only=recipe.only, rotary=recipe.rotary),
    )
    found = worker.result
    found.present = len(listing) - len(todo)
    meter.begin(todo.stored_bytes)

    def heard(info: ObjectInfo) -> None:
        saved = bytes_text(found.bytes_before - found.bytes_after)
        meter.advance(info.stored_bytes, f"{found.handled}/{len(listing)} pages, {saved} saved")

    try:
        # The oldest first: they are the coldest, and with a limit the ones that matter.
        worker.run(todo.oldest_first(), heard)
    finally:
        codec.close()
    found.unasked = len(listing) - found.handled
    return found


def _show(result: Transcoding, seconds: float, options: TranscodeOptions) -> None:
    console = Console(highlight=False, emoji=False)
    saved = result.bytes_before - result.bytes_after
    console.print(
        f"{result.transcoded} pages {'would be ' if options.dry_run else ''}transcoded: "
        f"{bytes_text(result.bytes_before)} to {bytes_text(result.bytes_after)}, "
        f"{bytes_text(saved)} saved, in {seconds:.1f} s",
        soft_wrap=True,
    )
    for outcome, text in _LEFT.items():
        if result.left[outcome]:
            console.print(f"{result.left[outcome]} {text}", soft_wrap=True)
    for reason in sorted(result.unfit_reasons):
        console.print(escape(f"  {escaped(reason)}"), soft_wrap=True)
    if result.copied:
        console.print(f"{result.copied} of them copied, {bytes_text(result.copied_bytes)}")
    if result.present:
        console.print(f"{result.present} were there already")
    if result.changed:
        console.print(f"{result.changed} were replaced meanwhile, and left alone")
    if result.gone:
        console.print(f"{result.gone} had gone meanwhile")
    if result.unasked and not result.is_hopeless:
        console.print(f"{result.unasked} are left for another run")
    if result.faulty:
        console.print(f"[red]{len(result.faulty)} could not be transcoded:[/]")
    show_findings(console, result)
