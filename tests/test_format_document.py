"""proto/FORMAT.md says what the code does: its tables, its limits and its examples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pages import decode_page, encode_page, rows_of_raw

from kvcodec import _reference_elements, identity, layout, reference, spec
from kvcodec import format as page_format
from kvcodec.format import FIXED, MAGIC, SECTION, STREAM, EncodedPage
from kvcodec.layout import DType, Role
from kvcodec.plan import PagePlan
from kvcodec.spec import Kind

TEXT = (Path(__file__).parents[1] / "proto" / "FORMAT.md").read_text(encoding="utf-8")


def section(number: str) -> str:
    """The text under a numbered heading, up to the next heading."""
    match = re.search(rf"^##+ {re.escape(number)} .*?\n(.*?)(?=^##|\Z)", TEXT, re.M | re.S)
    assert match is not None, f"the document has no section {number}"
    return match[1]


def table(number: str) -> list[list[str]]:
    """The rows of the first table of a section, without its head."""
    lines = [line for line in section(number).splitlines() if line.startswith("|")]
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return rows[2:]


def fields(number: str) -> list[tuple[int, int, str]]:
    """(offset, size, name) of every row of a table of fields."""
    return [(int(row[0]), int(row[1]), row[2]) for row in table(number)]


def struct_fields(code: str) -> Iterator[tuple[int, int]]:
    """(offset, size) of every item of a struct."""
    sizes = {"B": 1, "H": 2, "I": 4, "Q": 8}
    at = 0
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", code.lstrip("<")):
        size = int(count) if kind == "s" else sizes[kind]
        yield at, size
        at += size


def test_fixed_part_is_as_documented():
    """Every row of the table stands where the code reads it, and the rows leave no hole."""
    rows = fields("2.1")
    documented = [(offset, size) for offset, size, _ in rows]
    # dtype to token_count are one item of the struct, which identity.layout_record writes.
    inner = [row for row in documented if 32 <= row[0] < 44]
    outer = [row for row in documented if not 32 <= row[0] < 44]
    assert outer == [item for item in struct_fields(FIXED.format) if item != (32, 12)]
    assert inner == [(32 + at, size) for at, size in struct_fields(identity._LAYOUT.format)]
    ends = [offset + size for offset, size in documented]
    assert [0, *ends] == [*(offset for offset, _ in documented), FIXED.size]


def test_fixed_part_names_are_as_documented():
    """A page with another value in each field reads back under the documented name."""
    example = page_of("5.1")
    names = {name: (offset, size) for offset, size, name in fields("2.1")}

    def value(name: str) -> int:
        offset, size = names[name]
        return int.from_bytes(example[offset : offset + size], "little")

    header = EncodedPage.parse(example).header
    assert example[: names["magic"][1]] == MAGIC
    assert value("major") == page_format.MAJOR
    assert value("minor") == header.minor
    assert value("header_bytes") == header.header_bytes
    assert value("page_bytes") == len(example)
    assert value("dtype") == header.layout.dtype
    assert value("stream_count") == len(header.layout.streams)
    assert value("layer_count") == header.layout.layer_count
    assert value("layer_start") == header.layout.layer_start
    assert value("token_count") == header.layout.token_count
    assert value("section_count") == len(header.codecs)
    assert value("identity_bytes") == len(header.identity.record)
    assert value("key_bytes") == len(header.key.encode())


def test_streams_are_as_documented():
    assert [(at, size) for at, size, _ in fields("2.3")] == list(struct_fields(STREAM.format))
    roles = re.search(r"\| `role` \| (.*?);", section("2.3"))
    assert roles is not None
    documented = re.findall(r"(\d) (\w+)", roles[1])
    assert documented == [(str(role.value), role.text) for role in Role]


def test_section_table_is_as_documented():
    """Names, offsets and sizes of a row of the section table are those of the code."""
    assert SECTION.fields is not None
    code = [(at, kind.itemsize, name) for name, (kind, at, *_) in SECTION.fields.items()]
    assert fields("2.4") == code
    kinds = re.search(r"\| `kind` \| (.*?);", section("2.4"))
    assert kinds is not None
    assert re.findall(r"(\d) (\w+)", kinds[1]) == [(str(k.value), k.name.lower()) for k in Kind]


def test_element_types_are_as_documented():
    rows = [(int(row[0]), row[1], int(row[2]), "int" in row[3]) for row in table("2.2")]
    assert rows == [(d.value, d.text, d.itemsize, d.is_quantizable) for d in DType]


def test_limits_are_as_documented():
    """Every limit of the table is a constant of the code with that value, and the other way."""
    modules = (page_format, identity, layout, spec)
    constants = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if name.startswith("MAX_")
    }
    documented = {}
    for name, text in table("2.8"):
        power = re.fullmatch(r"2\^(\d+)( − 1)?", text)
        documented[name] = 2 ** int(power[1]) - bool(power[2]) if power else int(text)
    assert documented == constants


def test_magic_is_as_documented():
    match = re.search(r"`magic` \| `([0-9A-F ]+)`", section("2.1"))
    assert match is not None
    assert bytes.fromhex(match[1]) == MAGIC


def test_special_numbers_are_as_documented():
    """NaN scale, canonical NaNs, domain and smallest scale are those of the code."""
    assert f"scale is NaN (0x{reference._NAN_SCALE:04X})" in section("3.3")
    for name, dtype in (("bf16", DType.BF16), ("fp16", DType.FP16), ("fp32", DType.FP32)):
        assert f"{name} 0x{_reference_elements._NAN[dtype]:X}" in section("3.3")
    assert "at least 2^127 in magnitude" in section("3.4")
    assert reference._DOMAIN == 2.0**127
    assert "`s = 2^−126`" in section("3.4")
    assert reference._SMALLEST_SCALE == 2.0**-126


# --- examples


def page_of(number: str) -> bytes:
    """The bytes of an example; every line's offset is checked."""
    match = re.search(r"```hex\n(.*?)```", section(number), re.S)
    assert match is not None
    data = b""
    for line in match[1].splitlines():
        match = re.fullmatch(r"([0-9A-F]{4})  (00 \* \d+|[0-9A-F]{2}(?: [0-9A-F]{2})*)  .*", line)
        assert match is not None, line
        at, digits = match.groups()
        assert int(at, 16) == len(data), line
        zeros = digits.partition(" * ")[2]
        data += bytes(int(zeros)) if zeros else bytes.fromhex(digits)
    return data


