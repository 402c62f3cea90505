"""What ``kvcodec stat`` counts: everything a listing tells, and what a sample of pages adds."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from kvcodec.backend import Backend, ObjectInfo
from kvcodec.cli.inspection import time_text
from kvcodec.cli.output import Json
from kvcodec.cli.stores import PageReader
from kvcodec.errors import BackendError, PageError
from kvcodec.format import EncodedPage, PageHeader

__all__ = [
    "Census",
    "Group",
    "census_of",
    "codec_text",
    "identity_text",
    "largest_first",
    "layout_text",
    "read_header",
]

_LISTING_STEP = 1000


@dataclass(slots=True)
class Group:
    """Sampled pages that have something in common."""

    pages: int = 0
    stored_bytes: int = 0
    raw_bytes: int = 0
    #: What one of them says about itself.
    example: PageHeader | None = None

    def add(self, header: PageHeader) -> None:
        """Count one page."""
        self.pages += 1
        self.stored_bytes += header.page_bytes
        self.raw_bytes += header.layout.raw_bytes
        self.example = header

    @property
    def ratio(self) -> float:
        """Raw bytes per stored byte."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 0.0

    def as_json(self) -> dict[str, Json]:
        """The counts."""
        return {
            "pages": self.pages,
            "stored_bytes": self.stored_bytes,
            "raw_bytes": self.raw_bytes,
            "ratio": round(self.ratio, 4),
        }


@dataclass(slots=True)
class Census:
    """What a store holds. Everything under `sampled` and below is of the sample alone."""

    pages: int = 0
    stored_bytes: int = 0
    namespaces: set[str] = field(default_factory=set)
    oldest_seconds: float | None = None
    newest_seconds: float | None = None
    #: By the power of two that a size reaches, its pages and their bytes.
    sizes: dict[int, list[int]] = field(default_factory=dict)
    sampled: Group = field(default_factory=Group)
    codecs: dict[str, Group] = field(default_factory=dict)
    identities: dict[str, Group] = field(default_factory=dict)
    #: Sampled objects by the reason why they are no page that can be read.
    unreadable: Counter[str] = field(default_factory=Counter)

    def add(self, info: ObjectInfo) -> None:
        """Count one object of the listing."""
        self.pages += 1
        self.stored_bytes += info.stored_bytes
        self.namespaces.add(info.name[:32])
        modified = info.modified_seconds
        self.oldest_seconds = min(modified, self.oldest_seconds or modified)
        self.newest_seconds = max(modified, self.newest_seconds or modified)
        bucket = self.sizes.setdefault(max(info.stored_bytes, 1).bit_length() - 1, [0, 0])
        bucket[0] += 1
        bucket[1] += info.stored_bytes

    def add_header(self, header: PageHeader) -> None:
        """Count one page of the sample."""
        self.sampled.add(header)
        self.codecs.setdefault(codec_text(header), Group()).add(header)
        who = f"{identity_text(header)} | {layout_text(header)}"
        self.identities.setdefault(who, Group()).add(header)

    def as_json(self) -> dict[str, Json]:
        """Everything counted."""
        return {
            "pages": self.pages,
            "stored_bytes": self.stored_bytes,
            "namespaces": len(self.namespaces),
            "oldest": time_text(self.oldest_seconds),
            "newest": time_text(self.newest_seconds),
            "sizes": [
                {"from_bytes": 1 << power, "pages": pages, "stored_bytes": stored_bytes}
                for power, (pages, stored_bytes) in sorted(self.sizes.items())
            ],
            "sample": self.sampled.as_json() | {"unreadable": dict(self.unreadable)},
            "codecs": [
                {"codec": text, **group.as_json()} for text, group in largest_first(self.codecs)
            ],
            "identities": [
                _identity_json(group) | group.as_json()
                for _, group in largest_first(self.identities)
            ],
        }


def _identity_json(group: Group) -> dict[str, Json]:
    assert group.example is not None
    identity = dict(group.example.identity.as_dict())
    return {"identity": identity, "layout": layout_text(group.example)}


def largest_first(groups: Mapping[str, Group]) -> list[tuple[str, Group]]:
    """Groups by the bytes they hold."""
    return sorted(groups.items(), key=lambda item: -item[1].stored_bytes)


def census_of(
    backend: Backend,
    objects: Iterator[ObjectInfo],
    *,
    sample_count: int,
    timeout_seconds: float,
    heard: Callable[[int], None],
) -> Census:
    """Count a listing, which is read once and not kept, and look into `sample_count` pages.

    Every object has the same chance to be in the sample (Vitter's algorithm R); the same listing
    gives the same sample.
    """
    census = Census()
    rng = random.Random(0)  # noqa: S311 - a sample, no secret
    sample: list[ObjectInfo] = []
    for info in objects:
        census.add(info)
        if census.pages % _LISTING_STEP == 0:
            heard(census.pages)
        if len(sample) < sample_count:
            sample.append(info)
        elif sample_count and (place := rng.randrange(census.pages)) < sample_count:
            sample[place] = info
    reader = PageReader(backend, timeout_seconds)
    for info in sample:
        try:
            header = _header(reader, info)
        except (BackendError, PageError) as error:
            reason = error.reason if isinstance(error, PageError) else f"store:{error.label}"
            census.unreadable[reason] += 1
            continue
        if header is not None:
            census.add_header(header)
    return census


def read_header(backend: Backend, info: ObjectInfo, timeout_seconds: float) -> PageHeader:
    """What a page says about itself. Raises `BackendError` or `PageError`."""
    header = _header(PageReader(backend, timeout_seconds), info)
    if header is None:
        raise BackendError(f"{info.name} has gone since it was listed")
    return header


def _header(reader: PageReader, info: ObjectInfo) -> PageHeader | None:
    data = reader.read(info.name, info.stored_bytes)
    return None if data is None else EncodedPage.parse(data).header


def codec_text(header: PageHeader) -> str:
    """The codecs of a page, such as ``key=int8-g64 value=int4-g64``; layers that differ are joined
    with a plus.
    """
    streams = header.layout.streams
    parts = []
    for index, stream in enumerate(streams):
        texts = dict.fromkeys(codec.text for codec in header.codecs[index :: len(streams)])
        parts.append(f"{stream.role.text}={'+'.join(texts)}")
    return " ".join(parts)


def identity_text(header: PageHeader) -> str:
    """Whose pages these are, in one line."""
    return " ".join(f"{name}={value}" for name, value in header.identity.fields) or "nobody's"


def layout_text(header: PageHeader) -> str:
    """The shape of a raw page in one line: ``bf16, 64 tokens, layers 0-27, key 4x128 …``."""
    layout = header.layout
    last = layout.layer_start + layout.layer_count - 1
    streams = ", ".join(f"{s.role.text} {s.head_count}x{s.head_size}" for s in layout.streams)
    return (
        f"{layout.dtype.text}, {layout.token_count} tokens, layers {layout.layer_start}-{last}, "
        f"{streams}"
    )
