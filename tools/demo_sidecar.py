"""A sidecar for the demo: ``kvcodec serve`` in front of a store, between enter and exit."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0


class SidecarFailed(Exception):
    """The sidecar did not start; the text is what it said."""


@contextmanager
def sidecar(store_url: str, log: Path, *more: str) -> Iterator[str]:
    """The URL under which an engine reaches a sidecar that keeps its pages in that store, and has
    `more` flags.
    """
    with tempfile.TemporaryDirectory(prefix="kvcodec-") as folder, log.open("wb") as output:
        socket = Path(folder) / "kvcodec.sock"  # short: a socket's path has 107 bytes at most
        command = [str(Path(sys.executable).with_name("kvcodec")), "serve"]
        command += [f"--store.url={store_url}", "--store.ram_bytes=64MiB"]
        command += [f"--listen.unix={socket}", "--http.address=", *more]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait_for(socket, process, log)
            yield f"sidecar+unix://{socket}"
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(socket: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    health = [str(Path(sys.executable).with_name("kvcodec")), "health", f"unix:{socket}"]
    while subprocess.run(health, check=False, capture_output=True).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            raise SidecarFailed(f"kvcodec serve did not start\n{log.read_text()}")
        time.sleep(0.1)
