"""Pages that a reader must refuse, each for one cause, made by a writer that shares no code with
kvcodec: `tools/make_golden.py` writes them to tests/golden/v1/rejected.

Checksums are right unless the checksum is the cause, so that the check under test does the
refusing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

MAGIC = b"\x89KVC\r\n\x1a\n"
FIXED_FIELDS = (
    ("magic", "8s"),
    ("major", "H"),
    ("minor", "H"),
    ("header_bytes", "I"),
    ("page_bytes", "Q"),
    ("required_flags", "I"),
    ("optional_flags", "I"),
    ("dtype", "B"),
    ("stream_count", "B"),
    ("layer_count", "H"),
    ("layer_start", "I"),
    ("token_count", "I"),
    ("section_count", "I"),
    ("identity_bytes", "H"),
    ("key_bytes", "H"),
    ("extension_bytes", "I"),
    ("reserved", "8s"),
)


def pad(data: bytes, multiple: int) -> bytes:
    """Zeros up to a multiple."""
    return data + bytes(-len(data) % multiple)


@dataclass(frozen=True)
class Row:
    """One row of the section table; None is computed."""

    kind: int = 1
    bits: int = 4
    options: int = 1
    table: int = 0
    group_size: int = 8
    stored_bytes: int | None = None
    side_bytes: int = 0
    checksum: int | None = None

    def pack(self, section: bytes) -> bytes:
        """The row, with the checksum of the padded section."""
        stored = len(section) if self.stored_bytes is None else self.stored_bytes
        checksum = self.checksum
        if checksum is None:
            checksum = xxhash.xxh3_64_intdigest(pad(section, 64))
        head = (self.kind, self.bits, self.options, self.table)
        return struct.pack("<BBBBIIIQ", *head, self.group_size, stored, self.side_bytes, checksum)


def stream(role: int, heads: int = 1, size: int = 17, start: int = 0, reserved: int = 0) -> bytes:
    """A stream record."""
    return struct.pack("<BBHIII", role, reserved, 0, heads, size, start)


def field_record(name: bytes, value: bytes, size: int | None = None) -> bytes:
    """An identity field, whose length may be a lie."""
    length = struct.pack("<H", len(value) if size is None else size)
    return bytes([len(name)]) + name + length + value


def extension(kind: int, data: bytes = b"", flags: int = 0, size: int | None = None) -> bytes:
    """An extension record, whose length may be a lie."""
    header = struct.pack("<HHI", kind, flags, len(data) if size is None else size)
    return pad(header + data, 8)


# Two tokens of one head of 17 elements in groups of 8: 6 parameters of 4 bytes, padded to 64, and
# 9 bytes of codes a row.
SECTION = struct.pack("<12H", *[0x3F00, 0x3D80] * 6).ljust(64, b"\0") + bytes(range(18))


@dataclass(frozen=True)
class Draft:
    """All the parts of a page; `fixed` overrides what follows from the others."""

    fixed: dict[str, Any] = field(default_factory=dict)
    streams: tuple[bytes, ...] = (stream(1), stream(2))
    rows: tuple[Row, ...] = (Row(), Row())
    sections: tuple[bytes, ...] = (SECTION, SECTION[:64] + bytes(range(18, 36)))
    identity: bytes = field_record(b"model", b"example") + field_record(b"rank", b"0")
    key: bytes = b"key"
    extensions: bytes = extension(9, b"unknown")
    header_tail: bytes = b""
    section_tail: bytes | None = None
    header_checksum: int | None = None

    def build(self) -> bytes:
        """The page."""
        packed = zip(self.rows, self.sections, strict=False)
        table = b"".join(row.pack(self._padded(section)[1]) for row, section in packed)
        body = b"".join(self.streams) + table + self.identity + self.key + self.extensions
        inside = 64 + len(body) + len(self.header_tail) + 8
        header_bytes = -(-inside // 64) * 64
        payload = b"".join(self._padded(section)[0] for section in self.sections)
        values: dict[str, Any] = {
            "magic": MAGIC,
            "major": 1,
            "minor": 0,
            "header_bytes": header_bytes,
            "page_bytes": header_bytes + len(payload),
            "required_flags": 0,
            "optional_flags": 0,
            "dtype": 1,
            "stream_count": len(self.streams),
            "layer_count": 1,
            "layer_start": 0,
            "token_count": 2,
            "section_count": len(self.rows),
            "identity_bytes": len(self.identity),
            "key_bytes": len(self.key),
            "extension_bytes": len(self.extensions),
            "reserved": bytes(8),
        } | self.fixed
        fixed = b"".join(struct.pack("<" + code, values[name]) for name, code in FIXED_FIELDS)
        header = (fixed + body + self.header_tail).ljust(header_bytes - 8, b"\0")
        checksum = self.header_checksum
        if checksum is None:
            checksum = xxhash.xxh3_64_intdigest(header)
        return header + struct.pack("<Q", checksum) + payload

    def _padded(self, section: bytes) -> tuple[bytes, bytes]:
        """The section as it lies in the page, and what its row is made from."""
        if self.section_tail is None:
            return pad(section, 64), section
        padded = pad(section, 64)
        dirty = padded[: -len(self.section_tail)] + self.section_tail
        return dirty, section

    def row(self, index: int = 0, **changes: Any) -> Draft:
        """The same with one row of the table changed."""
        rows = list(self.rows)
        rows[index] = replace(rows[index], **changes)
        return replace(self, rows=tuple(rows))


@dataclass(frozen=True)
class BadPage:
    """A page to be refused: `error` is the class, `reason` its label."""

    name: str
    error: str
    reason: str
    page: bytes


GOOD = Draft()


def _length() -> Iterator[tuple[str, str, bytes]]:
    page = GOOD.build()
    yield "empty", "length", b""
    yield "one-byte", "length", page[:1]
    yield "shorter-than-any-page", "length", page[:127]
    yield "truncated-in-header", "length", page[:200]
    yield "truncated-after-header", "length", page[:256]
    yield "truncated-in-section", "length", page[:300]
    yield "truncated-by-one", "length", page[:-1]
    yield "trailing-byte", "length", page + b"\0"
    yield "trailing-block", "length", page + bytes(64)
    yield "page-twice", "length", page + page
    for name, size in (
        ("0", 0),
        ("less-64", len(page) - 64),
        ("2-63", 1 << 63),
        ("max", 2**64 - 1),
    ):
        yield f"page-bytes-{name}", "length", replace(GOOD, fixed={"page_bytes": size}).build()
    yield (
        "hole-after-sections",
        "length",
        replace(GOOD, sections=(*GOOD.sections, bytes(64))).build(),
    )
    short = replace(GOOD, sections=(SECTION, SECTION[:64])).row(1, stored_bytes=len(SECTION))
    yield "sections-run-past-the-end", "length", short.build()
    overlap = replace(GOOD, sections=(SECTION,)).build()
    yield "sections-overlap", "header_bytes", overlap
    yield "zeros", "magic", bytes(len(page))
    yield "text-mode", "magic", page.replace(b"\r\n", b"\n")
    yield "seven-bit", "magic", bytes(byte & 0x7F for byte in page)
    yield "magic-last-byte", "magic", replace(GOOD, fixed={"magic": b"\x89KVC\r\n\x1a\r"}).build()


def _header() -> Iterator[tuple[str, str, bytes]]:
    for name, size in (("0", 0), ("64", 64), ("odd", 257), ("above-limit", (1 << 18) + 64)):
        yield (
            f"header-bytes-{name}",
            "header_bytes",
            replace(GOOD, fixed={"header_bytes": size}).build(),
        )
    for name, size in (("beyond-page", 1 << 16), ("negative", 2**32 - 64)):
        yield (
            f"header-bytes-{name}",
            "header_bytes",
            replace(GOOD, fixed={"header_bytes": size}).build(),
        )
    yield "header-block-too-many", "header_bytes", replace(GOOD, header_tail=bytes(64)).build()
    padding = replace(GOOD, header_tail=b"\0\1").build()
    yield "header-padding", "padding", padding
    yield "header-checksum-0", "header_checksum", replace(GOOD, header_checksum=0).build()
    for name, value in (
        ("stream_count", 0), ("stream_count", 5), ("stream_count", 255),
        ("layer_count", 0), ("layer_count", 1025), ("layer_count", 65535),
    ):  # fmt: skip
        yield f"{name}-{value}", "limits", replace(GOOD, fixed={name: value}).build()
    for value in (0, 1, 3, 2**32 - 1):
        page = replace(GOOD, fixed={"section_count": value}).build()
        yield f"section_count-{value}", "section_count", page
    for name, value in (
        ("dtype", 0), ("dtype", 7), ("dtype", 255), ("token_count", 0), ("token_count", 65537),
        ("token_count", 2**32 - 1),
    ):  # fmt: skip
        yield f"{name}-{value}", "layout", replace(GOOD, fixed={name: value}).build()
    more = replace(GOOD, fixed={"layer_count": 1024, "section_count": 2048})
    yield "table-does-not-fit", "header_bytes", more.build()
    for name, value in (
        ("identity_bytes", 0xFFFF),
        ("key_bytes", 0xFFFF),
        ("extension_bytes", 2**32 - 8),
    ):
        yield f"{name}-max", "header_bytes", replace(GOOD, fixed={name: value}).build()
    yield "key-empty", "limits", replace(GOOD, key=b"").build()
    yield "key-too-long", "limits", replace(GOOD, key=b"k" * 1025).build()
    yield "key-not-utf8", "key", replace(GOOD, key=b"\xff").build()
    yield "key-surrogate", "key", replace(GOOD, key=b"\xed\xa0\x80").build()


def _streams() -> Iterator[tuple[str, str, bytes]]:
    bad = {
        "role-0": stream(0),
        "role-6": stream(6),
        "role-twice": stream(2),
        "head-count-0": stream(1, heads=0),
        "head-count-65537": stream(1, heads=65537),
        "head-count-max": stream(1, heads=2**32 - 1),
        "head-size-0": stream(1, size=0),
        "head-size-above-limit": stream(1, size=(1 << 30) + 1),
        "raw-size-above-limit": stream(1, heads=65536, size=1 << 30),
    }
    for name, record in bad.items():
        yield name, "layout", replace(GOOD, streams=(record, stream(2))).build()
    product = replace(GOOD, streams=(stream(1, heads=65536, size=65536), stream(2)))
    yield "raw-size-2-48", "layout", replace(product, fixed={"token_count": 65536}).build()
    lie = replace(GOOD, streams=(stream(1, size=16), stream(2)))
    yield "head-size-16-of-17", "section", lie.build()


def _ecq() -> Draft:
    """A page whose first section claims to be coded."""
    draft = replace(GOOD, sections=(bytes(60), SECTION))
    return draft.row(kind=2, bits=48, options=0, table=1, group_size=0)


def _derotated() -> Iterator[tuple[str, str, bytes]]:
    channels = replace(GOOD, sections=(bytes(196), bytes(196)))
    channels = channels.row(group_size=2, options=3).row(1, group_size=2, options=3)
    draft = channels.row(options=7)
    yield "derotated-without-rotation", "section", draft.build()
    for size, reason in ((15, "extensions"), (18, "section")):
        rotary = extension(2, struct.pack("<HBBI", size, 0, 0, 0) + bytes(2 * size))
        yield f"derotated-by-{size}", reason, replace(draft, extensions=rotary).build()


def _table() -> Iterator[tuple[str, str, bytes]]:
    raw = replace(GOOD, sections=(bytes(68), SECTION))
    raw = raw.row(kind=0, bits=16, options=0, group_size=0)
    fp8 = replace(GOOD, sections=(bytes(34), SECTION))
    fp8 = fp8.row(kind=5, bits=8, options=0, group_size=0)
    ecq = _ecq()
    rows: dict[str, Draft] = {
        "int-bits-0": GOOD.row(bits=0),
        "int-bits-3": GOOD.row(bits=3),
        "int-bits-16": GOOD.row(bits=16),
        "int-bits-8-of-4": GOOD.row(bits=8),
        "int-bits-2-of-4": GOOD.row(bits=2),
        "channel-of-token": GOOD.row(options=3, group_size=2),
        "group-size-0": GOOD.row(group_size=0),
        "group-size-18-of-17": GOOD.row(group_size=18),
        "group-size-2-of-8": GOOD.row(group_size=2),
        "group-size-max": GOOD.row(group_size=2**32 - 1),
        "derotated-per-token": GOOD.row(options=5),
        "hadamard-size-17": GOOD.row(options=9),
        "hadamard-per-channel": GOOD.row(options=11, group_size=2),
        "derotated-and-hadamard": GOOD.row(options=13),
        "stored-bytes-0": GOOD.row(stored_bytes=0),
        "stored-bytes-less": GOOD.row(stored_bytes=len(SECTION) - 1),
        "stored-bytes-more": GOOD.row(stored_bytes=len(SECTION) + 1),
        "stored-bytes-2-31": GOOD.row(stored_bytes=1 << 31),
        "stored-bytes-max": GOOD.row(stored_bytes=2**32 - 1),
        "raw-bits-8": raw.row(bits=8),
        "raw-asymmetric": raw.row(options=1),
        "raw-group-size": raw.row(group_size=1),
        "raw-stored-bytes": raw.row(stored_bytes=66),
        "raw-of-int": GOOD.row(kind=0, bits=16, options=0, group_size=0),
        "coded-bytes-0": ecq.row(stored_bytes=0),
        "coded-bytes-more-than-raw": ecq.row(stored_bytes=len(SECTION) + 64),
        "coded-bytes-max": ecq.row(stored_bytes=2**32 - 1),
        "coded-group-size": ecq.row(group_size=8),
        "coded-asymmetric": ecq.row(options=1),
        "ecq-bits-23": ecq.row(bits=23),
        "ecq-bits-98": ecq.row(bits=98),
        "lossless-bits-8": ecq.row(kind=3, bits=8),
        "fp8-bits-16": fp8.row(bits=16),
        "fp8-asymmetric": fp8.row(options=1),
        "fp8-channel": fp8.row(options=2),
        "fp8-group-size": fp8.row(group_size=17),
        "fp8-stored-bytes": fp8.row(stored_bytes=33),
    }
    for name, draft in rows.items():
        yield name, "section", draft.build()
    yield "int-of-fp8", "section", replace(GOOD, fixed={"dtype": 4}).build()
    huge = replace(GOOD, streams=(stream(1, size=10**9), stream(2)), fixed={"token_count": 1})
    yield "group-size-billion", "section", huge.row(bits=8, group_size=10**9).build()
    yield "parameters-above-limit", "section", huge.row(bits=8, group_size=1).build()
    yield "section-checksum-0", "section_checksum", GOOD.row(1, checksum=0).build()
    swapped = bytearray(GOOD.build())
    swapped[-256:-128], swapped[-128:] = swapped[-128:], swapped[-256:-128]
    yield "sections-swapped", "section_checksum", bytes(swapped)
    checksum = xxhash.xxh3_64_intdigest(pad(SECTION, 64)[:-1] + b"\1")
    dirty = replace(GOOD, section_tail=b"\1").row(checksum=checksum)
    yield "section-padding", "padding", dirty.build()


def _identity() -> Iterator[tuple[str, str, bytes]]:
    model, rank = field_record(b"model", b"example"), field_record(b"rank", b"0")
    for name, record in {
        "unsorted": rank + model,
        "twice": model + model,
        "name-empty": field_record(b"", b"x"),
        "name-upper-case": field_record(b"Model", b"x"),
        "name-33-bytes": field_record(b"m" * 33, b"x"),
        "name-newline": field_record(b"model\n", b"x"),
        "name-not-ascii": field_record("modèle".encode(), b"x"),
        "name-past-the-end": b"\x20model",
        "value-past-the-end": field_record(b"model", b"example", size=8),
        "value-length-max": field_record(b"model", b"example", size=0xFFFF),
        "value-length-cut": b"\x05model\x07",
        "value-not-utf8": field_record(b"model", b"\xc0\x80"),
        "trailing-byte": model + rank + b"\0",
    }.items():
        yield f"identity-{name}", "identity", replace(GOOD, identity=record).build()
    long = field_record(b"model", b"x" * 16384)
    yield "identity-too-long", "limits", replace(GOOD, identity=long).build()


def _extensions() -> Iterator[tuple[str, str, bytes]]:
    dirty = bytearray(extension(9, b"1234"))
    dirty[-1] = 1
    for name, record in {
        "unsorted": extension(9) + extension(8),
        "twice": extension(9) + extension(9),
        "past-the-end": extension(9, b"12345678", size=9),
        "length-max": extension(9, size=2**32 - 1),
        "padding": bytes(dirty),
        "size-not-of-8": extension(9) + b"\0" * 4,
        "too-long": extension(9, bytes(65536)),
    }.items():
        yield f"extension-{name}", "extensions", replace(GOOD, extensions=record).build()


def _unsupported() -> Iterator[tuple[str, str, bytes]]:
    for major in (0, 2, 256, 65535):
        yield f"major-{major}", "version", replace(GOOD, fixed={"major": major}).build()
    for bit in (0, 31):
        page = replace(GOOD, fixed={"required_flags": 1 << bit}).build()
        yield f"required-flag-{bit}", "required_flags", page
    for kind in (6, 255):
        yield f"kind-{kind}", "section_kind", GOOD.row(kind=kind).build()
    yield "coding-table", "section", GOOD.row(table=1).build()
    ecq = _ecq()
    yield "coded-table-0", "section", ecq.row(table=0).build()
    yield "coded-table-2", "section", ecq.row(table=2).build()
    yield "side-bytes", "section", GOOD.row(side_bytes=64).build()
    critical = replace(GOOD, extensions=extension(9, b"unknown", flags=1))
    yield "extension-critical", "extension", critical.build()
    last = replace(GOOD, extensions=extension(4) + extension(9, flags=1))
    yield "extension-critical-last", "extension", last.build()
    for name, draft in {
        "header": replace(GOOD, fixed={"reserved": bytes(7) + b"\1"}),
        "stream": replace(GOOD, streams=(stream(1), stream(2, reserved=1))),
        "options-bit-4": GOOD.row(options=17),
        "options-bit-7": GOOD.row(options=0x81),
        "extension-flag-1": replace(GOOD, extensions=extension(9, flags=2)),
        "extension-flag-15": replace(GOOD, extensions=extension(9, flags=0x8000)),
    }.items():
        yield f"reserved-{name}", "reserved", draft.build()


def bad_pages() -> list[BadPage]:
    """All of them."""
    pages = []
    corrupt: list[Callable[[], Iterator[tuple[str, str, bytes]]]] = [
        _length, _header, _streams, _table, _derotated, _identity, _extensions,
    ]  # fmt: skip
    for make in corrupt:
        pages += [BadPage(n, "CorruptPage", f"corrupt:{what}", page) for n, what, page in make()]
    pages += [
        BadPage(n, "UnsupportedPage", f"unsupported:{what}", page)
        for n, what, page in _unsupported()
    ]
    names = [page.name for page in pages]
    assert len(set(names)) == len(names), "a name appears twice"
    return pages
