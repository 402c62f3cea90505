"""``lm://``: LMCache's older server, ``lmcache_server HOST PORT``, over its raw socket protocol.

The server keeps whole objects in its memory and knows three questions: put, get, exists. It has no
delete, no list, no limit to its memory and no authentication, and LMCache will drop it; for
anything but a deployment that has it already, ``lmcache://`` is the store to use.
"""

from __future__ import annotations

import struct
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from kvcodec.backend import (
    Deadline,
    GetResult,
    ObjectInfo,
    PutResult,
    checked_names,
    closed_error,
    parse_options,
)
from kvcodec.connection import ConnectionEnded
from kvcodec.errors import BackendError, BackendFull
from kvcodec_backends._lm_stream import (
    Item,
    LMConnection,
    StreamBackend,
    host_and_port,
)

__all__ = ["MAX_OBJECT_BYTES", "LMServerBackend"]

#: The length of an object is a signed number of 32 bits on the wire.
MAX_OBJECT_BYTES = (1 << 31) - 1

# LMCache's lmcache/v1/protocol.py, the same from 0.3.15 to 0.5.6, in the byte order of the machine:
# command, length, format, element type, location, four numbers of a shape, key. An answer is the
# same without the key, its first number a status and its location last.
_REQUEST = struct.Struct("iiiiiiiii150s")
_ANSWER = struct.Struct("iiiiiiiii")
_PUT, _GET, _EXIST = 1, 2, 3
_SUCCESS = 200
_BINARY_FORMAT = 4
_UINT8 = 6
# The server hands a shape back as it got it. Ours holds the time of writing in two halves.
_HALF_BITS = 24
_REMEMBERED_NAMES = 65536


class LMServerBackend(StreamBackend):
    """``lm://host:65432``.

    The server keeps an object whose writer was cut off, and says it exists: its readers get an
    error, and for this process it does not exist until it is written again.
    """

    def __init__(self, url: str, host: str, port: int) -> None:
        super().__init__(url, host, port)
        #: Objects of which the server may hold a part only.
        self._doubtful: OrderedDict[str, None] = OrderedDict()
        self._counts.update(refused_deletes=0, broken_objects=0)

    @classmethod
    def from_url(cls, url: str, *, create: bool = True) -> LMServerBackend:
        """A client of the server; it need not be up yet, and there is nothing to create."""
        del create
        parts, _ = parse_options(url, [])
        return cls(url, *host_and_port(url, parts, "lm://localhost:65432"))

    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Nothing: the server cannot. A page that is put again is replaced."""
        del timeout_seconds
        checked = checked_names(names)
        self._count("refused_deletes", len(checked))
        return [False] * len(checked)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Raises `BackendError`: the server cannot."""
        if self._closed:
            raise closed_error(self._url)
        raise BackendError(
            f"{self._url}: an lm:// server cannot list its objects (prefix {prefix!r}); "
            "lmcache:// can"
        )

    def _put(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[PutResult]:
        """A put has no answer. The server takes requests in order, so that of the question behind
        it says that it has been done.
        """
        for name, view in items:
            if len(view) > MAX_OBJECT_BYTES:
                continue
            self._doubt(name)
            request, question = _request(_PUT, name, len(view)), _request(_EXIST, name)
            connection.send([request, view, question], deadline)
        for name, view in items:
            if len(view) > MAX_OBJECT_BYTES:
                yield BackendFull(f"put {name}: {len(view)} bytes, lm:// takes {MAX_OBJECT_BYTES}")
                continue
            status = _answer(connection, deadline)[0]
            if status == _SUCCESS:
                self._doubtful.pop(name, None)
                yield None
            else:
                yield BackendError(f"put {name}: {self._url} did not keep the object")

    def _get(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[GetResult]:
        connection.send([_request(_GET, name) for name, _ in items], deadline)
        for name, buffer in items:
            status, length, *_ = _answer(connection, deadline)
            if status != _SUCCESS:
                yield None
                continue
            try:
                if 0 < length <= len(buffer):
                    connection.receive_into(buffer[:length], deadline)
                else:
                    connection.drop(max(0, length), deadline)
            except ConnectionEnded as error:
                # What the server does at an object whose writer was cut off.
                self._doubt(name)
                self._count("broken_objects")
                yield BackendError(f"get {name}: {self._url} holds a broken object")
                raise error from None
            yield length if length > 0 else None

    def _exists(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[bool]:
        connection.send([_request(_EXIST, name) for name, _ in items], deadline)
        for name, _ in items:
            yield _answer(connection, deadline)[0] == _SUCCESS and name not in self._doubtful

    def _stat(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[ObjectInfo | None]:
        """Costs the transfer of the object: no other question tells its length."""
        connection.send([_request(_GET, name) for name, _ in items], deadline)
        for name, _ in items:
            status, length, _, _, _, high, low, *_ = _answer(connection, deadline)
            if status != _SUCCESS or length <= 0:
                yield None
                continue
            connection.drop(length, deadline)
            yield ObjectInfo(name, length, float((high << _HALF_BITS) | low))

    def _doubt(self, name: str) -> None:
        self._doubtful[name] = None
        if len(self._doubtful) > _REMEMBERED_NAMES:
            self._doubtful.popitem(last=False)


def _request(command: int, name: str, length: int = 0) -> bytes:
    """A key is model, world size, rank, hash and element type; the hash is a number to the server,
    of any length.
    """
    key = f"kvcodec-{name[:32]}@1@0@{name[33:]}@uint8".encode().ljust(150)
    now = int(time.time())
    high, low = now >> _HALF_BITS, now & ((1 << _HALF_BITS) - 1)
    return _REQUEST.pack(command, length, _BINARY_FORMAT, _UINT8, 0, length, high, low, 0, key)


def _answer(connection: LMConnection, deadline: Deadline) -> tuple[int, ...]:
    return _ANSWER.unpack(connection.receive(_ANSWER.size, deadline))
