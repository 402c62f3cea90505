"""What ``kvcodec inspect`` finds out about a page."""

from __future__ import annotations

import dataclasses
import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcodec.cli.output import ExitCode, Json, exit_code_of
from kvcodec.cli.pages import ReadPage, StoredBytes, expected_name_error, read_page
from kvcodec.errors import CorruptPage, PageError
from kvcodec.format import MAJOR, EncodedPage, Extension, PageHeader, pad64, parameter_bytes
from kvcodec.layout import Stream
from kvcodec.spec import Kind, SectionCodec

__all__ = [
    "EXTENSION_NAMES",
    "SHOWN_EXTENSION_BYTES",
    "Inspection",
    "LayerRun",
    "Overhead",
    "Scales",
    "bits_per_element",
    "inspect_page",
    "layer_runs",
    "overhead",
    "run_sizes",
    "time_text",
]

#: Extension types that FORMAT.md sets aside.
EXTENSION_NAMES = {1: "profile", 2: "rotary parameters", 3: "protected tokens", 4: "encryption"}

SHOWN_EXTENSION_BYTES = 32


@dataclass(frozen=True, slots=True)
class Scales:
    """Range of the scales of all sound int sections, and how many groups have none."""

    group_count: int
    minimum: float | None
    maximum: float | None
    nonfinite_groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Where the bytes of a page go: header, scales and zero points, padding, codes."""

    header_bytes: int
    parameter_bytes: int
    padding_bytes: int
    code_bytes: int

    @property
    def percent(self) -> float:
        """Share of the page that is not codes."""
        other = self.header_bytes + self.parameter_bytes + self.padding_bytes
        return 100 * other / (other + self.code_bytes)


@dataclass(frozen=True, slots=True)
class LayerRun:
    """Layers, absolute indices from `first` to `last`, whose streams are encoded alike."""

    first: int
    last: int
    codecs: tuple[SectionCodec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything known about one page. `page` is None where no header could be read."""

    stored: StoredBytes
    read: ReadPage
    problems: Sequence[PageError]
    section_states: Sequence[str]
    scales: Scales

    @property
    def page(self) -> EncodedPage | None:
        """The page, mended where its header is damaged."""
        return self.read.page

    @property
    def exit_code(self) -> ExitCode:
        """How bad it is."""
        return exit_code_of(self.problems[0]) if self.problems else ExitCode.OK

    @property
    def status(self) -> str:
        """``ok``, ``bad`` or ``unsupported``."""
        return {ExitCode.OK: "ok", ExitCode.UNSUPPORTED: "unsupported"}.get(self.exit_code, "bad")

    def as_json(self, *, all_layers: bool) -> Json:
        """The page as JSON; `all_layers` writes a row per layer instead of one per run."""
        stored, page = self.stored, self.page
        document: dict[str, Json] = {
            "source": stored.source,
            "object_name": stored.name,
            "modified": time_text(stored.modified_seconds),
            "status": self.status,
            "problems": [
                {"reason": error.reason, "message": str(error)} for error in self.problems
            ],
            "available_bytes": len(stored.data),
            "header_is_sound": self.read.header_is_sound,
        }
        if page is not None:
            document |= _header_json(page.header)
            document["layers"] = [
                _run_json(page.header, run)
                for run in layer_runs(page.header, collapse=not all_layers)
            ]
            document["sections"] = self._sections_json(page.header)
            document["scales"] = {
                "groups": self.scales.group_count,
                "minimum": self.scales.minimum,
                "maximum": self.scales.maximum,
                "nonfinite_groups": self.scales.nonfinite_groups,
            }
        return document

    def _sections_json(self, header: PageHeader) -> Json:
        stream_count = len(header.layout.streams)
        bad: list[Json] = [
            {
                "section": index,
                "layer": header.layout.layer_start + index // stream_count,
                "role": header.layout.streams[index % stream_count].role.text,
                "state": state,
            }
            for index, state in enumerate(self.section_states)
            if state != "ok"
        ]
        counts = Counter(self.section_states)
        return {"count": len(self.section_states), "ok": counts["ok"], "not_ok": bad}


def inspect_page(stored: StoredBytes) -> Inspection:
    """Read a page and check every part of it. Never raises for what is wrong with the page."""
    read = read_page(stored.data)
    problems = list(read.problems)
    states: list[str] = []
    sections: list[memoryview | None] = []
    if read.page is not None:
        if stored.name is not None and read.header_is_sound:
            misplaced = expected_name_error(read.page, stored.name)
            problems += [misplaced] if misplaced else []
        for index in range(len(read.page.header.codecs)):
            section, error = _section(read, index)
            sections.append(section)
            states.append("ok" if error is None else error.reason)
            if error is not None and not (states[-1] == "corrupt:missing" and problems):
                problems.append(error)
    return Inspection(
        stored=stored,
        read=read,
        problems=problems,
        section_states=states,
        scales=_scales(read.page, sections),
    )


def _section(read: ReadPage, index: int) -> tuple[memoryview | None, PageError | None]:
    page = read.page
    assert page is not None
    if (
        page.header.section_offsets[index] + pad64(page.header.stored_bytes[index])
        > read.available_bytes
    ):
        return None, CorruptPage("missing", f"section {index} lies beyond the end of the object")
    try:
        return page.section(index), None
    except CorruptPage as error:
        return None, error


