"""Sessions: which calls may touch a region, and when its owner may be sure that none does."""

from __future__ import annotations

import gc
import mmap
import socket

import pytest

from kvcodec.errors import BackendError, ConfigError
from kvcodec_server import _region_wire as wire
from kvcodec_server import session as session_module
from kvcodec_server.session import Sessions

SIZE = 4 * mmap.PAGESIZE


@pytest.fixture
def sessions():
    return Sessions()


@pytest.fixture
def client():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.setblocking(False)
    ours.settimeout(0.2)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def session(sessions, client):
    return sessions.open(client[1], mmap.mmap(-1, SIZE), 1000)


def heard(client) -> int | None:
    """The call that the client is told to be over; None for silence."""
    try:
        return wire.unpack_call(client[0].recv(wire.MAX_PACKET_BYTES), wire.RELEASED)
    except TimeoutError:
        return None


def is_over(client) -> bool:
    try:
        return client[0].recv(100) == b""
    except TimeoutError:
        return False


def test_a_session_is_found_by_its_token_until_it_ends(sessions, session, client):
    assert len(session.token) == 32
    assert sessions.find(session.token) is session
    assert sessions.find(session.token[:-1]) is None
    assert sessions.find("") is None
    assert (sessions.count, sessions.mapped_regions, sessions.mapped_bytes) == (1, 1, SIZE)
    session.end()
    assert sessions.find(session.token) is None
    assert sessions.count == 0
    assert is_over(client)


def test_tokens_differ(sessions):
    tokens = set()
    for _ in range(100):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            session = sessions.open(theirs, mmap.mmap(-1, SIZE), 0)
            tokens.add(session.token)
            session.end()
    assert len(tokens) == 100


def test_views_are_parts_of_the_region(session):
    session.view(10, 5)[:] = b"abcde"
    assert bytes(session.view(8, 9)) == b"\0\0abcde\0\0"
    assert len(session.view(0, SIZE)) == SIZE


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, SIZE + 1), (1, SIZE), (SIZE, 1), (0, 0), (2**64 - 1, 1), (2**64 - 1, 2**64 - 1)],
)
def test_a_range_beyond_the_region_is_refused(session, offset, length):
    with pytest.raises(ConfigError):
        session.view(offset, length)


def test_the_client_is_told_when_a_call_is_over(session, client):
    lease = session.begin(7)
    session.fence(7)
    assert heard(client) is None
    lease.release()
    assert heard(client) == 7


def test_a_call_that_is_over_already_is_told_at_once(session, client):
    session.begin(7).release()
    session.fence(7)
    assert heard(client) == 7


def test_a_call_given_up_before_it_began_never_begins(session, client):
    session.fence(8)
    assert heard(client) == 8
    with pytest.raises(BackendError):
        session.begin(8)


def test_a_call_id_under_way_is_no_other_calls(session):
    lease = session.begin(1)
    with pytest.raises(ConfigError):
        session.begin(1)
    lease.release()
    session.begin(1).release()


def test_the_socket_stays_open_while_a_call_is_under_way(sessions, session, client):
    """Its end is the proof for the client that nobody touches its memory."""
    first, second = session.begin(1), session.begin(2)
    session.end()
    with pytest.raises(BackendError):
        session.begin(3)
    assert not is_over(client)
    first.release()
    assert not is_over(client)
    assert sessions.count == 1
    second.release()
    assert is_over(client)
    assert sessions.count == 0


def test_a_region_counts_as_long_as_somebody_has_a_view_of_it(sessions, session):
    view = session.view(0, 10)
    session.end()
    gc.collect()
    assert sessions.count == 0
    assert sessions.mapped_regions == 1
    view[:] = b"0123456789"  # a call that hangs may write still
    del view, session
    gc.collect()


def test_a_region_is_unmapped_when_nobody_needs_it(sessions, client):
    session = sessions.open(client[1], mmap.mmap(-1, SIZE), 1000)
    view = session.view(0, 10)
    session.end()
    assert sessions.mapped_bytes == SIZE
    del view
    gc.collect()
    assert (sessions.mapped_regions, sessions.mapped_bytes) == (0, 0)


def test_a_client_that_gives_up_without_end_has_its_session_ended(session, client, monkeypatch):
    monkeypatch.setattr(session_module, "_MAX_GIVEN_UP", 10)
    lease = session.begin(1000)
    for call_id in range(11):
        session.fence(call_id)
        assert heard(client) == call_id
    with pytest.raises(BackendError):
        session.begin(500)
    # Its watcher sees the end of the socket; the client not before the last call is over.
    assert session.connection.recv(100) == b""
    session.end()
    assert not is_over(client)
    lease.release()
    assert is_over(client)


def test_a_client_that_does_not_read_has_its_session_ended(session, client):
    client[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    for call_id in range(10_000):
        session.fence(call_id)
    with pytest.raises(BackendError):
        session.begin(20_000)
    assert session.connection.recv(100) == b""
    session.end()
