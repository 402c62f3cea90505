"""Object stores and remote file systems by their fsspec URL: S3, GCS, Azure, SFTP, memory ...

::

    fsspec+s3://bucket/prefix?endpoint_url=http://...      obstore
    fsspec+gs://bucket/prefix   fsspec+abfs://container/prefix
    fsspec+sftp://host/path     fsspec+memory://name       the fsspec file system of that protocol

    <prefix>/<namespace>/<2 hex digits>/<digest>            the objects
    <prefix>/tmp/                                           objects being written, where a store can
                                                            only publish by moving

Requests are made by one event loop in a thread of its own, so many at a time. The bytes pass
through memory of that loop and are copied to and from the caller's in the caller's thread: a late
answer is never written to memory that somebody else uses by then.
"""

from __future__ import annotations

import atexit
import os
import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import unquote

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
    display_url,
    parse_options,
)
from kvcodec.errors import BackendError, BackendTimeout, ConfigError
from kvcodec_backends import _fsspec_filesystem, _fsspec_obstore
from kvcodec_backends._fsspec_client import Address, Client, StoredObject
from kvcodec_backends._fsspec_loop import RequestLoop

__all__ = ["DEFAULT_CONCURRENCY", "FsspecBackend"]

T = TypeVar("T")

DEFAULT_CONCURRENCY = 32
_MAX_CONCURRENCY = 1024
#: How long opening waits to learn whether there is such a store.
_OPEN_SECONDS = 5.0

_PREFIX = re.compile(r"[0-9a-f]{0,31}|[0-9a-f]{32}(/[0-9a-f]{0,64})?")
_KEY = re.compile(r"([0-9a-f]{32})/([0-9a-f]{2})/(\2[0-9a-f]{62})")


_backends: weakref.WeakSet[FsspecBackend] = weakref.WeakSet()


