"""Identities, namespaces and the names of pages in a store."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import mha

from kvcodec.errors import ConfigError, CorruptPage
from kvcodec.identity import MAX_IDENTITY_BYTES, MAX_KEY_BYTES, Identity, Namespace
from kvcodec.layout import DType, PageLayout, Role, Stream
from kvcodec.testing.strategies import identities, namespaces, page_keys, page_layouts

LAYOUT = mha()
SPACE = Namespace(Identity.of(model="m"), LAYOUT)


@given(identities())
def test_record_is_read_back(identity: Identity):
    """parse is the inverse of record."""
    assert Identity.parse(identity.record) == identity
    assert identity.as_dict() == dict(identity.fields)


@given(st.binary(max_size=60))
def test_any_bytes_are_an_identity_or_corrupt(record: bytes):
    """What parses has exactly these bytes as its record; nothing escapes but CorruptPage."""
    try:
        identity = Identity.parse(record)
    except CorruptPage:
        return
    assert identity.record == record


@given(identities(), identities())
def test_equal_records_are_equal_identities(first: Identity, second: Identity):
    assert (first.record == second.record) == (first == second)


def test_fields_are_sorted_and_become_text():
    identity = Identity.of(tp_size=2, model="a/b", draft=True)
    assert identity.fields == (("draft", "True"), ("model", "a/b"), ("tp_size", "2"))


@pytest.mark.parametrize(
    "fields",
    [
        (("b", ""), ("a", "")),
        (("a", ""), ("a", "")),
        (("", "x"),),
        (("A", "x"),),
        (("a-b", "x"),),
        (("a" * 33, "x"),),
        (("a\n", "x"),),
        (("é", "x"),),
        (("a", "x" * 65536),),
        (("a", "x" * MAX_IDENTITY_BYTES),),
        (("a", "\ud800"),),
    ],
)
def test_identity_that_cannot_be_written_is_refused(fields: tuple[tuple[str, str], ...]):
    """Names out of order, of other characters or too long, values too long or not text."""
    with pytest.raises(ConfigError):
        Identity(fields)


def test_largest_identity_is_allowed():
    assert len(Identity.of(a="x" * (MAX_IDENTITY_BYTES - 4)).record) == MAX_IDENTITY_BYTES


# --- namespaces


def other_layouts() -> list[PageLayout]:
    first = Stream(Role.KEY, 2, 96)
    return [
        replace(LAYOUT, dtype=DType.FP16),
        replace(LAYOUT, token_count=6),
        replace(LAYOUT, layer_count=2),
        replace(LAYOUT, layer_start=1),
        replace(LAYOUT, streams=LAYOUT.streams[:1]),
        replace(LAYOUT, streams=LAYOUT.streams[::-1]),
        replace(LAYOUT, streams=(replace(first, head_count=3), LAYOUT.streams[1])),
        replace(LAYOUT, streams=(replace(first, head_size=95), LAYOUT.streams[1])),
        replace(LAYOUT, streams=(replace(first, head_start=2), LAYOUT.streams[1])),
        replace(LAYOUT, streams=(replace(first, role=Role.LATENT), LAYOUT.streams[1])),
    ]


def test_every_part_of_identity_and_layout_makes_another_namespace():
    """Changing any one field gives another digest, so that no store mixes them up."""
    spaces = [SPACE, *(Namespace(SPACE.identity, layout) for layout in other_layouts())]
    identities = ({}, {"model": "n"}, {"model": "m", "x": ""}, {"mode": "lm"}, {"model": "m "})
    spaces += [Namespace(Identity.of(**fields), LAYOUT) for fields in identities]
    assert len({space.digest for space in spaces}) == len(spaces)


def test_adjacent_fields_cannot_be_confused():
    """Lengths are part of the record: ('a', 'bc') and ('ab', 'c') share no bytes."""
    pairs = [{"a": "bc"}, {"ab": "c"}, {"a": "b", "c": ""}, {"a": "", "b": "c"}]
    assert len({Identity.of(**pair).record for pair in pairs}) == 4


def test_digest_is_as_documented():
    """SHA-256 over label, layout, streams and identity, of which 16 bytes are kept."""
    layout = PageLayout(
        dtype=DType.FP16,
        token_count=0x0102,
        layer_count=3,
        layer_start=4,
        streams=(Stream(Role.LATENT, 5, 6, 7),),
    )
    data = b"kvcodec namespace 1\0" + bytes([2, 1, 3, 0, 4, 0, 0, 0, 2, 1, 0, 0])
    data += bytes([3, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0, 0, 7, 0, 0, 0]) + b"\x01a\x01\x00b"
    namespace = Namespace(Identity.of(a="b"), layout)
    assert namespace.digest == hashlib.sha256(data).digest()[:16]
    page = hashlib.sha256(namespace.digest + b"key").hexdigest()
    assert namespace.object_name("key") == f"{namespace.digest.hex()}/{page}"


@given(namespaces(), page_keys())
def test_object_name_is_a_safe_path(namespace: Namespace, key: str):
    """Whatever the key is, its name is hexadecimal digits: no path, no case, no surprise."""
    assert re.fullmatch(r"[0-9a-f]{32}/[0-9a-f]{64}", namespace.object_name(key))


@pytest.mark.parametrize(
    "key",
    ["../evil", "/etc/passwd", "a\0b", ".", "..", "CON", "a/b", "x" * MAX_KEY_BYTES, "ключ", " "],
)
def test_hostile_key_stays_inside(key: str):
    assert re.fullmatch(r"[0-9a-f]{32}/[0-9a-f]{64}", SPACE.object_name(key))


def test_keys_that_look_alike_have_different_names():
    """No case folding, no normalization, no trimming."""
    keys = ["a", "A", "a ", "a\0", "é", "e\u0301", "a/b", "a-b", "a_b"]
    assert len({SPACE.object_name(key) for key in keys}) == len(keys)


@pytest.mark.parametrize("key", ["", "x" * (MAX_KEY_BYTES + 1), "é" * 513, "\ud800"])
def test_key_that_cannot_be_written_is_refused(key: str):
    with pytest.raises(ConfigError):
        SPACE.object_name(key)


@given(page_layouts(), page_layouts())
def test_layouts_share_a_namespace_only_if_they_are_equal(first: PageLayout, second: PageLayout):
    same = Namespace(SPACE.identity, first).digest == Namespace(SPACE.identity, second).digest
    assert same == (first == second)


def test_namespace_is_a_value():
    """Equal parts make equal namespaces, which can be keys of a dict."""
    again = Namespace(Identity.of(model="m"), mha())
    assert again == SPACE
    assert {again: 1}[SPACE] == 1
