"""``kvcodec ls``: namespaces, or the pages of one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from kvcodec.backend import Backend, ObjectInfo, display_url
from kvcodec.cli.census import identity_text, layout_text, read_header
from kvcodec.cli.inspection import time_text
from kvcodec.cli.listing import Listing, NamespaceTotal, Sort, listed_objects, totals
from kvcodec.cli.output import ExitCode, Json, bytes_text, escaped, paint, table_text, write_line
from kvcodec.cli.stores import check_namespace, opened
from kvcodec.errors import KVCodecError
from kvcodec.format import PageHeader

__all__ = ["run_ls"]

_ORDERS = {
    Sort.NAME: lambda total: total.namespace,
    Sort.SIZE: lambda total: -total.stored_bytes,
    Sort.TIME: lambda total: -total.newest_seconds,
}


def run_ls(
    url: str,
    *,
    namespace: str,
    long: bool,
    limit: int,
    sort: Sort | None,
    timeout: float,
    as_json: bool,
) -> ExitCode:
    """Show what is in a store. The arguments are those of `kvcodec.cli.store_commands.ls`."""
    check_namespace(namespace)
    with opened(url) as backend:
        if namespace:
            pages = _pages(backend, namespace, sort, limit)
            _show_pages(url, namespace, pages, long=long, as_json=as_json)
        else:
            found = totals(listed_objects(backend))
            rows = sorted(found.values(), key=_ORDERS[sort or Sort.NAME])[: limit or None]
            headers = [_header(backend, row, timeout) if long else None for row in rows]
            if as_json:
                _write_namespaces_json(url, found.values(), rows, headers)
            else:
                _show_namespaces(url, found.values(), rows, headers, long=long)
    return ExitCode.OK


def _pages(backend: Backend, namespace: str, sort: Sort | None, limit: int) -> Iterable[ObjectInfo]:
    """The pages of a namespace; unsorted ones as the store comes to them, so that a long listing
    begins at once and takes no memory.
    """
    objects: Iterable[ObjectInfo] = listed_objects(backend, namespace)
    if sort is not None:
        objects = Listing.of(objects).sorted(sort)
    return islice(objects, limit or None)


def _show_pages(
    url: str, namespace: str, pages: Iterable[ObjectInfo], *, long: bool, as_json: bool
) -> None:
    if as_json:
        # A store that fails half-way must not leave half a document behind.
        kept = Listing.of(pages)
        head: dict[str, Json] = {"url": display_url(url), "namespace": namespace}
        head |= {"pages": len(kept), "stored_bytes": kept.stored_bytes}
        _write_rows(head, "objects", (_page_json(info) for info in kept))
        return
    for info in pages:
        time = time_text(info.modified_seconds)
        write_line(sys.stdout, f"{info.stored_bytes:>12} {time} {info.name}" if long else info.name)


def _page_json(info: ObjectInfo) -> Json:
    return {
        "name": info.name,
        "stored_bytes": info.stored_bytes,
        "modified": time_text(info.modified_seconds),
    }


def _write_rows(head: dict[str, Json], name: str, rows: Iterator[Json]) -> None:
    """One document with a long list at its end, a row per line, without making all of it first."""
    start = json.dumps(head, indent=2)
    write_line(sys.stdout, f"{start[:-2]},\n  {json.dumps(name)}: [")
    comma = ""
    for row in rows:
        sys.stdout.write(f"{comma}    {json.dumps(row)}")
        comma = ",\n"
    write_line(sys.stdout, "\n  ]\n}")


def _header(backend: Backend, total: NamespaceTotal, timeout: float) -> PageHeader | str:
    """What a page of the namespace says of all of them, or why it cannot be read."""
    assert total.example is not None
    try:
        return read_header(backend, total.example, timeout)
    except KVCodecError as error:
        return str(error)


def _write_namespaces_json(
    url: str,
    found: Iterable[NamespaceTotal],
    rows: Sequence[NamespaceTotal],
    headers: Sequence[PageHeader | str | None],
) -> None:
    every = list(found)
    head: dict[str, Json] = {
        "url": display_url(url),
        "pages": sum(total.pages for total in every),
        "stored_bytes": sum(total.stored_bytes for total in every),
        "namespace_count": len(every),
    }
    _write_rows(head, "namespaces", (_total_json(*row) for row in zip(rows, headers, strict=True)))


def _total_json(total: NamespaceTotal, header: PageHeader | str | None) -> Json:
    row: dict[str, Json] = {
        "namespace": total.namespace,
        "pages": total.pages,
        "stored_bytes": total.stored_bytes,
        "oldest": time_text(total.oldest_seconds),
        "newest": time_text(total.newest_seconds),
    }
    if isinstance(header, PageHeader):
        row |= {"identity": dict(header.identity.as_dict()), "layout": layout_text(header)}
    elif header is not None:
        row |= {"problem": header}
    return row


def _show_namespaces(
    url: str,
    found: Iterable[NamespaceTotal],
    rows: Sequence[NamespaceTotal],
    headers: Sequence[PageHeader | str | None],
    *,
    long: bool,
) -> None:
    every = list(found)
    if not every:
        write_line(sys.stdout, f"{escaped(display_url(url))} has no pages")
        return
    table = [
        [
            total.namespace,
            str(total.pages),
            bytes_text(total.stored_bytes),
            time_text(total.oldest_seconds) or "",
            time_text(total.newest_seconds) or "",
            *([_description(header)] if long else []),
        ]
        for total, header in zip(rows, headers, strict=True)
    ]
    head = ["namespace", "pages", "size", "oldest", "newest", *(["identity"] if long else [])]
    lines = table_text(head, table, numbers=(1, 2))
    write_line(sys.stdout, paint("bold", lines[0]))
    for line in lines[1:]:
        write_line(sys.stdout, line)
    size = bytes_text(sum(total.stored_bytes for total in every))
    pages = sum(total.pages for total in every)
    left_out = f", {len(every) - len(rows)} not shown" if len(rows) < len(every) else ""
    write_line(sys.stdout, f"{len(every)} namespaces, {pages} pages, {size}{left_out}")


def _description(header: PageHeader | str | None) -> str:
    if isinstance(header, PageHeader):
        return escaped(f"{identity_text(header)} | {layout_text(header)}")
    return f"? {escaped(header or '')}"
