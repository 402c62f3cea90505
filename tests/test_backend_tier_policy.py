"""Which page a tier evicts: S3-FIFO against the least recently used, and its bookkeeping."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvcodec_backends._tier_policy import S3Fifo

PAGE = 100


def hits_of_s3fifo(trace: list[str], pages: int) -> dict[str, int]:
    policy = S3Fifo(pages * PAGE)
    held: set[str] = set()
    hits: dict[str, int] = {"hot": 0, "scan": 0}
    for name in trace:
        if name in held:
            hits[name.split(":")[0]] += 1
            policy.touch(name)
            continue
        if len(held) == pages:
            gone = policy.evict()
            assert gone is not None
            held.remove(gone)
        policy.insert(name, PAGE)
        held.add(name)
    return hits


def hits_of_lru(trace: list[str], pages: int) -> dict[str, int]:
    held: OrderedDict[str, None] = OrderedDict()
    hits: dict[str, int] = {"hot": 0, "scan": 0}
    for name in trace:
        if name in held:
            hits[name.split(":")[0]] += 1
            held.move_to_end(name)
            continue
        if len(held) == pages:
            held.popitem(last=False)
        held[name] = None
    return hits


def zipf_with_scans(requests: int, scan_every: int, scan_pages: int) -> list[str]:
    """Popular pages by Zipf's law, and now and then a long prefix that nobody reads twice."""
    rng = np.random.default_rng(5)
    names = 20_000
    weights = 1 / np.arange(1, names + 1)
    popular = rng.choice(names, requests, p=weights / weights.sum())
    trace: list[str] = []
    for at, page in enumerate(popular):
        trace.append(f"hot:{page}")
        if scan_every and at % scan_every == scan_every - 1:
            trace += [f"scan:{at}:{each}" for each in range(scan_pages)]
    return trace


@pytest.mark.parametrize("pages", [500, 2000])
def test_popular_pages_survive_a_long_prefix_that_is_used_once(pages):
    """Each scan alone would fill the whole of a cache that evicts the least recently used."""
    trace = zipf_with_scans(40_000, scan_every=4000, scan_pages=pages)
    ours, lru = hits_of_s3fifo(trace, pages)["hot"], hits_of_lru(trace, pages)["hot"]
    assert ours > 1.08 * lru


@pytest.mark.parametrize("pages", [500, 2000])
def test_without_scans_it_is_no_worse(pages):
    trace = zipf_with_scans(40_000, scan_every=0, scan_pages=0)
    assert hits_of_s3fifo(trace, pages)["hot"] > hits_of_lru(trace, pages)["hot"]


def test_a_page_read_while_it_is_young_stays_longer():
    policy = S3Fifo(10 * PAGE)
    for number in range(10):
        policy.insert(str(number), PAGE)
    policy.touch("0")
    # The last page that is still to prove itself is not a tenth of the bytes.
    assert [policy.evict() for _ in range(10)] == [*"12345678", "0", "9"]
    assert policy.evict() is None


def test_a_page_that_comes_back_soon_is_taken_for_popular():
    policy = S3Fifo(10 * PAGE)
    for number in range(10):
        policy.insert(str(number), PAGE)
    assert policy.evict() == "0"
    policy.insert("0", PAGE)
    policy.insert("new", PAGE)
    assert [policy.evict() for _ in range(9)] == [str(number) for number in range(1, 10)]


def test_a_page_that_is_read_often_survives_several_rounds():
    policy = S3Fifo(10 * PAGE)
    for number in range(10):
        policy.insert(str(number), PAGE)
        policy.touch(str(number))
    assert policy.evict() == "0"
    for _ in range(9):
        policy.touch("3")
    assert [policy.evict() for _ in range(9)] == [*"1245678", "3", "9"]


class Machine(RuleBasedStateMachine):
    """The names are those inserted, less those removed and evicted; memory is bounded."""

    names = st.integers(0, 30).map(str)

    def __init__(self) -> None:
        super().__init__()
        self.policy = S3Fifo(1000)
        self.model: dict[str, int] = {}

    @rule(name=names, size=st.integers(1, 300))
    def insert(self, name: str, size: int) -> None:
        if name not in self.model:
            self.policy.insert(name, size)
            self.model[name] = size

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        self.policy.touch(data.draw(st.sampled_from(sorted(self.model))))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        self.policy.remove(name)
        del self.model[name]

    @rule()
    def evict(self) -> None:
        name = self.policy.evict()
        assert (name is None) == (not self.model)
        if name is not None:
            del self.model[name]

    @invariant()
    def agrees(self) -> None:
        assert len(self.policy) == len(self.model)
        small, main = self.policy._small, self.policy._main
        assert {**small, **main} == self.model
        assert not set(small) & set(main)
        assert self.policy._small_bytes == sum(small.values())
        assert set(self.policy._hits) == set(self.model)
        assert len(self.policy._ghosts) <= 31


def test_any_sequence_of_calls_agrees_with_a_dict():
    run_state_machine_as_test(Machine, settings=settings(max_examples=40, deadline=None))
