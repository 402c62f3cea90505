"""LMCache's two servers, real and in the environment that `make stores` made for them."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from real_server import STORES, RealServer, answers_on, free_port, need

PYTHON = STORES / "lmcache" / "bin" / "python"
ENVIRONMENT = {
    # Without this LMCache reports its use to its makers.
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_LOG_LEVEL": "WARNING",
    "CUDA_VISIBLE_DEVICES": "",
}


class MPServer:
    """`lmcache server` with kvcodec's module: its command, its ports, its HTTP interface."""

    def __init__(self, *options: str, memory_gb: float = 0.25) -> None:
        self.port, self.http_port, self.store_port = free_port(), free_port(), free_port()
        module = {
            "module_path": "kvcodec.lmcache.server_module",
            "config": {"port": self.store_port},
        }
        python = need(PYTHON)
        self.server = RealServer(
            [python, "-W", "ignore", str(Path(python).parent / "lmcache"), "server"]
            + ["--host", "127.0.0.1", "--port", str(self.port)]
            + ["--http-host", "127.0.0.1", "--http-port", str(self.http_port)]
            + ["--l1-size-gb", str(memory_gb), "--eviction-policy", "LRU"]
            + ["--supported-transfer-mode", "engine_driven", "--chunk-size", "16"]
            + ["--server-module", json.dumps(module), *options],
            ready=self._ready,
            environment=ENVIRONMENT,
        )

    @property
    def url(self) -> str:
        return f"lmcache://127.0.0.1:{self.store_port}"

    def _ready(self) -> bool:
        try:
            return bool(self.http("healthcheck"))
        except OSError:
            return False

    def http(self, path: str, body: object = None) -> dict:
        """The answer of LMCache's HTTP interface."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http_port}/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def status(self) -> dict:
        """kvcodec's part of the server's status."""
        return self.http("status")["kvcodec"]

    def clear_memory(self) -> None:
        """Empty LMCache's memory (L1); what is behind it stays."""
        self.http("cache/clear", {"tier": "l1", "force": True})


# The older server cannot start again on its port within a minute; this is all that is added to it.
_LEGACY = """
import runpy, socket
class Reusable(socket.socket):
    def bind(self, address):
        self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        super().bind(address)
socket.socket = Reusable
runpy.run_module("lmcache.v1.server", run_name="__main__")
"""


def legacy_server(port: int) -> RealServer:
    """`lmcache_server HOST PORT`, the older one."""
    return RealServer(
        [need(PYTHON), "-W", "ignore", "-c", _LEGACY, "127.0.0.1", str(port)],
        ready=answers_on(port),
        environment=ENVIRONMENT,
    )


def python_in_lmcache(script: Path, *arguments: str) -> Sequence[str]:
    """The command that runs a script where LMCache can be imported."""
    return [need(PYTHON), "-W", "ignore", str(script), *arguments]
