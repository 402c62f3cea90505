"""Objects as strings in Redis, Valkey, or what else speaks their protocol.

A key is the prefix and the object's name. A value is the object and eight bytes more: when it was
written, in milliseconds since the epoch, little-endian, for Redis keeps no such time. The page
comes first, so that what ``redis-cli --raw GET`` prints begins as the page does.
"""

from __future__ import annotations

import re
import ssl
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeGuard, TypeVar

from kvcodec.backend import (
    Backend,
    Deadline,
    GetResult,
    ObjectInfo,
    PutResult,
    check_name,
    checked_buffers,
    checked_names,
    checked_objects,
    closed_error,
)
from kvcodec.errors import BackendError, ConfigError
from kvcodec_backends._redis_channel import Channel, Channels, ServerError, as_backend_error
from kvcodec_backends._redis_url import RedisURL

__all__ = ["RedisBackend"]

T = TypeVar("T")

_TIME = struct.Struct("<Q")
_OPEN_SECONDS = 2.0
_LIST_STEP_SECONDS = 30.0
_LIST_STEP_KEYS = 1000
# All requests of a part are sent before its first reply is read, and until then the server keeps
# the replies in its memory.
_PART_BYTES = 64 << 20
_LOGIN_CODES = frozenset({"WRONGPASS", "NOAUTH", "NOPERM"})


