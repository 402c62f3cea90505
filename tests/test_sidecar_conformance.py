"""The sidecar is a store like any other, over shared memory and over streams."""

from __future__ import annotations

import pytest
from server_sidecar import Sidecar

from kvcodec.testing import BackendTests
from kvcodec_server.client import SidecarBackend


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory):
    with Sidecar(tmp_path_factory.mktemp("sidecar"), "memory://") as server:
        yield server


class SidecarTests(BackendTests):
    model_examples = 8

    @pytest.fixture(autouse=True)
    def _server(self, sidecar):
        self.sidecar = sidecar

    def open_backend(self):
        return SidecarBackend.from_url(self.url())

    def url_with_unknown_option(self):
        return SidecarBackend, self.url() + "?colour=green"

    def stalled(self):
        return self.sidecar.stalled()


class TestSharedMemory(SidecarTests):
    def url(self):
        return self.sidecar.unix_url


class TestStreams(SidecarTests):
    def url(self):
        return self.sidecar.url


del SidecarTests