def _scales(page: EncodedPage | None, sections: Sequence[memoryview | None]) -> Scales:
    """Over the bf16 scales of the sound int sections (FORMAT.md 3.2)."""
    parts: list[npt.NDArray[np.uint16]] = []
    for index, section in enumerate(sections):
        assert page is not None
        codec, stream = page.header.codecs[index], _stream(page.header, index)
        if section is None or codec.kind is not Kind.INT:
            continue
        size = parameter_bytes(stream, page.header.layout.token_count, codec)
        words = np.frombuffer(section[:size], "<u2")
        parts.append(words[1::2] if codec.asymmetric else words)
    bits = np.concatenate(parts) if parts else np.empty(0, np.uint16)
    values = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    finite = values[np.isfinite(values)]
    return Scales(
        group_count=len(values),
        minimum=float(finite.min()) if len(finite) else None,
        maximum=float(finite.max()) if len(finite) else None,
        nonfinite_groups=len(values) - len(finite),
    )


def _stream(header: PageHeader, index: int) -> Stream:
    return header.layout.streams[index % len(header.layout.streams)]


def layer_runs(header: PageHeader, *, collapse: bool) -> list[LayerRun]:
    """The codecs of each layer; with `collapse`, equal neighbours are one run."""
    stream_count = len(header.layout.streams)
    runs: list[LayerRun] = []
    for layer in range(header.layout.layer_count):
        codecs = header.codecs[layer * stream_count : (layer + 1) * stream_count]
        index = header.layout.layer_start + layer
        if collapse and runs and runs[-1].codecs == codecs:
            runs[-1] = LayerRun(runs[-1].first, index, codecs)
        else:
            runs.append(LayerRun(index, index, codecs))
    return runs


def _run_json(header: PageHeader, run: LayerRun) -> Json:
    row: dict[str, Json] = {"first": run.first, "last": run.last}
    for stream, codec, (stored_bytes, bits) in zip(
        header.layout.streams, run.codecs, run_sizes(header, run), strict=True
    ):
        row[stream.role.text] = {
            "codec": codec.text,
            "stored_bytes": stored_bytes,
            "bits_per_element": round(bits, 4),
        }
    return row


def run_sizes(header: PageHeader, run: LayerRun) -> list[tuple[int, float]]:
    """For each stream of the layers of a run: stored bytes of a layer, and bits per element with
    padding; the mean of the layers, where sections are coded and each has its own size.
    """
    layout = header.layout
    width = len(layout.streams)
    start, end = ((layer - layout.layer_start) * width for layer in (run.first, run.last + 1))
    sizes = []
    for at, stream in enumerate(layout.streams):
        stored = header.stored_bytes[start + at : end : width]
        elements = stream.head_count * stream.head_size * layout.token_count * len(stored)
        sizes.append((round(sum(stored) / len(stored)), 8 * sum(map(pad64, stored)) / elements))
    return sizes


def _header_json(header: PageHeader) -> dict[str, Json]:
    layout = header.layout
    parts = overhead(header)
    return {
        "version": {"major": MAJOR, "minor": header.minor},
        "key": header.key,
        "namespace": header.namespace.digest.hex(),
        "name": header.namespace.object_name(header.key),
        "identity": dict(header.identity.as_dict()),
        "layout": {
            "dtype": layout.dtype.text,
            "token_count": layout.token_count,
            "layer_start": layout.layer_start,
            "layer_count": layout.layer_count,
            "streams": [
                {
                    "role": stream.role.text,
                    "head_count": stream.head_count,
                    "head_size": stream.head_size,
                    "head_start": stream.head_start,
                }
                for stream in layout.streams
            ],
        },
        "raw_bytes": layout.raw_bytes,
        "page_bytes": header.page_bytes,
        "ratio": round(layout.raw_bytes / header.page_bytes, 4),
        "bits_per_element": round(bits_per_element(header), 4),
        "overhead": dataclasses.asdict(parts) | {"overhead_percent": round(parts.percent, 3)},
        "extensions": [_extension_json(extension) for extension in header.extensions],
    }


def overhead(header: PageHeader) -> Overhead:
    """Where the bytes of a page go."""
    parameters = [
        parameter_bytes(_stream(header, index), header.layout.token_count, codec)
        for index, codec in enumerate(header.codecs)
    ]
    padding = sum(-size % 64 for size in parameters) + sum(-s % 64 for s in header.stored_bytes)
    return Overhead(
        header_bytes=header.header_bytes,
        parameter_bytes=sum(parameters),
        padding_bytes=padding,
        code_bytes=header.page_bytes - header.header_bytes - sum(parameters) - padding,
    )


def bits_per_element(header: PageHeader) -> float:
    """Bits of the whole page, all metadata included, per element of the raw page."""
    elements = header.layout.raw_bytes // header.layout.dtype.itemsize
    return 8 * header.page_bytes / elements


def _extension_json(extension: Extension) -> Json:
    return {
        "type": extension.type,
        "name": EXTENSION_NAMES.get(extension.type),
        "critical": extension.critical,
        "bytes": len(extension.data),
        "data_hex": extension.data[:SHOWN_EXTENSION_BYTES].hex(),
        "truncated": len(extension.data) > SHOWN_EXTENSION_BYTES,
    }


def time_text(seconds: float | None) -> str | None:
    """A moment in UTC, None if it is not known."""
    if seconds is None:
        return None
    time = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return time.isoformat(timespec="seconds")
