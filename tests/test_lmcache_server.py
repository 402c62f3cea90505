"""kvcodec inside LMCache, end to end: an engine's chunks through LMCache's real server to a store
of kvcodec's and back.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_lmcache import ENVIRONMENT, MPServer, python_in_lmcache
from waiting import wait_until

CHUNKS = 6
LAYOUT = {
    "dtype": "bfloat16",
    "token_count": 16,
    "layer_count": 4,
    "head_count": 2,
    "head_size": 64,
}


class Engine:
    """The process of `lmcache_engine.py`."""

    def __init__(self, server: MPServer) -> None:
        script = Path(__file__).with_name("lmcache_engine.py")
        self.process = subprocess.Popen(
            python_in_lmcache(script, f"tcp://127.0.0.1:{server.port}"),
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, do: str, seed: int, model: str = "org/model") -> dict:
        command = {"do": do, "model": model, "seed": seed, "chunks": CHUNKS}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the engine ended")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Setup:
    """LMCache's server over a directory, and an engine before it; may start anew in between."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.server: MPServer | None = None
        self.engine: Engine | None = None

    def start(self, **params: object) -> None:
        self.stop()
        adapter = {
            "type": "native_plugin",
            "module_path": "kvcodec.lmcache",
            "class_name": "Connector",
            "adapter_params": {"url": f"file://{self.root}", "layout": LAYOUT} | params,
        }
        self.server = MPServer("--l2-adapter", json.dumps(adapter))
        # Both take seconds to start; the engine waits for the server.
        self.engine = Engine(self.server)
        self.server.server.__enter__()

    def stop(self) -> None:
        if self.engine is not None:
            self.engine.close()
        if self.server is not None:
            self.server.server.kill()
            self.server.server.__exit__()

    def counters(self) -> dict[str, int]:
        assert self.server is not None
        (counters,) = self.server.status()["connectors"]
        return counters

    def store(self, seed: int) -> None:
        """Hand chunks to the server, and wait until the connector has seen them."""
        assert self.engine is not None
        before = self._seen()
        assert self.engine.ask("store", seed)["stored"]
        wait_until(lambda: self._seen() >= before + CHUNKS)

    def _seen(self) -> int:
        counters = self.counters()
        return sum(counters.get(f"backup.{name}", 0) for name in ("stored", "present", "failed"))

    def retrieve(self, seed: int, model: str = "org/model") -> dict:
        """Ask for chunks while LMCache's own memory is empty."""
        assert self.engine is not None and self.server is not None
        self.server.clear_memory()
        return self.engine.ask("retrieve", seed, model)

    def pages(self) -> list[Path]:
        return [path for path in (self.root / "objects").rglob("*") if path.is_file()]


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    started = Setup(tmp_path / "store")
    yield started
    started.stop()


def test_chunks_go_through_lmcache_verified_and_quantized(setup: Setup):
    """One test with two servers, because each takes seconds to start."""
    setup.start(preset="kv4")
    setup.store(1)
    assert len(setup.pages()) == CHUNKS
    found = setup.retrieve(1)
    assert found["hits"] == CHUNKS
    # Half a step of int4, and the rounding of bfloat16.
    assert all(0 < worst < 0.53 for worst in found["worst_steps"])
    counters = setup.counters()
    assert counters["backup.raw_bytes"] / counters["backup.encoded_bytes"] > 3.4
    assert counters["prefetch.hit"] == CHUNKS
    assert setup.retrieve(2)["hits"] == 0, "nobody stored this"
    assert setup.retrieve(1, "org/other")["hits"] == 0, "another model's"

    # Damage is a miss; what LMCache stores again is sound again.
    for path in setup.pages():
        data = bytearray(path.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 64] = b"\x7e" * 64
        path.write_bytes(data)
    assert setup.retrieve(1)["hits"] == 0
    corrupt = {n: c for n, c in setup.counters().items() if n.startswith("prefetch.corrupt")}
    assert sum(corrupt.values()) == CHUNKS
    setup.store(1)
    assert setup.retrieve(1)["worst_steps"] == found["worst_steps"]

    # Chunks of another type, of as many bytes, are others; raw ones are exact.
    setup.start(preset="raw", layout=LAYOUT | {"dtype": "float16"})
    assert setup.retrieve(1)["hits"] == 0
    setup.store(1)
    assert setup.retrieve(1) == {
        "hits": CHUNKS,
        "errors": [0.0] * CHUNKS,
        "worst_steps": [0.0] * CHUNKS,
    }