def values_of(number: str) -> Iterator[tuple[str, int, list[float], list[float]]]:
    """(role, token, elements, what they decode to) of every line of an example."""
    match = re.search(r"```values\n(.*?)```", section(number), re.S)
    assert match is not None
    for line in match[1].splitlines():
        label, _, values = line.partition(": ")
        role, _, token = label.partition(" ")
        before, _, after = values.partition(" -> ")
        yield role, int(token), _floats(before), _floats(after or before)


def _floats(text: str) -> list[float]:
    return [float(word) for word in text.split()]


EXAMPLES = re.findall(r"^### (5\.\d+) ", TEXT, re.M)


def test_document_has_examples():
    assert len(EXAMPLES) >= 3


@pytest.mark.parametrize("number", EXAMPLES)
def test_example_decodes_to_the_values_beside_it(number: str):
    """The hexadecimal digits are a sound page, and decode to what the document says."""
    page = EncodedPage.parse(page_of(number))
    page.verify()
    decoded = rows_of_raw(page.header.layout, decode_page(page))
    found = {stream.role.text: index for index, stream in enumerate(page.header.layout.streams)}
    lines = list(values_of(number))
    assert len(lines) == page.header.layout.token_count * len(found)
    for role, token, _, after in lines:
        row = decoded[found[role]][0, 0, token]
        assert reference.to_float32(row, DType.BF16).tolist() == pytest.approx(after, rel=1e-8)


def test_coded_example_shows_what_there_is():
    """Keys that are derotated, and values that come back bit for bit."""
    page = EncodedPage.parse(page_of("5.3"))
    assert [codec.kind for codec in page.header.codecs] == [Kind.ECQ, Kind.LOSSLESS]
    assert page.section(0)[0] == 1
    for role, _, before, after in values_of("5.3"):
        assert (before == after) == (role == "value")


@pytest.mark.parametrize("number", EXAMPLES)
def test_example_is_what_the_encoder_makes_of_the_values(number: str):
    """kvcodec's own encoder makes the example, byte for byte."""
    data = page_of(number)
    page = EncodedPage.parse(data)
    header = page.header
    rows = rows_of_raw(header.layout, bytes(header.layout.raw_bytes))
    found = {stream.role.text: index for index, stream in enumerate(header.layout.streams)}
    for role, token, before, _ in values_of(number):
        bits = np.array(before, np.float32).view(np.uint32)
        rows[found[role]][0, 0, token] = ((bits + 0x8000) >> 16).astype(np.uint16)
    rotary = PagePlan.of_page(header, page.data).rotary
    plan = PagePlan.build(header.namespace, header.codecs, len(header.key), rotary=rotary)
    assert encode_page(plan, header.key, rows) == data


@pytest.mark.parametrize("number", EXAMPLES)
def test_example_has_the_name_beside_it(number: str):
    """Object name and header checksum in the document are those of the page."""
    data = page_of(number)
    header = EncodedPage.parse(data).header
    name = header.namespace.object_name(header.key)
    checksum = int.from_bytes(data[header.header_bytes - 8 : header.header_bytes], "little")
    assert f"Object name: `{name}`" in section(number)
    assert f"header checksum: `{checksum:016x}`" in section(number)


def test_document_names_the_version_of_the_code():
    """The change list ends with the version that the code writes."""
    last = table("4")[-1][0]
    assert last == f"{page_format.MAJOR}.{page_format.MINOR}"
