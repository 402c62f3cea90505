"""Fixtures of several test modules; what only one of them needs stays with it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvcodec import native
from kvcodec.codec import Codec


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell lets what it starts in its background ignore Ctrl-C, and so what that starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _set_isa(name: str) -> Iterator[str]:
    before = native.isa()
    native.set_isa(name)
    yield name
    native.set_isa(before)


@pytest.fixture(params=native.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine has, one after the other."""
    with _set_isa(request.param) as name:
        yield name


@pytest.fixture(scope="module", params=["scalar", "avx2", "avx512", "neon"])
def known_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each that libkvcodec has kernels for; what this machine lacks is reported as skipped.

    Of the whole module, because Hypothesis wants one fixture for all examples of a test.
    """
    if request.param not in native.available_isas():
        pytest.skip(f"this machine has no {request.param}")
    with _set_isa(request.param) as name:
        yield name


@pytest.fixture(scope="module")
def codec() -> Iterator[Codec]:
    """A codec of two threads."""
    codec = Codec(threads=2)
    yield codec
    codec.close()


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """Threads that wait for each other cost small models more than they bring."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
