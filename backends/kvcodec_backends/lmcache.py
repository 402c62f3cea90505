r"""``lmcache://``: an LMCache server with kvcodec's module in it, which keeps whole objects in
LMCache's own memory and whatever stores LMCache has behind it.

The module listens on a port of its own and is started with LMCache's server::

    lmcache server --l1-size-gb 60 --eviction-policy LRU --server-module \
      '{"module_path": "kvcodec.lmcache.server_module", "config": {"port": 65500}}'

Nothing of LMCache or torch is needed where the backend runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kvcodec.backend import Deadline, GetResult, ObjectInfo, PutResult, closed_error, parse_options
from kvcodec.connection import ConnectionEnded
from kvcodec.errors import BackendError, BackendFull, BackendTimeout
from kvcodec_backends._lm_stream import (
    Item,
    LMConnection,
    StreamBackend,
    host_and_port,
)
from kvcodec_proto.lmcache import (
    ANSWER,
    ANSWERS,
    ENTRY,
    LISTED,
    MAGIC,
    MAX_OBJECT_BYTES,
    REQUEST,
    Status,
    Verb,
    name_bytes,
    name_text,
)

__all__ = ["LMCacheBackend"]

_Infos = list[ObjectInfo]

_NAMESPACE = re.compile(r"[0-9a-f]{32}")
_LIST_TIMEOUT_SECONDS = 60.0
_LIST_PART = 4096
_MAX_MILLISECONDS = (1 << 32) - 1


class LMCacheBackend(StreamBackend):
    """``lmcache://host:65500``: the port is that of kvcodec's module, not LMCache's own."""

    @classmethod
    def from_url(cls, url: str, *, create: bool = True) -> LMCacheBackend:
        """A client of the module; it need not be up yet, and there is nothing to create."""
        del create
        parts, _ = parse_options(url, [])
        return cls(url, *host_and_port(url, parts, "lmcache://localhost:65500"))

    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Remove objects from LMCache's memory at once, and from what is behind it soon."""
        answers = self._questions("delete", names, timeout_seconds, self._delete)
        return [answer is True for answer in answers]

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """The objects there were when it was called."""
        if self._closed:
            raise closed_error(self._url)
        if prefix and not _NAMESPACE.fullmatch(prefix):
            return iter(())
        entry = _entry(f"{prefix or '0' * 32}/{'0' * 64}", bool(prefix))
        return iter(self._listed(entry))

    def _listed(self, entry: bytes) -> _Infos:
        (answer,) = self._answers(
            "list", [(self._url, memoryview(entry))], _LIST_TIMEOUT_SECONDS, self._list
        )
        if isinstance(answer, BackendError):
            raise answer
        return answer

    def _list(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[_Infos]:
        ((_, entry),) = items
        connection.send([_header(Verb.LIST, 1, deadline), entry], deadline)
        count = _answer_count(connection, deadline)
        found: _Infos = []
        while len(found) < count:
            part = min(count - len(found), _LIST_PART)
            data = connection.receive(part * LISTED.size, deadline)
            found += [
                ObjectInfo(name_text(name), length, seconds)
                for name, length, seconds in LISTED.iter_unpack(data)
            ]
        yield found

    def _put(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[PutResult]:
        fitting = [item for item in items if len(item[1]) <= MAX_OBJECT_BYTES]
        header = _header(Verb.PUT, len(fitting), deadline)
        for name, view in fitting:
            connection.send([header, _entry(name, len(view)), view], deadline)
            header = b""
        if fitting:
            _check_count(connection, len(fitting), deadline)
        for name, view in items:
            if len(view) > MAX_OBJECT_BYTES:
                yield BackendFull(f"put {name}: {len(view)} bytes, at most {MAX_OBJECT_BYTES}")
                continue
            status, _, _ = _answer(connection, deadline)
            yield None if status is Status.FOUND else self._error("put", name, status)

    def _get(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[GetResult]:
        entries = b"".join(_entry(name, len(buffer)) for name, buffer in items)
        connection.send([_header(Verb.GET, len(items), deadline), entries], deadline)
        _check_count(connection, len(items), deadline)
        for name, buffer in items:
            status, length, _ = _answer(connection, deadline)
            if status is Status.MISSING:
                yield None
            elif status is not Status.FOUND:
                yield self._error("get", name, status)
            else:
                if length <= len(buffer):
                    connection.receive_into(buffer[:length], deadline)
                yield length

    def _exists(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[bool]:
        for info in self._stat(connection, items, deadline):
            yield info is not None

    def _stat(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[ObjectInfo | None]:
        for name, (status, length, seconds) in self._ask(Verb.STAT, connection, items, deadline):
            yield ObjectInfo(name, length, seconds) if status is Status.FOUND else None

    def _delete(
        self, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[bool]:
        for _, (status, _, _) in self._ask(Verb.DELETE, connection, items, deadline):
            yield status is Status.FOUND

    def _ask(
        self, verb: Verb, connection: LMConnection, items: Sequence[Item], deadline: Deadline
    ) -> Iterator[tuple[str, tuple[Status, int, float]]]:
        entries = b"".join(_entry(name, 0) for name, _ in items)
        connection.send([_header(verb, len(items), deadline), entries], deadline)
        _check_count(connection, len(items), deadline)
        for name, _ in items:
            yield name, _answer(connection, deadline)

    def _error(self, verb: str, name: str, status: Status) -> BackendError:
        message = f"{verb} {name}: {self._url}"
        if status is Status.FULL:
            return BackendFull(f"{message} found no room in LMCache's memory")
        if status is Status.LATE:
            return BackendTimeout(f"{message} found no time for it")
        return BackendError(f"{message} failed inside LMCache; its log says why")


def _header(verb: Verb, count: int, deadline: Deadline) -> bytes:
    milliseconds = min(int(deadline.remaining_seconds() * 1000), _MAX_MILLISECONDS)
    return REQUEST.pack(MAGIC, verb, count, milliseconds)


def _entry(name: str, number: int) -> bytes:
    return ENTRY.pack(name_bytes(name), number)


def _answer_count(connection: LMConnection, deadline: Deadline) -> int:
    magic, count = ANSWERS.unpack(connection.receive(ANSWERS.size, deadline))
    if magic != MAGIC:
        raise ConnectionEnded("this is not kvcodec's server module; LMCache's own port is another")
    return int(count)


def _check_count(connection: LMConnection, count: int, deadline: Deadline) -> None:
    if _answer_count(connection, deadline) != count:
        raise ConnectionEnded("the answer is to another question")


def _answer(connection: LMConnection, deadline: Deadline) -> tuple[Status, int, float]:
    status, length, seconds = ANSWER.unpack(connection.receive(ANSWER.size, deadline))
    try:
        return Status(status), length, seconds
    except ValueError:
        raise ConnectionEnded(f"an answer with the unknown status {status}") from None
