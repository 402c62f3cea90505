"""``/metrics``, ``/healthz`` and ``/readyz`` on a small HTTP server of its own.

It answers as long as the process lives, whatever the calls of clients do, and costs a bounded
number of threads whoever connects.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import ThreadingMixIn
from typing import Any

from kvcodec.errors import ConfigError
from kvcodec_server.config import Address

__all__ = ["MAX_THREADS", "HTTPListener"]

#: Connections served at a time; more are closed at once.
MAX_THREADS = 16

_REQUEST_SECONDS = 5.0

#: Status, body and content type, for the value of the Accept header.
Answer = Callable[[str], tuple[int, bytes, str]]


class HTTPListener:
    """Serves `pages`, answers by path, until it is closed."""

    def __init__(self, address: Address, pages: Mapping[str, Answer]) -> None:
        """Raises `ConfigError` if nobody can listen there."""
        try:
            self._server = _Server(address, pages)
        except OSError as error:
            raise ConfigError(f"http.address {address}: {error}") from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="kvcodec-http", daemon=True
        )
        self._thread.start()

    @property
    def address(self) -> Address:
        """Where it listens, with the port that the system chose."""
        host, port = self._server.server_address[:2]
        return Address(str(host), int(port))

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingMixIn, HTTPServer):
    daemon_threads = True
    request_queue_size = 128  # whoever finds it full waits for a second before trying again
    block_on_close = False

    def __init__(self, address: Address, pages: Mapping[str, Answer]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        self.pages = pages
        self._free = threading.BoundedSemaphore(MAX_THREADS)
        super().__init__((address.host, address.port), _Handler)

    def server_bind(self) -> None:
        """Without the look-up of the host's name that `HTTPServer` makes, which may hang."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "kvcodec", int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Whoever breaks off a scrape is no event."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "kvcodec"
    sys_version = ""
    timeout = _REQUEST_SECONDS

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        if page is None:
            status, body, content_type = 404, b"try /metrics, /healthz or /readyz\n", "text/plain"
        else:
            status, body, content_type = page(self.headers.get("Accept", ""))
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the name is the interface

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """A scrape is no event."""
