"""The typed view of a header."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given

from kvcodec.errors import ConfigError
from kvcodec.format import EncodedPage
from kvcodec.testing import strategies
from kvcodec_proto.v1 import pages_pb2 as pb
from kvcodec_server import metadata

GOLDEN = sorted((Path(__file__).parent / "golden" / "v1" / "accepted").glob("*.page"))


@given(strategies.namespaces())
def test_a_namespace_comes_back(namespace):
    layout = metadata.layout_message(namespace.layout).SerializeToString()
    identity = metadata.identity_message(namespace.identity).SerializeToString()
    back = metadata.namespace_of(pb.Identity.FromString(identity), pb.PageLayout.FromString(layout))
    assert back == namespace
    assert back.digest == namespace.digest


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_metadata_says_what_the_header_says(path):
    header = EncodedPage.parse(path.read_bytes()).header
    said = metadata.metadata_of(header)
    assert metadata.layout_of(said.layout) == header.layout
    assert metadata.identity_of(said.identity) == header.identity
    assert (said.key, said.format_major, said.format_minor) == (header.key, 1, header.minor)
    assert (said.header_bytes, said.page_bytes) == (header.header_bytes, header.page_bytes)
    assert (said.raw_bytes, said.minimum_bits) == (header.layout.raw_bytes, header.minimum_bits)
    assert [section.codec for section in said.sections] == [c.text for c in header.codecs]
    assert tuple(section.checksum for section in said.sections) == header.checksums
    assert tuple(section.stored_bytes for section in said.sections) == header.stored_bytes
    first, last = said.sections[0], said.sections[-1]
    assert first.layer_index == header.layout.layer_start
    assert last.layer_index == header.layout.layer_start + header.layout.layer_count - 1
    assert first.role == header.layout.streams[0].role
    assert last.role == header.layout.streams[-1].role


@pytest.mark.parametrize(
    "layout",
    [
        pb.PageLayout(),
        pb.PageLayout(dtype=99, token_count=1, layer_count=1, streams=[pb.Stream(role=1)]),
        pb.PageLayout(dtype=1, token_count=1, layer_count=1),
        pb.PageLayout(
            dtype=1,
            token_count=1,
            layer_count=1,
            streams=[pb.Stream(role=77, head_count=1, head_size=1)],
        ),
        pb.PageLayout(
            dtype=1,
            token_count=65536,
            layer_count=1,
            streams=[pb.Stream(role=1, head_count=65536, head_size=1 << 30)],
        ),
    ],
)
def test_an_impossible_layout_is_a_config_error(layout):
    with pytest.raises(ConfigError):
        metadata.layout_of(layout)


def test_an_impossible_identity_is_a_config_error():
    twice = [pb.IdentityField(name="a", value="1")] * 2
    with pytest.raises(ConfigError):
        metadata.identity_of(pb.Identity(fields=twice))
