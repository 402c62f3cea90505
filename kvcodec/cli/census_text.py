"""``kvcodec stat``: the counts for people."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from kvcodec.backend import display_url
from kvcodec.cli.census import Census, Group, census_of, largest_first
from kvcodec.cli.inspection import time_text
from kvcodec.cli.listing import listed_objects
from kvcodec.cli.output import (
    ExitCode,
    Json,
    bytes_text,
    escaped,
    paint,
    table_text,
    write_json,
    write_line,
)
from kvcodec.cli.progress import metered
from kvcodec.cli.stores import check_namespace, opened

__all__ = ["run_stat"]


def run_stat(url: str, *, namespace: str, sample: int, timeout: float, as_json: bool) -> ExitCode:
    """Count a store. The arguments are those of `kvcodec.cli.store_commands.stat`."""
    check_namespace(namespace)
    with opened(url) as backend:
        with metered() as meter:
            census = census_of(
                backend,
                listed_objects(backend, namespace),
                sample_count=sample,
                timeout_seconds=timeout,
                heard=meter.listed,
            )
        counters = dict(backend.counters())
    if as_json:
        document: dict[str, Json] = {"url": display_url(url), "namespace": namespace or None}
        write_json(document | census.as_json() | {"counters": counters})
    else:
        for line in _lines(escaped(display_url(url)), census, counters):
            write_line(sys.stdout, line)
    return ExitCode.OK


def _lines(url: str, census: Census, counters: Mapping[str, int]) -> list[str]:
    if not census.pages:
        return [f"{url} has no pages"]
    lines = [
        f"{'store':<10} {url}",
        f"{'pages':<10} {census.pages} in {len(census.namespaces)} namespaces",
        f"{'size':<10} {bytes_text(census.stored_bytes)}",
        f"{'oldest':<10} {time_text(census.oldest_seconds)}",
        f"{'newest':<10} {time_text(census.newest_seconds)}",
    ]
    sampled = census.sampled
    if sampled.pages:
        sizes = f"{bytes_text(sampled.stored_bytes)} for {bytes_text(sampled.raw_bytes)} raw"
        lines.append(f"{'sample':<10} {sampled.pages} pages, {sizes}")
        lines.append(f"{'ratio':<10} {sampled.ratio:.2f}")
    for reason, count in census.unreadable.most_common():
        lines.append(f"{'unreadable':<10} {count} of the sample: {escaped(reason)}")
    rows = [
        [f"{bytes_text(1 << power)} to {bytes_text(2 << power)}", str(pages), bytes_text(size)]
        for power, (pages, size) in sorted(census.sizes.items())
    ]
    lines += _section(["page size", "pages", "size"], rows)
    lines += _section(["codecs in the sample", "pages", "size", "ratio"], _rows(census.codecs))
    head = ["identities in the sample", "pages", "size", "ratio"]
    lines += _section(head, _rows(census.identities))
    counts = [[escaped(name), str(count)] for name, count in counters.items()]
    return lines + _section(["counter of this process", "count"], counts)


def _rows(groups: Mapping[str, Group]) -> list[list[str]]:
    return [
        [escaped(text), str(group.pages), bytes_text(group.stored_bytes), f"{group.ratio:.2f}"]
        for text, group in largest_first(groups)
    ]


def _section(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = table_text(head, rows, numbers=range(1, len(head)))
    return ["", paint("bold", lines[0]), *lines[1:]]
