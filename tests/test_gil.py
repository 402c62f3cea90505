"""A batch costs the GIL a constant number of times, however many pages it has."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvcodec.codec import Codec
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.plan import PagePlan
from kvcodec.spec import CodecSpec

PAGES = 128
SWITCH_SECONDS = 0.2


@pytest.fixture
def busy_interpreter() -> Iterator[None]:
    """Another thread computes in Python and gives the GIL away only when the interval has passed.

    With an interval of 0.2 s, time tells how often a call had to wait for the GIL.
    """
    interval, stop = sys.getswitchinterval(), threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(100))

    thread = threading.Thread(target=spin)
    sys.setswitchinterval(SWITCH_SECONDS)
    thread.start()
    yield
    stop.set()
    sys.setswitchinterval(interval)
    thread.join()


def shortest(call: Callable[[], object]) -> float:
    """The shortest of three tries: a loaded machine can lengthen a call, nothing can shorten it."""
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        call()
        seconds.append(time.monotonic() - start)
    return min(seconds)


def test_a_batch_takes_the_gil_at_most_twice(busy_interpreter: None) -> None:
    """Encoding 128 pages waits for the GIL at most twice, not once per page; so does decoding."""
    layout = PageLayout.mha(
        dtype=DType.BF16, token_count=16, layer_count=2, head_count=1, head_size=64
    )
    namespace = Namespace(Identity.of(model="m"), layout)
    plan = PagePlan.build(namespace, CodecSpec.parse("kv4").section_codecs(layout), 64)
    arrays = [np.zeros((PAGES, 2, 1, 16, 64), np.uint16) for _ in range(2)]
    views = PageViews.of_arrays(layout, arrays)
    keys = [b"%064d" % index for index in range(PAGES)]
    encoded = [np.zeros(plan.page_bytes, np.uint8) for _ in keys]
    codec = Codec(1)

    def decode() -> None:
        assert codec.decode_into(namespace, plan, keys, encoded, views) == [None] * PAGES

    # Two waits, and one more for the interpreter taking the GIL away in the middle.
    assert shortest(lambda: codec.encode_into(plan, keys, views, encoded)) < 3.5 * SWITCH_SECONDS
    assert shortest(decode) < 3.5 * SWITCH_SECONDS
    codec.close()
