"""Write section 5 of proto/FORMAT.md: whole pages in hexadecimal digits, part by part.

    python tools/format_examples.py

tests/test_format_document.py reads the pages back from the document and decodes them.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pages import Rows, decode_page, encode_page, rows_of_raw, sections_of  # noqa: E402

from kvcodec.extension import extension_record  # noqa: E402
from kvcodec.format import EncodedPage, pad64, parameter_bytes  # noqa: E402
from kvcodec.identity import Identity, Namespace  # noqa: E402
from kvcodec.layout import DType, PageLayout  # noqa: E402
from kvcodec.plan import PagePlan  # noqa: E402
from kvcodec.reference import to_float32  # noqa: E402
from kvcodec.rotary import SPLIT, Rotary  # noqa: E402
from kvcodec.section import Kind, SectionCodec  # noqa: E402
from kvcodec.spec import CodecSpec  # noqa: E402

DOCUMENT = ROOT / "proto" / "FORMAT.md"
HEADING = "## 5 Examples\n"
KEY = "a1b2"
IDENTITY = Identity.of(model="tiny")

ROTARY = Rotary(4, SPLIT, (1.0, 0.5))


def quarters(tokens: int, size: int) -> list[list[list[float]]]:
    """Keys whose first four channels turn with the token, and values: multiples of 1/4."""
    keys = np.zeros((tokens, size))
    values = np.zeros((tokens, size))
    for token in range(tokens):
        for channel in range(size):
            keys[token, channel] = (7 * token + 5 * channel * channel) % 11 - 5
            values[token, channel] = (3 * token * token + 7 * channel) % 13 - 5.5
        for pair, frequency in enumerate(ROTARY.frequencies):
            angle = frequency * token + 1 + pair
            keys[token, [pair, pair + 2]] = 24 * np.cos(angle), 24 * np.sin(angle)
    return (np.round(np.stack([keys, values]) * 2) / 4).tolist()


# (title, spec, head size, values of the keys and of the values, token by token)
EXAMPLES = (
    (
        "5.1 Keys and values of two tokens, raw",
        "raw",
        4,
        [[[1, -2.5, 0.15625, 0], [3, 128, -0.0078125, 1e-3]], [[0, 0, 0, 0], [-1, -2, -3, -4]]],
    ),
    (
        "5.2 The same shape but six elements a row, 4 bits, asymmetric, groups of 4",
        "key=int4-asym-g4 value=int4-asym-g4",
        6,
        [
            [[1, -2.5, 0.15625, 0, 7, -7], [3, 128, -0.0078125, 1e-3, 0.5, 0.5]],
            [[0, 0, 0, 0, 0, 0], [-1, -2, -3, -4, -5, -6]],
        ],
    ),
    (
        "5.3 Coded sections: keys in ecq, derotated, and values lossless",
        "key=ecq-3-channel value=lossless",
        16,
        quarters(24, 16),
    ),
    (
        "5.4 Transformed int sections: keys derotated, values through a Hadamard matrix",
        "key=int4-channel-derotated-asym-g4 value=int4-hadamard-asym",
        8,
        [rows[:4] for rows in quarters(4, 8)],
    ),
)


def bf16(values: Sequence[Sequence[float]]) -> Rows:
    """(layers, heads, tokens, head_size) of the nearest bf16."""
    bits = np.array(values, np.float32).view(np.uint32)
    return ((bits + 0x8000) >> 16).astype(np.uint16)[None, None]


def kind_note(codec: SectionCodec) -> str:
    """What the first bytes of a row of the section table say."""
    if codec.kind is Kind.INT:
        options = codec.asymmetric | codec.axis << 1 | codec.transform << 2
        return f"int, {codec.bits} bits, options {options}"
    if codec.kind is Kind.ECQ:
        return f"ecq, nominal bits {codec.bits} / 16, options {2 * int(codec.axis)}, table 1"
    return codec.text + (", table 1" if codec.kind is Kind.LOSSLESS else "")


def header_parts(page: EncodedPage) -> Iterator[tuple[int, str]]:
    """(size, note) of every part of the header, in order."""
    header = page.header
    layout = header.layout
    yield 8, "magic"
    yield 8, f"major 1, minor 0, header_bytes {header.header_bytes}"
    yield 8, f"page_bytes {header.page_bytes}"
    yield 8, "required_flags, optional_flags"
    yield 4, f"dtype {layout.dtype}, stream_count 2, layer_count {layout.layer_count}"
    yield 8, f"layer_start {layout.layer_start}, token_count {layout.token_count}"
    yield 4, f"section_count {layout.section_count}"
    extensions = len(extension_record(header.extensions))
    sizes = (len(header.identity.record), len(header.key), extensions)
    yield 8, "identity_bytes {}, key_bytes {}, extension_bytes {}".format(*sizes)
    yield 8, "reserved"
    for stream in layout.streams:
        yield 4, f"stream: role {stream.role} ({stream.role.text})"
        yield 12, f"head_count {stream.head_count}, head_size {stream.head_size}, head_start 0"
    for index, (codec, stored) in enumerate(zip(header.codecs, header.stored_bytes, strict=True)):
        yield 4, f"section {index}: {kind_note(codec)}"
        yield 12, f"group_size {max(codec.group_size, 0)}, stored_bytes {stored}, side_bytes 0"
        yield 8, "checksum"
    [(name, value)] = header.identity.fields
    yield 3 + len(name) + len(value), f'identity: {name} = "{value}"'
    yield len(header.key), f'key: "{header.key}"'
    end = 64 + 32 + 48 + sum(sizes)
    for extension in header.extensions:
        yield 8, f"extension: type {extension.type}, {len(extension.data)} bytes"
        yield 8, f"rotary_size {ROTARY.size}, style {ROTARY.style}"
        yield 4 * len(ROTARY.frequencies), "frequencies"
    yield header.header_bytes - 8 - end, "padding"
    yield 8, "header checksum"


def section_parts(page: EncodedPage, index: int) -> Iterator[tuple[int, str]]:
    """(size, note) of every part of a section."""
    header = page.header
    stream, codec = header.layout.streams[index], header.codecs[index]
    tokens, stored = header.layout.token_count, header.stored_bytes[index]
    name = stream.role.text
    if codec.kind.is_coded:
        yield from coded_parts(bytes(page.section(index))[:stored], name, index, tokens)
    elif codec.axis:
        assert tokens == codec.group_size == 32 // codec.bits // 2
        for channel in range(stream.head_size):
            yield 4, f"section {index}, {name}, channel {channel}: zero and scale"
        yield pad64(4 * stream.head_size) - 4 * stream.head_size, "padding"
        for channel in range(stream.head_size):
            yield 4, f"codes of channel {channel}"
    elif codec.bits:
        groups = -(-stream.head_size // codec.group_size)
        for token in range(tokens):
            yield (
                4 * groups,
                f"section {index}, {name}, token {token}: zero and scale of each group",
            )
        parameters = parameter_bytes(stream, tokens, codec)
        yield pad64(parameters) - parameters, "padding"
        codes = (stored - pad64(parameters)) // tokens
        for token in range(tokens):
            yield codes, f"codes of token {token}"
    else:
        for token in range(tokens):
            yield stored // tokens, f"section {index}, {name}, token {token}"
    yield pad64(stored) - stored, "padding"


def coded_parts(
    section: bytes, name: str, index: int, plane_lines: int
) -> Iterator[tuple[int, str]]:
    """(size, note) of every part of a coded section of one tile, with 16 bytes of plane a token."""
    yield 8, f"section {index}, {name}, flags {section[0]}"
    size = int.from_bytes(section[8:10], "little")
    yield 2, f"tile: stream_bytes {size}"
    yield 4, "reference {}, scale_class {}, mean_class {}, family {}".format(*section[10:14])
    yield 50, "padding"
    plane = len(section) - 64 - size - 64
    for token in range(plane_lines if plane else 0):
        yield plane // plane_lines, f"plane of token {token}"
    for lane in range(0, 32, 8):
        yield 16, f"states of lanes {lane} to {lane + 7}"
    for at in range(64, size, 16):
        yield min(16, size - at), "symbols"
    yield 64, "guard"


def hex_lines(data: bytes, parts: Iterator[tuple[int, str]], start: int) -> Iterator[str]:
    """One line per part; a run of more than 16 zeros is written as a product."""
    at = 0
    for size, note in parts:
        part = data[at : at + size]
        if size:
            text = part.hex(" ").upper()
            if size > 16:
                assert not any(part), "a long part that is not zero"
                text = f"00 * {size}"
            yield f"{start + at:04X}  {text:<47}  {note}"
        at += size
    assert at == len(data), (at, len(data))


def value_lines(name: str, raw: Rows, decoded: Rows) -> Iterator[str]:
    """The elements of each token, and what they decode to if that differs."""
    for token, rows in enumerate(zip(raw[0, 0], decoded[0, 0], strict=True)):
        before, after = (
            " ".join(f"{value:.9g}" for value in to_float32(row, DType.BF16).tolist())
            for row in rows
        )
        yield f"{name} {token}: {before}" + (f" -> {after}" if after != before else "")


def example(title: str, text: str, head_size: int, values: Sequence[list[list[float]]]) -> str:
    """One subsection of the document."""
    layout = PageLayout.mha(
        dtype=DType.BF16,
        token_count=len(values[0]),
        layer_count=1,
        head_count=1,
        head_size=head_size,
    )
    namespace = Namespace(IDENTITY, layout)
    codecs = CodecSpec.parse(text).section_codecs(layout)
    plan = PagePlan.build(namespace, codecs, len(KEY), rotary=ROTARY)
    rows = [bf16(rows) for rows in values]
    data = bytes(encode_page(plan, KEY, rows))
    page = EncodedPage.parse(data)
    decoded = rows_of_raw(layout, decode_page(page))
    lines = [f"### {title}", "", "```hex"]
    lines += hex_lines(data[: page.header.header_bytes], header_parts(page), 0)
    for index, offset in enumerate(page.header.section_offsets):
        section = bytes(page.section(index))
        lines += hex_lines(section, section_parts(page, index), offset)
    lines += ["```", "", "```values"]
    for _, index, stream in sections_of(layout):
        lines += value_lines(stream.role.text, rows[index], decoded[index])
    lines += ["```", "", f"Object name: `{namespace.object_name(KEY)}`"]
    (checksum,) = struct.unpack_from("<Q", data, page.header.header_bytes - 8)
    lines[-1] += f", header checksum: `{checksum:016x}`."
    return "\n".join(lines) + "\n"


def main() -> None:
    """Replace the section in the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before = text.partition(HEADING)[0].rstrip("\n")
    intro = (
        "Whole pages, part by part: offset, bytes, meaning; `00 * n` stands for n zero bytes. "
        "Below each stand the elements\nof every token and, where they differ, what they decode "
        "to. `tools/format_examples.py` writes this section.\n"
    )
    parts = [HEADING, intro, *(example(*arguments) for arguments in EXAMPLES)]
    DOCUMENT.write_text(before + "\n\n" + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
