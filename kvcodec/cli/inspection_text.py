"""``kvcodec inspect``: pages as lines for people, drawn without rich (see `table_text`)."""

from __future__ import annotations

import sys
from collections import Counter

from kvcodec.cli.inspection import (
    EXTENSION_NAMES,
    SHOWN_EXTENSION_BYTES,
    Inspection,
    bits_per_element,
    inspect_page,
    layer_runs,
    overhead,
    run_sizes,
    time_text,
)
from kvcodec.cli.output import (
    ExitCode,
    bytes_text,
    escaped,
    paint,
    table_text,
    write_json,
    write_line,
)
from kvcodec.cli.pages import read_file
from kvcodec.errors import ConfigError
from kvcodec.format import MAJOR, Extension, PageHeader

__all__ = ["inspection_text", "run_inspect"]

_SHOWN_SECTIONS = 8
_SHOWN_PROBLEMS = 8
_STATUS_COLOURS = {"ok": "green", "bad": "red", "unsupported": "yellow"}


def run_inspect(
    page: str, key: str | None, layers: bool, namespace: str, timeout: float, as_json: bool
) -> ExitCode:
    """Find, check and show pages. The arguments are those of `kvcodec.cli.app.inspect`."""
    if "://" in page:
        if key is None:
            raise ConfigError(f"{page!r} is a store: give the KEY of a page in it, too")
        from kvcodec.cli.stores import read_key

        found = read_key(page, key, namespace, timeout)
    elif key is not None or namespace:
        raise ConfigError(f"KEY and --namespace need the URL of a store, and {page!r} is a file")
    else:
        found = [read_file(page)]
    inspections = [inspect_page(stored) for stored in found]
    if as_json:
        write_json({"pages": [each.as_json(all_layers=layers) for each in inspections]})
    else:
        texts = ("\n".join(inspection_text(each, all_layers=layers)) for each in inspections)
        write_line(sys.stdout, "\n\n".join(texts))
    return min((each.exit_code for each in inspections if each.exit_code), default=ExitCode.OK)


def inspection_text(inspection: Inspection, *, all_layers: bool) -> list[str]:
    """The lines of one page."""
    status = paint(_STATUS_COLOURS[inspection.status], inspection.status)
    lines = [f"{'page':<9} {escaped(inspection.stored.source)}", f"{'status':<9} {status}"]
    shown = inspection.problems[:_SHOWN_PROBLEMS]
    lines += [f"{'':<9} {error.reason}: {escaped(str(error))}" for error in shown]
    if len(shown) < len(inspection.problems):
        lines.append(f"{'':<9} and {len(inspection.problems) - len(shown)} more: see --json")
    if inspection.page is None:
        size = len(inspection.stored.data)
        return [*lines, f"{'size':<9} {size} bytes, of which no header can be read"]
    if not inspection.read.header_is_sound:
        lines.append(f"{'':<9} the header is damaged: what follows is what it most likely said")
    header = inspection.page.header
    lines += [f"{name:<9} {value}".rstrip() for name, value in _facts(inspection, header)]
    return [*lines, "", *_layer_table(header, all_layers=all_layers)]


def _facts(inspection: Inspection, header: PageHeader) -> list[tuple[str, str]]:
    layout = header.layout
    first = layout.layer_start
    last = first + layout.layer_count - 1
    facts = [
        ("version", f"{MAJOR}.{header.minor}"),
        ("key", escaped(header.key)),
        ("name", header.namespace.object_name(header.key)),
        ("modified", time_text(inspection.stored.modified_seconds) or "unknown"),
        ("size", f"{bytes_text(header.page_bytes)} for {bytes_text(layout.raw_bytes)} raw"),
        ("ratio", f"{layout.raw_bytes / header.page_bytes:.2f}"),
        ("bits", f"{bits_per_element(header):.3f} per element, all metadata included"),
        (
            "layout",
            f"{layout.dtype.text}, {layout.token_count} tokens, layers {first} to {last}",
        ),
    ]
    for stream in layout.streams:
        start = f", from head {stream.head_start}" if stream.head_start else ""
        facts.append(("", f"{stream.role.text}: {stream.head_count} × {stream.head_size}{start}"))
    facts += [
        ("identity" if index == 0 else "", f"{name} = {escaped(value)}")
        for index, (name, value) in enumerate(header.identity.fields)
    ]
    facts += [
        ("sections", _sections(inspection)),
        ("scales", _scales(inspection)),
        ("overhead", _overhead(header)),
    ]
    return facts + [("extension", _extension(extension)) for extension in header.extensions]


def _overhead(header: PageHeader) -> str:
    parts = overhead(header)
    return (
        f"{parts.percent:.2f} %: header {parts.header_bytes} B, scales and zero points "
        f"{parts.parameter_bytes} B, padding {parts.padding_bytes} B"
    )


def _extension(extension: Extension) -> str:
    name = EXTENSION_NAMES.get(extension.type, "unknown")
    more = "…" if len(extension.data) > SHOWN_EXTENSION_BYTES else ""
    start = extension.data[:SHOWN_EXTENSION_BYTES].hex()
    return f"type {extension.type} ({name}), {len(extension.data)} B: {start}{more}"


def _sections(inspection: Inspection) -> str:
    states = inspection.section_states
    counts = Counter(states)
    text = f"{counts.pop('ok', 0)} of {len(states)} have their checksum"
    for state, count in sorted(counts.items()):
        indices = [str(index) for index, found in enumerate(states) if found == state]
        more = ", …" if len(indices) > _SHOWN_SECTIONS else ""
        text += f"; {count} {state} ({', '.join(indices[:_SHOWN_SECTIONS])}{more})"
    return text


def _scales(inspection: Inspection) -> str:
    scales = inspection.scales
    if not scales.group_count:
        return "none"
    text = f"{scales.group_count} groups"
    if scales.minimum is not None:
        text += f", {scales.minimum:.4g} to {scales.maximum:.4g}"
    if scales.nonfinite_groups:
        text += f", {scales.nonfinite_groups} outside the codec's domain (they decode to NaN)"
    return text


def _layer_table(header: PageHeader, *, all_layers: bool) -> list[str]:
    runs = layer_runs(header, collapse=not all_layers)
    head = ["layers"]
    for stream in header.layout.streams:
        head += [stream.role.text, "bits", "bytes"]
    rows = []
    for run in runs:
        row = [str(run.first) if run.first == run.last else f"{run.first}-{run.last}"]
        for codec, (stored_bytes, bits) in zip(run.codecs, run_sizes(header, run), strict=True):
            row += [codec.text, f"{bits:.2f}", str(stored_bytes)]
        rows.append(row)
    numbers = [column for column in range(1, len(head)) if column % 3 != 1]
    lines = table_text(head, rows, numbers)
    lines[0] = paint("bold", lines[0])
    if len(runs) < header.layout.layer_count:
        lines.append("equal layers share a line; --layers shows each")
    return lines
