"""lmcache://: the conformance suite and what else it promises, on LMCache's real server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
from real_server import RealServer
from server_lmcache import MPServer

from kvcodec.backend import Backend
from kvcodec.testing import BackendTests
from kvcodec_backends.lmcache import LMCacheBackend


@pytest.fixture(scope="module")
def lmcache() -> Iterator[MPServer]:
    started = MPServer()
    with started.server:
        yield started


class TestConformance(BackendTests):
    model_examples = 15

    @pytest.fixture(autouse=True)
    def _store(self, lmcache: MPServer) -> None:
        self.url = lmcache.url
        self.server: RealServer = lmcache.server

    def open_backend(self) -> Backend:
        return LMCacheBackend.from_url(self.url)

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return LMCacheBackend, f"{self.url}?max_bytes=1GB"

    def stalled(self) -> AbstractContextManager[None]:
        return self.server.stalled()