class FsspecBackend(Backend):
    """``fsspec+PROTOCOL://LOCATION/PREFIX?OPTIONS``: one object per page.

    `concurrency` bounds the requests under way (32); the other options are those of the protocol.
    Credentials that are not in the URL come from where the ecosystem keeps them, such as
    ``AWS_ACCESS_KEY_ID``.
    """

    batch_size = 8

    def __init__(
        self, client: Client, shown: str, *, concurrency: int = DEFAULT_CONCURRENCY
    ) -> None:
        if not 1 <= concurrency <= _MAX_CONCURRENCY:
            raise ConfigError(
                f"{shown}: concurrency is {concurrency}, wanted 1 to {_MAX_CONCURRENCY}"
            )
        self._client = client
        self._shown = shown
        self._loop = RequestLoop(concurrency)
        self._closed = False
        self._counts: Counter[str] = Counter(failed_requests=0, late_requests=0)
        self._counts_lock = threading.Lock()
        _backends.add(self)

    @classmethod
    def from_url(cls, url: str, *, create: bool = True) -> FsspecBackend:
        """Open the store a URL names, and make its bucket or directory if need be."""
        shown = display_url(url)
        protocol = url.partition(":")[0].partition("+")[2].lower()
        if not protocol:
            raise ConfigError(
                f"{shown!r}: wanted is fsspec+PROTOCOL://..., as in fsspec+s3://bucket"
            )
        if protocol in ("file", "local"):
            raise ConfigError(f"{shown!r}: for a directory, a mount too, write file:///path")
        kind = _fsspec_obstore if protocol in _fsspec_obstore.PROTOCOLS else _fsspec_filesystem
        parts, options = parse_options(url, ["concurrency", *kind.known_options(protocol, shown)])
        if parts.fragment:
            raise ConfigError(f"{shown!r}: write # as %23")
        path = unquote(parts.path).strip("/")
        if ".." in path.split("/") or "\0" in path:
            raise ConfigError(f"{shown!r}: the path contains '..'; write it without")
        address = Address(protocol, parts.netloc, path, shown)
        concurrency = options.pop("concurrency", str(DEFAULT_CONCURRENCY))
        if not concurrency.isdecimal():
            raise ConfigError(f"{shown}: concurrency is {concurrency!r}, wanted a number")
        backend = cls(kind.make_client(address, options), shown, concurrency=int(concurrency))
        try:
            backend.open(create=create)
        except BaseException:
            backend.close()
            raise
        return backend

    def open(self, *, create: bool) -> None:
        """Raise `ConfigError` if the store cannot be used; one that does not answer may later."""
        (answer,) = self._loop.gather([lambda: self._client.open(create=create)], _OPEN_SECONDS)
        if isinstance(answer, ConfigError):
            raise answer

    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        """Store copies of the objects, all at once."""
        pairs = checked_objects(names, objects)
        # Of equal names the last one counts, whichever request would end first.
        data = {name: bytes(view) for name, view in pairs}
        answers = self._each(
            "put",
            list(data),
            lambda name: self._client.put(_key(name), data[name]),
            timeout_seconds,
        )
        return [
            answer if isinstance(answer := answers[name], BackendError) else None
            for name, _ in pairs
        ]

    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        """Read objects, all at once. One above its buffer's length is not read to its end."""
        pairs = checked_buffers(names, buffers)
        limits: dict[str, int] = {}
        for name, buffer in pairs:
            limits[name] = max(len(buffer), limits.get(name, 0))
        answers = self._each(
            "get",
            list(limits),
            lambda name: self._client.get(_key(name), limits[name]),
            timeout_seconds,
        )
        results: list[GetResult] = []
        for name, buffer in pairs:
            answer = answers[name]
            if isinstance(answer, memoryview):
                if len(answer) <= len(buffer):
                    buffer[: len(answer)] = answer
                results.append(len(answer) or None)
            else:
                results.append(answer or None)
        return results

    def exists(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Whether each object is there, one request each."""
        checked = checked_names(names)
        found = self._stat_each("exists", checked, timeout_seconds)
        return [isinstance(found[name], StoredObject) for name in checked]

    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Remove objects; asks for each first, because stores do not say whether it was there."""
        checked = checked_names(names)
        client = self._client

        async def delete(name: str) -> bool:
            if not (await client.stat(_key(name))).stored_bytes:
                return False
            await client.delete(_key(name))
            return True

        left = self._each("delete", list(dict.fromkeys(checked)), delete, timeout_seconds)
        # The second of two equal names finds nothing.
        return [left.pop(name, None) is True for name in checked]

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects, page by page as the store lists them."""
        if self._closed:
            raise closed_error(self._shown)
        return self._list(prefix)

    def stat(self, name: str, *, timeout_seconds: float) -> ObjectInfo | None:
        """One object's description."""
        check_name(name)
        answer = self._stat_each("stat", [name], timeout_seconds)[name]
        if isinstance(answer, BackendError):
            raise answer
        if answer is None:
            return None
        return ObjectInfo(name, answer.stored_bytes, answer.modified_seconds)

    def after_fork(self) -> None:
        """In the child: let go of what is the parent's."""
        self._counts_lock = threading.Lock()
        self._loop.after_fork()
        self._client.after_fork()

    def close(self, *, at_exit: bool = False) -> None:
        """End the loop and its connections."""
        if not self._closed:
            self._closed = True
            self._loop.close(at_exit=at_exit)
            self._client.close()

    def counters(self) -> Mapping[str, int]:
        """Requests that failed, and requests that did not answer in time."""
        return dict(self._counts)

    def _stat_each(
        self, verb: str, names: Sequence[str], timeout_seconds: float
    ) -> dict[str, StoredObject | BackendError | None]:
        found = self._each(
            verb,
            list(dict.fromkeys(names)),
            lambda name: self._client.stat(_key(name)),
            timeout_seconds,
        )
        # What is empty is no object: somebody's mark for a directory.
        return {
            name: None if isinstance(answer, StoredObject) and not answer.stored_bytes else answer
            for name, answer in found.items()
        }

    def _each(
        self,
        verb: str,
        names: Sequence[str],
        request: Callable[[str], Coroutine[Any, Any, T]],
        timeout_seconds: float,
    ) -> dict[str, T | BackendError | None]:
        """The answer for each name: of the request, None for a missing object, or the error."""
        deadline = Deadline(timeout_seconds)
        if self._closed:
            return dict.fromkeys(names, closed_error(self._shown))
        if deadline.passed():
            return {name: deadline.error(verb, name) for name in names}
        if not names:
            return {}
        calls = [lambda name=name: request(name) for name in names]
        answers: dict[str, T | BackendError | None] = {}
        for name, answer in zip(names, self._loop.gather(calls, timeout_seconds), strict=True):
            if isinstance(answer, BaseException):
                answers[name] = self._translated(answer, verb, name)
            else:
                answers[name] = answer
        return answers

    def _translated(self, error: BaseException, verb: str, name: str) -> BackendError | None:
        if isinstance(error, FileNotFoundError) and verb != "put":
            return None
        if isinstance(error, BackendTimeout):
            self._count("late_requests")
            return BackendTimeout(f"{verb} {name}: {error}")
        self._count("failed_requests")
        if self._closed:
            return closed_error(self._shown)
        if isinstance(error, BackendError):
            return error
        return self._client.as_backend_error(error, verb, name)

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        if not _PREFIX.fullmatch(prefix):
            return
        directory = prefix[:32] if len(prefix) >= 32 else ""
        pages = self._loop.iterate(lambda: self._client.list(directory))
        try:
            for page in pages:
                for found in page:
                    match = _KEY.fullmatch(found.key)
                    name = f"{match[1]}/{match[3]}" if match else ""
                    if match and found.stored_bytes and name.startswith(prefix):
                        yield ObjectInfo(name, found.stored_bytes, found.modified_seconds)
                if self._closed:
                    raise closed_error(self._shown)
        except FileNotFoundError:
            return
        except (BackendError, GeneratorExit):
            raise
        except Exception as error:
            raise self._client.as_backend_error(error, "list", prefix or "objects") from error

    def _count(self, counter: str) -> None:
        with self._counts_lock:
            self._counts[counter] += 1


def _key(name: str) -> str:
    return f"{name[:32]}/{name[33:35]}/{name[33:]}"


def _after_fork() -> None:
    for backend in list(_backends):
        backend.after_fork()


def _at_exit() -> None:
    for backend in list(_backends):
        backend.close(at_exit=True)
    _fsspec_obstore.settle()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
