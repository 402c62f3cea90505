"""The commands that look after a whole store, and their options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from kvcodec.cli.listing import Sort
from kvcodec.cli.options import AsJson, OneNamespace, StoreURL, Timeout

__all__ = ["STORE_COMMANDS", "copy", "gc", "ls", "rm", "scrub", "stat", "transcode"]

_Threads = Annotated[
    int, typer.Option("--threads", min=1, max=64, help="How many pages to move at a time.")
]
_Rate = Annotated[
    str, typer.Option("--rate", metavar="RATE", help="At most so fast, such as 100MB/s.")
]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")]


def ls(
    url: StoreURL,
    namespace: OneNamespace = "",
    long: Annotated[
        bool,
        typer.Option("--long", help="Also size and time of pages, or whose namespaces they are."),
    ] = False,
    limit: Annotated[int, typer.Option("--limit", min=0, help="At most so many; 0: all.")] = 0,
    sort: Annotated[
        Sort | None, typer.Option("--sort", help="By name, or the largest or newest first.")
    ] = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> int:
    """List the namespaces of a store, or the pages of one."""
    from kvcodec.cli.listing_text import run_ls

    return run_ls(
        url,
        namespace=namespace,
        long=long,
        limit=limit,
        sort=sort,
        timeout=timeout,
        as_json=as_json,
    )


def stat(
    url: StoreURL,
    namespace: OneNamespace = "",
    sample: Annotated[
        int,
        typer.Option("--sample", min=0, max=1_000_000, help="Look into so many pages, by chance."),
    ] = 100,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> int:
    """Count the pages and bytes of a store, and whose they are, in which codecs."""
    from kvcodec.cli.census_text import run_stat

    return run_stat(url, namespace=namespace, sample=sample, timeout=timeout, as_json=as_json)


def rm(
    url: StoreURL,
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="Object names or an engine's keys."),
    ] = None,
    namespace: OneNamespace = "",
    everything: Annotated[bool, typer.Option("--all", help="Every page of the store.")] = False,
    dry_run: _DryRun = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> int:
    """Delete pages by key, a namespace, or everything; asks first.

    Exit code 5 if a KEY has no page, 4 if a page could not be deleted.
    """
    from kvcodec.cli.removal_text import RemovalTarget, run_rm

    target = RemovalTarget(keys=keys or [], namespace=namespace, everything=everything)
    return run_rm(url, target, dry_run=dry_run, yes=yes, timeout=timeout, as_json=as_json)


def gc(
    url: StoreURL,
    max_bytes: Annotated[
        str,
        typer.Option("--max-bytes", metavar="SIZE", help="Delete the oldest above, as in 500GB."),
    ] = "",
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="Delete what is older, as in 7d.")
    ] = "",
    keep_namespace: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-namespace",
            metavar="DIGEST",
            help="Delete all namespaces but this and others given so.",
        ),
    ] = None,
    dry_run: _DryRun = False,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> int:
    """Make room in a store: by size, by age, by namespace. Never asks.

    Exit code 4 if a page could not be deleted.
    """
    from kvcodec.cli.removal_text import Collection, run_gc

    rules = Collection(
        max_bytes=max_bytes, older_than=older_than, keep_namespaces=keep_namespace or []
    )
    return run_gc(url, rules, dry_run=dry_run, timeout=timeout, as_json=as_json)


def scrub(
    url: StoreURL,
    namespace: OneNamespace = "",
    rate: _Rate = "",
    state: Annotated[
        str,
        typer.Option("--state", metavar="FILE", help="Keep here how far it came, and go on there."),
    ] = "",
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", min=0, help="Stop after so long.")
    ] = None,
    delete_bad: Annotated[
        bool, typer.Option("--delete-bad", help="Delete damaged pages; never unsupported ones.")
    ] = False,
    quarantine: Annotated[
        str, typer.Option("--quarantine", metavar="DIR", help="Move damaged pages into files here.")
    ] = "",
    threads: _Threads = 4,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> int:
    """Verify a store in the background of its use: at a rate, in parts.

    Exit codes as of verify.
    """
    from kvcodec.cli.scrub_text import ScrubOptions, run_scrub

    options = ScrubOptions(
        namespace=namespace,
        rate=rate,
        state=state,
        max_seconds=max_seconds,
        delete_bad=delete_bad,
        quarantine=quarantine,
        threads=threads,
        timeout=timeout,
    )
    return run_scrub(url, options, as_json=as_json)


def copy(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The store to read.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="The store to fill.")],
    namespace: OneNamespace = "",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Whether to copy sound pages only.")
    ] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Copy also what is there in the same size.")
    ] = False,
    rate: _Rate = "",
    threads: _Threads = 4,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> int:
    """Copy pages from one store to another; what is there already is left alone.

    Exit code 2 if a page is damaged and was not copied, 4 if some could not be read or written, 3
    if some are of an unknown version.
    """
    from kvcodec.cli.copying_text import CopyOptions, run_copy

    options = CopyOptions(
        namespace=namespace,
        verify=verify,
        overwrite=overwrite,
        rate=rate,
        threads=threads,
        timeout=timeout,
    )
    return run_copy(source, target, options, as_json=as_json)


def transcode(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The store to read.")],
    target: Annotated[
        str, typer.Argument(metavar="[DST]", help="The store to fill; SRC itself if omitted.")
    ] = "",
    *,
    spec: Annotated[
        str, typer.Option("--spec", metavar="SPEC", help="How to encode pages: preset or spec.")
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--from", metavar="SPEC", help="Only pages encoded so; default: all but raw ones."
        ),
    ] = None,
    namespace: OneNamespace = "",
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="Only what is older, as in 7d.")
    ] = "",
    limit: Annotated[
        int, typer.Option("--limit", min=0, help="Transcode at most so many pages; 0: all.")
    ] = 0,
    rotary: Annotated[
        str,
        typer.Option(
            "--rotary", metavar="CONFIG", help="The model's config.json, for keys in ecq."
        ),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Encode everything, write nothing.")
    ] = False,
    read_back: Annotated[
        bool, typer.Option("--read-back", help="Read each page again once it is written.")
    ] = False,
    rate: _Rate = "",
    threads: _Threads = 4,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> int:
    """Encode stored pages with fewer bits, in place or into another store.

    Exit codes as of copy.
    """
    from kvcodec.cli.transcoding_text import TranscodeOptions, run_transcode

    options = TranscodeOptions(
        spec=spec,
        only=only or [],
        namespace=namespace,
        older_than=older_than,
        limit=limit,
        rotary=rotary,
        dry_run=dry_run,
        read_back=read_back,
        rate=rate,
        threads=threads,
        timeout=timeout,
    )
    return run_transcode(source, target, options, as_json=as_json)


#: In the order of the help text.
STORE_COMMANDS: tuple[Callable[..., int], ...] = (ls, stat, rm, gc, scrub, copy, transcode)
