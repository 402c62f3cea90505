"""A sidecar as a process of its own, and what can go wrong in its store.

    python tests/server_sidecar.py SOCKET PORT STORE [OPTION=VALUE ...]

OPTIONS are those of `ServerOptions`. STORE is a store URL; ``strange+<url>`` is a store that does
strange things when it reads an object whose name's last digits say so.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from real_server import RealServer, free_port

from kvcodec.backend import Backend, open_backend
from kvcodec_server._region_wire import region_path
from kvcodec_server.malloc import keep_freed_memory
from kvcodec_server.service import PageServer, ServerOptions, new_grpc_server

#: The ends of names at which a strange store stops its own process: in the middle of a read, or
#: of a write; or does not come back from a read for as many seconds.
STOPS_READING = "5709"
STOPS_WRITING = "5708"
HANGS_SECONDS = 4.0
HANGS = "5707"
RAISES = "5706"


class Sidecar(RealServer):
    """A sidecar on a Unix socket in `directory` and on a port of the loopback interface."""

    def __init__(self, directory: Path, store: str, **options: object) -> None:
        self.socket = directory / "sidecar.sock"
        self.port = free_port()
        settings = [f"{name}={value}" for name, value in options.items()]
        super().__init__(
            [sys.executable, __file__, str(self.socket), str(self.port), store, *settings],
            ready=Path(region_path(str(self.socket))).exists,
            directory=Path(__file__).parent,
        )

    def start(self) -> None:
        Path(region_path(str(self.socket))).unlink(missing_ok=True)
        super().start()

    @property
    def unix_url(self) -> str:
        return f"sidecar+unix://{self.socket}"

    @property
    def url(self) -> str:
        return f"sidecar://127.0.0.1:{self.port}"


def strange(store: Backend) -> Backend:
    """The store, with accidents."""
    get_into, put = store.get_into, store.put

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def strange_get(names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float):
        if names[0].endswith(RAISES):
            raise RuntimeError("a store of somebody else's making")
        if names[0].endswith(HANGS):
            # It knows no deadline, and writes when it is done.
            time.sleep(HANGS_SECONDS)
        if names[0].endswith(STOPS_READING):
            for buffer in buffers:
                buffer[: len(buffer) // 2] = b"\xee" * (len(buffer) // 2)
            stop()
            # When it goes on, it writes for a while: long enough for whoever would use this memory.
            for _ in range(100):
                time.sleep(0.003)
                for buffer in buffers:
                    buffer[:] = b"\xdd" * len(buffer)
        return get_into(names, buffers, timeout_seconds=max(timeout_seconds, 10))

    def strange_put(names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float):
        if names[0].endswith(STOPS_WRITING):
            parts = [bytes(data[: len(data) // 2]) for data in objects]
            stop()
            time.sleep(0.2)
            objects = [
                memoryview(part + bytes(data[len(data) // 2 :]))
                for part, data in zip(parts, objects, strict=True)
            ]
        return put(names, objects, timeout_seconds=max(timeout_seconds, 10))

    store.get_into, store.put = strange_get, strange_put  # type: ignore[method-assign]
    store.lend = lambda name: None  # type: ignore[method-assign]
    return store


def main(socket: str, port: str, url: str, *settings: str) -> None:
    keep_freed_memory()
    options: dict[str, object] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        options[name] = float(value) if "." in value else int(value)
    plain = url.removeprefix("strange+")
    store = open_backend(plain)
    if plain != url:
        store = strange(store)
    server_options = ServerOptions(**options)  # type: ignore[arg-type]
    pages = PageServer(store, server_options)
    grpc_server = new_grpc_server(server_options)
    pages.add_to(grpc_server)
    assert grpc_server.add_insecure_port(f"unix:{socket}")
    assert grpc_server.add_insecure_port(f"127.0.0.1:{port}") == int(port)
    grpc_server.start()
    pages.listen(region_path(socket))
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    while not ending.wait(0.5):
        pass
    pages.drain(2.0)
    pages.close()
    grpc_server.stop(0.5).wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
