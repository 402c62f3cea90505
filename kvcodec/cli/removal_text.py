"""``kvcodec rm`` and ``kvcodec gc``: the question, the progress bar, and what was freed."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

from kvcodec.backend import Backend, ObjectInfo, display_url, parse_byte_count
from kvcodec.cli.listing import Listing, listed
from kvcodec.cli.output import (
    ExitCode,
    Json,
    NoSuchPage,
    bytes_text,
    escaped,
    write_json,
    write_line,
)
from kvcodec.cli.progress import Meter, metered
from kvcodec.cli.removal import Removal, chosen, remove
from kvcodec.cli.scrub import parse_seconds
from kvcodec.cli.stores import check_namespace, named_namespaces, names_of_key, opened
from kvcodec.errors import ConfigError

__all__ = ["Collection", "RemovalTarget", "run_gc", "run_rm"]

_SHOWN_FAILURES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalTarget:
    """What `kvcodec rm` is to delete: keys, a namespace, or everything."""

    keys: Sequence[str]
    namespace: str
    everything: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """The rules of one `kvcodec gc`, as they were typed."""

    max_bytes: str
    older_than: str
    keep_namespaces: Sequence[str]


def run_rm(
    url: str, target: RemovalTarget, *, dry_run: bool, yes: bool, timeout: float, as_json: bool
) -> ExitCode:
    """Delete pages. The arguments are those of `kvcodec.cli.store_commands.rm`."""
    check_namespace(target.namespace)
    if target.everything == bool(target.keys or target.namespace):
        raise ConfigError("wanted is one of: KEYs, --namespace DIGEST, or --all")
    asks = not (dry_run or yes)
    if asks and not sys.stdin.isatty():
        raise ConfigError("nobody can be asked here: --yes deletes, --dry-run only counts")
    shown = display_url(url)
    with opened(url) as backend:
        with metered() as meter:
            listing, missing = _targets(backend, target, timeout, meter)
        size = f"{_pages(len(listing))} ({bytes_text(listing.stored_bytes)})"
        if asks and len(listing):
            _ask(f"delete {size} of {escaped(shown)}?")
        with metered() as meter:
            result = _removed(backend, listing, timeout, meter, dry_run=dry_run)
    code = result.exit_code or (ExitCode.NO_PAGE if missing else ExitCode.OK)
    if as_json:
        document: dict[str, Json] = {"url": shown, "namespace": target.namespace or None}
        found: dict[str, Json] = {"pages": len(listing), "stored_bytes": listing.stored_bytes}
        write_json(
            document | {"dry_run": dry_run} | found | result.as_json() | {"missing": missing}
        )
    else:
        _show(result, f"{size} would be deleted" if dry_run else "")
        for key in missing:
            write_line(sys.stderr, f"kvcodec: no page of the key {escaped(key)!r}")
    return code


def run_gc(
    url: str, rules: Collection, *, dry_run: bool, timeout: float, as_json: bool
) -> ExitCode:
    """Make room. The arguments are those of `kvcodec.cli.store_commands.gc`."""
    max_bytes = parse_byte_count("--max-bytes", rules.max_bytes) if rules.max_bytes else None
    age = parse_seconds("--older-than", rules.older_than) if rules.older_than else None
    for digest in rules.keep_namespaces:
        if not check_namespace(digest):
            raise ConfigError("--keep-namespace is empty, wanted are 32 hex digits")
    if max_bytes is None and age is None and not rules.keep_namespaces:
        raise ConfigError("wanted is at least one of --max-bytes, --older-than, --keep-namespace")
    with opened(url) as backend, metered() as meter:
        listing = listed(backend, "", meter.listed)
        for digest in rules.keep_namespaces:
            # A typing error here would delete everything.
            if not listing.in_namespace(digest).any():
                raise NoSuchPage(
                    f"the namespace to keep, {digest}, has no page: nothing is deleted"
                )
        choices = chosen(
            listing,
            keep_namespaces=rules.keep_namespaces,
            written_before_seconds=None if age is None else time.time() - age,
            max_bytes=max_bytes,
        )
        condemned = Listing.of(chain.from_iterable(choice.listing for choice in choices))
        result = _removed(backend, condemned, timeout, meter, dry_run=dry_run)
    reasons = {
        choice.reason: {"pages": len(choice.listing), "stored_bytes": choice.listing.stored_bytes}
        for choice in choices
    }
    freed = condemned.stored_bytes if dry_run else result.deleted_bytes
    left = len(listing) - (len(condemned) if dry_run else result.deleted + result.gone)
    if as_json:
        document: dict[str, Json] = {"url": display_url(url), "dry_run": dry_run}
        found: dict[str, Json] = {
            "pages": len(listing),
            "stored_bytes": listing.stored_bytes,
            "condemned": reasons,
            "left_pages": left,
        }
        write_json(document | found | result.as_json())
        return result.exit_code
    _show(result, f"{bytes_text(freed)} in {_pages(len(condemned))} would be freed" * dry_run)
    for choice in choices:
        size = bytes_text(choice.listing.stored_bytes)
        write_line(sys.stdout, f"  {len(choice.listing):>8} {size:>12}  {_REASONS[choice.reason]}")
    write_line(sys.stdout, f"{_pages(left)} left")
    return result.exit_code


_REASONS = {
    "namespace": "of namespaces that are not kept",
    "age": "written too long ago",
    "size": "the oldest, above the size",
}


def _pages(count: int) -> str:
    return f"{count} page" if count == 1 else f"{count} pages"


def _targets(
    backend: Backend, target: RemovalTarget, timeout: float, meter: Meter
) -> tuple[Listing, list[str]]:
    """The pages to delete, each once, and the keys that have none."""
    if not target.keys:
        return listed(backend, target.namespace, meter.listed), []

    @cache
    def namespaces() -> list[str]:
        return [target.namespace] if target.namespace else named_namespaces(backend)

    found: dict[str, ObjectInfo] = {}
    missing = []
    for key in target.keys:
        infos = [
            info
            for name in names_of_key(key, namespaces)
            if (info := backend.stat(name, timeout_seconds=timeout)) is not None
        ]
        found |= {info.name: info for info in infos}
        if not infos:
            missing.append(key)
    return Listing.of(found.values()), missing


def _ask(question: str) -> None:
    """Return if the answer is yes; anything else interrupts the command."""
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise KeyboardInterrupt


def _removed(
    backend: Backend, listing: Listing, timeout: float, meter: Meter, *, dry_run: bool
) -> Removal:
    if dry_run:
        return Removal()
    meter.begin(listing.stored_bytes)

    def heard(stored_bytes: int, result: Removal) -> None:
        text = f"{result.deleted}/{len(listing)} deleted, {len(result.failures)} failed"
        meter.advance(stored_bytes, text)

    return remove(backend, listing, timeout_seconds=timeout, heard=heard)


def _show(result: Removal, forecast: str) -> None:
    freed = f"{_pages(result.deleted)} deleted, {bytes_text(result.deleted_bytes)} freed"
    write_line(sys.stdout, forecast or freed)
    if result.gone:
        write_line(sys.stdout, f"{result.gone} had gone already")
    for name, message in result.failures[:_SHOWN_FAILURES]:
        write_line(sys.stdout, f"{name}  {escaped(message)}")
    if len(result.failures) > _SHOWN_FAILURES:
        write_line(sys.stdout, f"and {len(result.failures) - _SHOWN_FAILURES} more: see --json")
    if result.unasked:
        write_line(sys.stdout, f"given up: {result.unasked} pages were not tried any more")
