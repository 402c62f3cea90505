"""lm://: the conformance suite and what else it promises, on LMCache's real older server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest
from real_server import RealServer, free_port
from server_lmcache import legacy_server

from kvcodec.backend import Backend
from kvcodec.testing import BackendTests
from kvcodec_backends.lm import LMServerBackend


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def server(port: int) -> Iterator[RealServer]:
    with legacy_server(port) as started:
        yield started


class TestConformance(BackendTests):
    can_delete = False
    can_list = False

    @pytest.fixture(autouse=True)
    def _store(self, server: RealServer, port: int) -> None:
        self.server, self.url = server, f"lm://127.0.0.1:{port}"

    def open_backend(self) -> Backend:
        return LMServerBackend.from_url(self.url)

    def url_with_unknown_option(self) -> tuple[type[Backend], str]:
        return LMServerBackend, f"{self.url}?max_bytes=1GB"

    def stalled(self) -> AbstractContextManager[None]:
        return self.server.stalled()
