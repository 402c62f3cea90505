"""Two ranks of SGLang, on its own ``file`` backend and on kvcodec: each has what both agree on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sglang_harness import HAS_SGLANG, file_extra
from sglang_round_trip import page_files, url_of
from sglang_two_ranks import TwoRanks

from kvcodec.format import EncodedPage

pytestmark = pytest.mark.skipif(not HAS_SGLANG, reason="SGLang is not installed: make sglang")


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[TwoRanks]:
    with TwoRanks() as ranks:
        yield ranks


def test_a_page_that_one_rank_lost_ends_the_prefix_for_both(two_ranks: TwoRanks, tmp_path: Path):
    options = {"extra": file_extra(tmp_path)}
    written = two_ranks.run(options, phases=["backup"], token_count=128)
    assert [rank["error"] for rank in written] == [None, None]
    files = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 16
    [path for path in files if path.stem.endswith("_1_2")][4].unlink()
    read = two_ranks.run(options, phases=["prefetch"], token_count=128)
    assert [rank["storage_hit_tokens"] for rank in read] == [64, 64]
    assert [rank["exact"] for rank in read] == [True, True]


def test_pages_of_mla_are_written_by_one_rank(two_ranks: TwoRanks, tmp_path: Path):
    """Each rank holds the same latents, and both read them."""
    ranks = two_ranks.run({"kind": "mla", "extra": file_extra(tmp_path)}, token_count=128)
    assert len(list(tmp_path.iterdir())) == 8
    assert [rank["storage_hit_tokens"] for rank in ranks] == [128, 128]
    assert [rank["exact"] for rank in ranks] == [True, True]


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_kvcodec_stores_and_reads_the_pages_of_both(kind: str, two_ranks: TwoRanks, tmp_path: Path):
    """MHA ranks hold different heads and both write; MLA ranks hold the same and one writes. A page
    that one rank lost ends the prefix for both.
    """
    options = {
        "kind": kind,
        "backend": "kvcodec",
        "extra": {"url": url_of(tmp_path), "preset": "raw"},
    }
    reports = two_ranks.run(options, token_count=128)
    assert [rank["error"] for rank in reports] == [None, None]
    assert [rank["storage_hit_tokens"] for rank in reports] == [128, 128]
    assert [rank["exact"] for rank in reports] == [True, True]
    pages = page_files(tmp_path)
    ranks = {EncodedPage.parse(page.read_bytes()).header.identity.as_dict()["tp"] for page in pages}
    assert len(pages) == (16 if kind == "mha" else 8)
    assert ranks == ({"0/2", "1/2"} if kind == "mha" else {"all"})
    if kind == "mha":
        victim = bytearray(pages[5].read_bytes())
        victim[-1] ^= 1
        pages[5].write_bytes(victim)
        reports = two_ranks.run(options, phases=["prefetch"], token_count=128)
        hits = [rank["storage_hit_tokens"] for rank in reports]
        assert hits[0] == hits[1] < 128
        assert False not in [rank["exact"] for rank in reports]
