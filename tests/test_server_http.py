"""The small HTTP server: answers, and what it costs to be a nuisance."""

from __future__ import annotations

import errno
import http.client
import socket
import threading
import time
from contextlib import ExitStack

import pytest

from kvcodec.errors import ConfigError
from kvcodec_server.config import Address
from kvcodec_server.http import MAX_THREADS, HTTPListener


@pytest.fixture
def listener():
    pages = {
        "/page": lambda accept: (200, f"page {accept}".encode(), "text/x"),
        "/fail": lambda _: (503, b"no", "text/plain"),
    }
    listener = HTTPListener(Address("127.0.0.1", 0), pages)
    yield listener
    listener.close()


def request(listener, method, path, **headers):
    connection = http.client.HTTPConnection(str(listener.address), timeout=5)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def test_page_status_type_and_accept(listener):
    status, body, headers = request(listener, "GET", "/page?query=1", Accept="x/y")
    assert (status, body) == (200, b"page x/y")
    assert headers["Content-Type"] == "text/x" and headers["Cache-Control"] == "no-store"
    assert "Python" not in headers["Server"]
    assert request(listener, "GET", "/fail")[:2] == (503, b"no")


def test_head_has_no_body(listener):
    status, body, headers = request(listener, "HEAD", "/page")
    assert (status, body, headers["Content-Length"]) == (200, b"", "5")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "TRACE"])
def test_nothing_can_be_changed(listener, method):
    assert request(listener, method, "/page")[0] == 501


def test_unknown_path_names_the_known_ones(listener):
    status, body, _ = request(listener, "GET", "/../etc/passwd")
    assert status == 404 and b"/metrics" in body


@pytest.mark.parametrize(
    "data", [b"\x00\xff" * 100, b"GET " + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", b"\r\n\r\n", b""]
)
def test_garbage_is_answered_or_closed(listener, data):
    with socket.create_connection((listener.address.host, listener.address.port)) as client:
        client.settimeout(20)
        answer = b""
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while part := client.recv(65536):
                answer += part
        except OSError as error:
            # It was closed, maybe before all was sent. A timeout has no number.
            if error.errno not in {errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE}:
                raise
        assert answer == b"" or b" 400 " in answer or b" 414 " in answer or b"BAD_REQUEST" in answer
    assert request(listener, "GET", "/page")[0] == 200


def test_silent_connections_cost_few_threads_and_end(monkeypatch, listener):
    """Whoever connects and says nothing is let go; meanwhile more are turned away, not kept."""
    monkeypatch.setattr("kvcodec_server.http._Handler.timeout", 1.0)
    before = threading.active_count()
    with ExitStack() as stack:
        clients = [
            stack.enter_context(
                socket.create_connection((listener.address.host, listener.address.port))
            )
            for _ in range(4 * MAX_THREADS)
        ]
        time.sleep(0.5)
        assert threading.active_count() <= before + MAX_THREADS
        clients[-1].settimeout(5)
        assert clients[-1].recv(1) == b""  # there was no room for it
        deadline = time.monotonic() + 10
        while threading.active_count() > before:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert request(listener, "GET", "/page")[0] == 200


def test_taken_port_is_named(listener):
    with pytest.raises(ConfigError, match=f"http.address {listener.address}"):
        HTTPListener(listener.address, {})


def test_ipv6():
    try:
        listener = HTTPListener(Address("::1", 0), {"/": lambda _: (200, b"six", "text/plain")})
    except ConfigError:
        pytest.skip("this machine has no IPv6")
    try:
        assert str(listener.address).startswith("[::1]:")
        assert request(listener, "GET", "/")[1] == b"six"
    finally:
        listener.close()