class RedisBackend(Backend):
    """``redis://user:password@host:port/db?prefix=kvcodec:&max_connections=16&ttl_seconds=86400``

    ``rediss://`` is the same with TLS (`ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`: files;
    `ssl_check_hostname=0`), ``redis+unix:///run/redis.sock?db=0`` a socket of this machine. Without
    `ttl_seconds` objects stay until the server evicts them (``maxmemory-policy allkeys-lru``). A
    server in cluster mode is refused.
    """

    def __init__(self, url: RedisURL) -> None:
        self._url = url.shown
        self._prefix = url.prefix
        self._expiry = () if url.ttl_seconds is None else (b"EX", b"%d" % url.ttl_seconds)
        self._channels = Channels(url.connect, url.max_connections)
        self._closed = False
        self._check_server()

    @classmethod
    def from_url(cls, url: str, *, create: bool = True) -> RedisBackend:  # noqa: ARG003
        """Use the database of that server; it needs no making."""
        return cls(RedisURL.parse(url))

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        """Store objects with one SET each."""
        pairs = checked_objects(names, objects)
        sizes = [len(view) for _, view in pairs]
        # In the backend's memory while the batch is under way: they are sent from there.
        stamp = memoryview(_TIME.pack(int(time.time() * 1000)))

        def exchange(channel: Channel, first: int, last: int) -> Iterator[PutResult]:
            chosen = pairs[first:last]
            channel.send(
                [(b"SET", self._key(name), (view, stamp), *self._expiry) for name, view in chosen]
            )
            for name, _ in chosen:
                reply = channel.read_reply()
                yield as_backend_error(reply, "put", name) if _is_error(reply) else None

        return self._in_parts("put", names, sizes, timeout_seconds, exchange)

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        """Read objects into the buffers; of a larger one nothing beyond the buffer is sent."""
        pairs = checked_buffers(names, buffers)
        sizes = [len(buffer) for _, buffer in pairs]

        def exchange(channel: Channel, first: int, last: int) -> Iterator[GetResult]:
            chosen = pairs[first:last]
            channel.send([command for pair in chosen for command in self._get_commands(*pair)])
            for name, buffer in chosen:
                received = channel.read_value_into(buffer, _TIME.size)
                stored = channel.read_reply()
                if _is_error(received):
                    yield as_backend_error(received, "get", name)
                    continue
                object_bytes = _bytes_of(received)
                if object_bytes is not None and object_bytes > len(buffer):
                    # It may have been replaced by a smaller one since, which was not read either.
                    object_bytes = max(object_bytes, _bytes_of(stored) or 0)
                yield object_bytes

        return self._in_parts("get", names, sizes, timeout_seconds, exchange)

    def exists(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Whether each object is there: one EXISTS each, in one go."""
        return self._count("exists", b"EXISTS", names, timeout_seconds)

    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Remove objects; the server frees their memory in the background."""
        return self._count("delete", b"UNLINK", names, timeout_seconds)

    def _key(self, name: str) -> bytes:
        return self._prefix + name.encode()

    def _get_commands(self, name: str, buffer: memoryview) -> tuple[tuple[bytes, ...], ...]:
        """One byte more than fits is asked for: it tells of a larger object without sending it."""
        key = self._key(name)
        return (
            (b"GETRANGE", key, b"0", b"%d" % (len(buffer) + _TIME.size)),
            (b"STRLEN", key),
        )

    def _in_parts(
        self,
        verb: str,
        names: Sequence[str],
        sizes: Sequence[int],
        timeout_seconds: float,
        exchange: Callable[[Channel, int, int], Iterator[T]],
    ) -> list[T | BackendError]:
        """The results of `exchange` on parts of a batch; an error for each name after a failure."""
        results: list[T | BackendError] = []
        if self._closed:
            return [closed_error(self._url) for _ in names]
        try:
            with self._channels.channel(Deadline(timeout_seconds)) as channel:
                while len(results) < len(names):
                    last = _part_end(sizes, len(results))
                    # What was answered before a failure stays in the list.
                    results.extend(exchange(channel, len(results), last))
        except BackendError as error:
            results += [as_backend_error(error, verb, name) for name in names[len(results) :]]
        return results

    def _count(
        self, verb: str, command: bytes, names: Sequence[str], timeout_seconds: float
    ) -> list[bool]:
        checked = checked_names(names)

        def exchange(channel: Channel, first: int, last: int) -> Iterator[bool]:
            channel.send([(command, self._key(name)) for name in checked[first:last]])
            for _ in range(first, last):
                yield channel.read_reply() == 1

        answers = self._in_parts(verb, checked, [0] * len(checked), timeout_seconds, exchange)
        # An unanswered question is a no.
        return [answer is True for answer in answers]

    def _describe(self, channel: Channel, names: Sequence[str]) -> list[ObjectInfo | None]:
        """What is said of strings of our kind; None for what is gone or something else."""
        keys = [self._key(name) for name in names]
        channel.send(
            [
                command
                for key in keys
                for command in (
                    (b"STRLEN", key),
                    (b"GETRANGE", key, b"%d" % -_TIME.size, b"-1"),
                )
            ]
        )
        infos: list[ObjectInfo | None] = []
        for name in names:
            size, stamp = channel.read_reply(), channel.read_reply()
            if isinstance(size, ServerError) and size.code != "WRONGTYPE":
                raise size
            object_bytes = _bytes_of(size)
            if object_bytes is None or not isinstance(stamp, bytes) or len(stamp) != _TIME.size:
                infos.append(None)
                continue
            (milliseconds,) = _TIME.unpack(stamp)
            infos.append(ObjectInfo(name, object_bytes, milliseconds / 1000))
        return infos

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects, by SCAN: what is written or removed meanwhile may be there or not."""
        if self._closed:
            raise closed_error(self._url)
        return self._list(prefix)

    def stat(self, name: str, *, timeout_seconds: float) -> ObjectInfo | None:
        """One object's description."""
        check_name(name)
        if self._closed:
            raise closed_error(self._url)
        try:
            with self._channels.channel(Deadline(timeout_seconds)) as channel:
                (info,) = self._describe(channel, [name])
        except BackendError as error:
            raise as_backend_error(error, "stat", name) from error
        return info

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        self._channels.close()

    def counters(self) -> Mapping[str, int]:
        """Connections opened, and those given up because of an error or a deadline."""
        return {
            "opened_connections": self._channels.opened,
            "dropped_connections": self._channels.dropped,
        }

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        pattern = _escaped(self._prefix + prefix.encode()) + b"*"
        cursor = b"0"
        seen: set[str] = set()  # SCAN may answer one key twice
        while True:
            with self._channels.channel(Deadline(_LIST_STEP_SECONDS)) as channel:
                channel.send(
                    [(b"SCAN", cursor, b"MATCH", pattern, b"COUNT", b"%d" % _LIST_STEP_KEYS)]
                )
                reply = channel.read_reply()
                if _is_error(reply):
                    raise as_backend_error(reply, "list", self._url)
                assert isinstance(reply, list)
                cursor, keys = reply
                names = dict.fromkeys(map(self._name, keys)).keys() - seen - {""}
                infos = self._describe(channel, [*names])
            seen |= names
            yield from (info for info in infos if info)
            if cursor == b"0":
                return

    def _name(self, key: bytes) -> str:
        """The object's name, empty if it is none of ours."""
        try:
            return check_name(key[len(self._prefix) :].decode("ascii", "replace"))
        except ConfigError:
            return ""

    def _check_server(self) -> None:
        """Refuse what no later call could mend; a server that is away may come back."""
        try:
            with self._channels.channel(Deadline(_OPEN_SECONDS)) as channel:
                channel.send([(b"INFO", b"cluster")])
                reply = channel.read_reply()
        except BackendError as error:
            cause = error.__cause__
            if _is_about_login(cause) or _is_about_certificate(cause):
                self.close()
                raise ConfigError(f"{self._url}: {cause}") from error
            return
        if _is_about_login(reply):
            self.close()
            raise ConfigError(f"{self._url}: {reply}")
        if isinstance(reply, bytes) and b"cluster_enabled:1" in reply:
            self.close()
            raise ConfigError(
                f"{self._url} is a Redis Cluster; kvcodec's redis:// serves one server, or a proxy "
                "that looks like one"
            )


def _is_error(reply: object) -> TypeGuard[ServerError]:
    return isinstance(reply, ServerError)


def _is_about_login(reply: object) -> bool:
    """Whether the server refuses the URL's user, password or database."""
    return isinstance(reply, ServerError) and (
        reply.code in _LOGIN_CODES or "AUTH" in str(reply) or "DB index" in str(reply)
    )


def _is_about_certificate(error: BaseException | None) -> bool:
    return error is not None and isinstance(error.__context__, ssl.SSLCertVerificationError)


def _bytes_of(value_bytes: object) -> int | None:
    """The object's length in a value of that many bytes; None for what is no value of ours."""
    if not isinstance(value_bytes, int) or value_bytes <= _TIME.size:
        return None
    return value_bytes - _TIME.size


def _part_end(sizes: Sequence[int], first: int) -> int:
    """Where the part of a batch ends that begins at `first`: at one object at least."""
    last, part_bytes = first + 1, sizes[first]
    while last < len(sizes) and part_bytes + sizes[last] <= _PART_BYTES:
        part_bytes += sizes[last]
        last += 1
    return last


def _escaped(text: bytes) -> bytes:
    """The text as a pattern that matches nothing else."""
    return re.sub(rb"([*?\[\]\\^-])", rb"\\\1", text)
