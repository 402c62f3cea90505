"""A small HTTP server that says yes to everything and remembers what it was asked.

It shows what a client of an object store sends, which a real server keeps to itself; what a store
does with it is for the tests on real servers.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_LISTING = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"


@dataclass
class ObjectServer:
    """`requests` are (method, path, headers in lower case), in the order they came."""

    port: int = 0
    body: bytes = b"data"
    #: What an answer says its length is, where that is not the length of the body.
    body_bytes: int | None = None
    delay_seconds: float = 0.0
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    def headers(self) -> dict[str, str]:
        """Those of the last request."""
        return self.requests[-1][2]

    def path(self) -> str:
        return self.requests[-1][1]

    def methods(self) -> list[str]:
        return [method for method, _, _ in self.requests]


@contextmanager
def object_server(certificate: Path | None = None) -> Iterator[ObjectServer]:
    """A server on loopback; over TLS if a file with a key and a certificate is given."""
    state = ObjectServer()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            with lock:
                headers = {name.lower(): value for name, value in self.headers.items()}
                state.requests.append((self.command, self.path, headers))
                state.running += 1
                state.most_running = max(state.most_running, state.running)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            time.sleep(state.delay_seconds)
            is_listing = self.command == "GET" and "list-type=2" in self.path
            body = _LISTING if is_listing else state.body
            length = len(body) if is_listing or state.body_bytes is None else state.body_bytes
            with lock:
                state.running -= 1
            self.send_response(200)
            self.send_header(
                "Content-Length", str(length if self.command in ("GET", "HEAD") else 0)
            )
            self.send_header("Last-Modified", "Sat, 21 Nov 2026 12:00:00 GMT")
            self.send_header("ETag", '"1"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer  # noqa: N815 - as it is called

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    # Clients that give up are what some tests are about.
    server.handle_error = lambda *_: None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
