"""What a client takes for the proof that nobody writes to its memory any more."""

from __future__ import annotations

import os
import socket
import threading
import time

import grpc
import pytest

from kvcodec_server import _region_wire as wire
from kvcodec_server._client_link import LiveSession
from kvcodec_server._client_region import ClientRegion

PART = (8192, 100)


class Peer:
    """The sidecar's end of a session, and the client's session with a call in doubt."""

    def __init__(self) -> None:
        self.socket, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(20)
        ours.setblocking(False)
        self.region = ClientRegion(1 << 20)
        channel = grpc.insecure_channel("unix:/nowhere")
        self.session = LiveSession(ours, "token", channel, self.region)
        self.wake = os.pipe()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        self.memory = self.region.bytes_at(*PART)
        self.session.doubt(7, [PART], [])

    def _watch(self) -> None:
        self.session.end(is_over=self.session.watch(self.wake[0]))

    def settles(self, seconds: float = 20.0) -> bool:
        stop_at = time.monotonic() + seconds
        while time.monotonic() < stop_at:
            if self.region.is_idle(self.memory):
                return True
            time.sleep(0.01)
        return False

    def close(self) -> None:
        os.write(self.wake[1], b"x")
        self.socket.close()
        self.thread.join()
        for end in self.wake:
            os.close(end)
        self.region.close()


@pytest.fixture
def peer():
    peer = Peer()
    yield peer
    peer.close()


def test_a_call_is_asked_for_and_over_when_the_sidecar_says_so(peer):
    assert wire.unpack_call(peer.socket.recv(100), wire.FENCE) == 7
    assert not peer.region.is_idle(peer.memory)
    peer.socket.send(wire.pack_call(wire.RELEASED, 7))
    assert peer.settles()


@pytest.mark.parametrize(
    "packet",
    [
        wire.pack_call(wire.RELEASED, 8),
        wire.pack_call(wire.FENCE, 7),
        wire.pack_call(wire.RELEASED, 7)[:-1],
        bytes([wire.WELCOME]) + b"x" * 32,
        # Named, for tests in parallel have to agree on names.
        pytest.param(os.urandom(100), id="noise"),
    ],
)
def test_nothing_else_that_it_says_is_a_proof(peer, packet):
    peer.socket.send(packet)
    assert not peer.settles(0.5)
    peer.socket.send(wire.pack_call(wire.RELEASED, 7))
    assert peer.settles()


def test_half_of_an_end_is_none(peer):
    peer.socket.shutdown(socket.SHUT_RD)
    assert not peer.settles(0.5)


@pytest.mark.parametrize("read", [False, True])
def test_the_end_of_the_socket_is_a_proof_for_all_calls(peer, read):
    peer.session.doubt(8, [(0, 10)], [])
    if read:
        peer.socket.recv(100)
        peer.socket.recv(100)
    peer.socket.close()
    assert peer.settles()
    assert peer.region.is_idle(peer.region.bytes_at(0, 10))
    # Whoever learns only now that his call was given up has nothing to fear either.
    peer.thread.join()
    peer.session.doubt(9, [PART], [])
    assert peer.region.is_idle(peer.memory)


def test_doubts_that_touch_a_part_keep_it(peer):
    start, size = PART
    for offset, length, idle in (
        (start, size, False),
        (start - 10, 11, False),
        (start + size - 1, 5, False),
        (start - 10, 10, True),
        (start + size, 5, True),
    ):
        assert peer.region.is_idle(peer.region.bytes_at(offset, length)) is idle
    assert peer.region.is_idle(memoryview(bytearray(10)))


def test_a_server_that_does_not_read_is_asked_again_when_it_does(peer):
    for call_id in range(100, 3000):
        peer.session.doubt(call_id, [PART], [])
    asked = {7, *range(100, 3000)}
    while asked:
        asked.remove(wire.unpack_call(peer.socket.recv(100), wire.FENCE))
        peer.socket.send(wire.pack_call(wire.RELEASED, 0))
