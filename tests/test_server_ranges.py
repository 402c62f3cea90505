"""Parts of a region: never two owners, and all of it back in the end."""

from __future__ import annotations

import random
import threading
import time

import pytest

from kvcodec_server.ranges import Ranges, aligned

PAGE = 4096


def test_parts_begin_at_pages_and_do_not_overlap():
    ranges = Ranges(10 * PAGE)
    assert [ranges.take(size) for size in (1, PAGE, PAGE + 1, 0)] == [0, PAGE, 2 * PAGE, 4 * PAGE]
    assert ranges.free_bytes() == 5 * PAGE
    assert ranges.take(6 * PAGE) is None
    assert ranges.take(5 * PAGE) == 5 * PAGE
    assert ranges.take(1) is None


def test_some_of_it_can_be_left():
    ranges = Ranges(4 * PAGE)
    assert ranges.take(3 * PAGE + 1, leave=PAGE) is None
    assert ranges.take(2 * PAGE, leave=PAGE) == 0
    assert ranges.take(2 * PAGE, leave=PAGE) is None
    assert ranges.take(2 * PAGE) == 2 * PAGE


def test_what_is_given_back_is_joined():
    ranges = Ranges(4 * PAGE)
    parts = [ranges.take(PAGE) for _ in range(4)]
    for part in (parts[2], parts[0], parts[3], parts[1]):
        ranges.free(part, PAGE)
    assert ranges.take(4 * PAGE) == 0


@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_keeps_owners_apart(seed):
    chance = random.Random(seed)
    ranges, owned = Ranges(64 * PAGE), []
    for _ in range(500):
        if owned and chance.random() < 0.5:
            ranges.free(*owned.pop(chance.randrange(len(owned))))
            continue
        size = chance.randrange(1, 9 * PAGE)
        offset = ranges.take(size)
        if offset is None:
            continue
        assert 0 <= offset <= 64 * PAGE - aligned(size)
        for start, length in owned:
            assert offset >= start + aligned(length) or start >= offset + aligned(size)
        owned.append((offset, size))
    for part in owned:
        ranges.free(*part)
    assert ranges.take(64 * PAGE) == 0


def test_one_may_wait_for_a_part():
    ranges = Ranges(PAGE)
    offset = ranges.take(PAGE)
    started = time.monotonic()
    assert ranges.take(1, 0.05) is None
    assert time.monotonic() - started < 10
    timer = threading.Timer(0.05, ranges.free, (offset, PAGE))
    timer.start()
    assert ranges.take(1, 20) == 0
    timer.join()
