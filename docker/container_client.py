"""A client of the sidecar as an engine is one: pages go there encoded and come back verified.

python3 - write | read | refused URL       in a container, with this file on its standard input
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt

from kvcodec.backend import open_backend
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.spec import CodecSpec
from kvcodec.store import PageStore, Pipeline, StoreOptions, open_store

__all__ = ["KEYS", "Client", "Pages", "decoded_pages", "refusal"]

KEYS = [f"{number:064x}" for number in range(32)]

Pages = list[npt.NDArray[np.uint16]]

_LAYOUT = PageLayout.mha(
    dtype=DType.BF16, token_count=64, layer_count=8, head_count=8, head_size=128
)


def _blank() -> Pages:
    return [np.zeros((len(KEYS), 8, 8, 64, 128), np.uint16) for _ in range(2)]


def _original() -> Pages:
    """The same pages in every process: normal numbers as bf16."""
    random = np.random.default_rng(20261121)
    pages = [random.standard_normal(array.shape, np.float32) for array in _blank()]
    return [(array.view(np.uint32) >> 16).astype(np.uint16) for array in pages]


class Client:
    """A page store of one namespace on the store that a URL names."""

    def __init__(self, url: str) -> None:
        self.pipeline: Pipeline
        self._store: PageStore
        self.pipeline, self._store = open_store(
            url,
            Namespace(Identity.of(model="example/container"), _LAYOUT),
            CodecSpec.parse("kv4"),
            # Without a breaker, which would leave the sidecar alone for a while after a failure.
            options=StoreOptions(breaker_failures=0),
        )

    def backup(self) -> int:
        """Store all pages; how many are stored."""
        return sum(self._store.backup(KEYS, PageViews.of_arrays(_LAYOUT, _original())))

    def prefetch(self, keys: Sequence[str] = KEYS) -> tuple[list[bool], Pages]:
        """Which pages came, and all of them; those that did not come are zero."""
        pages = _blank()
        found = self._store.prefetch(keys, PageViews.of_arrays(_LAYOUT, pages))
        return found, pages

    def close(self) -> None:
        """End the session."""
        self.pipeline.close()


def decoded_pages() -> Pages:
    """What a sound store gives back, from one in this process."""
    client = Client("memory://")
    client.backup()
    found, pages = client.prefetch()
    client.close()
    assert all(found)
    return pages


def refusal(url: str) -> str:
    """Why a sidecar does not serve this process; empty if it does."""
    with closing(open_backend(url)) as backend:
        deadline = time.monotonic() + 5
        (answer,) = backend.get_into(
            [f"{'a' * 32}/{'b' * 64}"], [memoryview(bytearray(64))], timeout_seconds=5
        )
        assert time.monotonic() < deadline
    return "" if answer is None else str(answer)


def _main(task: str, url: str) -> int:
    if task == "refused":
        reason = refusal(url)
        sys.stdout.write(f"{reason}\n")
        return 0 if reason else 1
    client = Client(url)
    if task == "write":
        stored = client.backup()
        sys.stdout.write(f"{stored} of {len(KEYS)} pages stored\n")
        return 0 if stored == len(KEYS) else 1
    started = time.monotonic()
    found, pages = client.prefetch()
    seconds = time.monotonic() - started
    client.close()
    equal = all(map(np.array_equal, pages, decoded_pages()))
    sys.stdout.write(f"{sum(found)} of {len(KEYS)} pages in {1000 * seconds:.0f} ms\n")
    return 0 if all(found) and equal else 1


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
