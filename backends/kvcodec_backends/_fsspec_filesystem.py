"""Any other fsspec file system: memory, SFTP, WebDAV, HDFS, and what others have registered."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar, cast

from kvcodec.errors import BackendError, BackendReadOnly, BackendTimeout, ConfigError
from kvcodec.workers import IOThreads
from kvcodec_backends._fsspec_client import Address, Client, StoredObject

__all__ = ["FilesystemClient", "known_options", "make_client"]

T = TypeVar("T")

#: File systems that show an object only when all of it is there. Whatever else there is writes to
#: a name of its own first, and moves.
_WHOLE_PUTS = frozenset({"memory", "oss", "tos", "oci"})
#: Options that a file system hands on to its library, and so does not name itself.
_MORE_OPTIONS = dict.fromkeys(
    ("sftp", "ssh"), ("username", "password", "port", "key_filename", "timeout")
)
_OWN = frozenset(
    {"self", "args", "kwargs", "use_listings_cache", "skip_instance_cache", "asynchronous", "loop"}
)
#: And as many connections.
_THREAD_COUNT = 8
#: A thread that is in one call for so long is replaced.
_STUCK_SECONDS = 60.0
_MODIFIED = ("mtime", "LastModified", "last_modified", "modified", "updated", "created")


def known_options(protocol: str, shown: str) -> Sequence[str]:
    """The parameters of the file system's constructors."""
    named = _parameters(_filesystem_class(protocol, shown))
    return sorted({*named, *_MORE_OPTIONS.get(protocol, ())} - _OWN)


def make_client(address: Address, options: Mapping[str, str]) -> FilesystemClient:
    """A client whose file system is made with its first request."""
    kind = _filesystem_class(address.protocol, address.shown)
    if address.protocol not in _WHOLE_PUTS and not _has_move(kind):
        raise ConfigError(
            f"{address.shown}: {kind.__name__} can neither store an object whole nor move one, so "
            "a reader would see half of it"
        )
    plain = f"{address.protocol}://{address.location}/{address.path}"
    storage_options = dict(kind._get_kwargs_from_urls(plain))
    defaults = _parameters(kind)
    for name, value in options.items():
        storage_options[name] = _typed(name, value, defaults.get(name), address.shown)
    root = str(kind._strip_protocol(plain)).rstrip("/")
    return FilesystemClient(address, kind, storage_options, root)


class FilesystemClient(Client):
    """One directory of one file system. Those without coroutines are called in daemon threads."""

    def __init__(
        self,
        address: Address,
        kind: type[Any],
        storage_options: Mapping[str, Any],
        root: str,
    ) -> None:
        self._address = address
        self._kind = kind
        self._storage_options = dict(storage_options)
        self._root = root
        self._moves = address.protocol not in _WHOLE_PUTS
        self._numbers = itertools.count()
        self._filesystem: Any = None
        self.after_fork()

    async def open(self, *, create: bool) -> None:
        """Look for the directory, or make it."""
        try:
            try:
                await self._call("info", self._root)
                return
            except FileNotFoundError:
                pass
            if not create:
                raise ConfigError(f"{self._address.shown}: there is no such directory")
            await self._call("makedirs", self._root, exist_ok=True)
        except (TypeError, ValueError) as error:
            # A constructor that does not like its arguments.
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{self._address.shown}: {error}") from error
        except Exception:  # noqa: BLE001 - a server that is away may come back
            return

    async def put(self, key: str, data: bytes) -> None:
        """Write to the name itself where that shows nothing before the end, else move there."""
        target = f"{self._root}/{key}"
        if not self._moves:
            await self._call("pipe_file", target, data)
            return
        temporary = f"{self._root}/tmp/{os.getpid()}.{self._token}.{next(self._numbers)}"
        try:
            try:
                await self._call("pipe_file", temporary, data)
            except FileNotFoundError:
                await self._make_directory(f"{self._root}/tmp")
                await self._call("pipe_file", temporary, data)
            await self._move(temporary, target)
        except BaseException:
            self._discard(temporary)
            raise

    async def _make_directory(self, path: str) -> None:
        for _ in range(path.count("/") + 1):
            try:
                await self._call("makedirs", path, exist_ok=True)
            except OSError:
                # Somebody was quicker with one of the directories on the way, for which SFTP has no
                # word of its own. What is tried next says what is wrong.
                continue
            return

    async def _move(self, temporary: str, target: str) -> None:
        move = "mv_file" if self._kind.async_impl else "mv"
        try:
            await self._call(move, temporary, target)
        except FileNotFoundError:
            await self._make_directory(target.rpartition("/")[0])
            await self._call(move, temporary, target)
        except OSError:
            # FTP, SMB and HDFS do not move to a name that is taken.
            try:
                await self._call("rm_file", target)
            except FileNotFoundError:
                pass
            await self._call(move, temporary, target)

    async def get(self, key: str, limit_bytes: int) -> memoryview | int:
        """Ask for the length first: few file systems can read a part."""
        found = await self.stat(key)
        if found.stored_bytes > limit_bytes:
            return found.stored_bytes
        return memoryview(cast("bytes", await self._call("cat_file", f"{self._root}/{key}")))

    async def stat(self, key: str) -> StoredObject:
        """Length and time of a file; directories are not there."""
        info = cast("Mapping[str, Any]", await self._call("info", f"{self._root}/{key}"))
        if info.get("type") != "file":
            raise FileNotFoundError(key)
        return _described(key, info)

    async def delete(self, key: str) -> None:
        """Remove a file."""
        await self._call("rm_file", f"{self._root}/{key}")

    async def list(self, directory: str) -> AsyncIterator[list[StoredObject]]:
        """One directory at a time."""
        paths = [directory]
        while paths:
            path = paths.pop()
            try:
                listed = await self._call("ls", f"{self._root}/{path}".rstrip("/"), detail=True)
            except FileNotFoundError:
                continue
            found = []
            for info in cast("list[Mapping[str, Any]]", listed):
                key = f"{path}/{str(info['name']).rstrip('/').rpartition('/')[2]}".lstrip("/")
                if info.get("type") == "directory":
                    # Namespaces and shards: objects lie two levels down.
                    paths += [key] if key.count("/") < 2 else []
                elif info.get("type") == "file":
                    found.append(_described(key, info))
            yield found

    def as_backend_error(self, error: BaseException, verb: str, name: str) -> BackendError:
        """By Python's own classes; file systems have none in common."""
        text = f"{type(error).__name__}: {error}".partition("\n")[0]
        message = f"{verb} {name}: {text[:300]}"
        for value in self._storage_options.values():
            # Some clients say what they were called with.
            if isinstance(value, str) and len(value) > 3:
                message = message.replace(value, "***")
        if isinstance(error, TimeoutError):
            return BackendTimeout(message)
        if verb == "put" and isinstance(error, PermissionError):
            return BackendReadOnly(message)
        return BackendError(message)

    def close(self) -> None:
        """Let the threads end."""
        self._threads.close(0.0)
        self._own = threading.local()
        self._filesystem = None

    def after_fork(self) -> None:
        """Start afresh."""
        self._token = os.urandom(4).hex()
        self._threads = IOThreads(_THREAD_COUNT, limit=1024)
        self._own = threading.local()
        self._filesystem = None

    async def _call(self, method: str, *arguments: object, **options: object) -> object:
        """Call a method of the file system, made here if need be."""
        if not self._kind.async_impl:
            return await self._in_thread(
                lambda: getattr(self._sync_filesystem(), method)(*arguments, **options)
            )
        if self._filesystem is None:
            loop = asyncio.get_running_loop()
            self._filesystem = self._make(asynchronous=True, loop=loop)
        return await getattr(self._filesystem, f"_{method}")(*arguments, **options)

    def _sync_filesystem(self) -> Any:  # noqa: ANN401 - fsspec is not typed
        # One for each thread: not every client library may be called from several (paramiko loses
        # answers then, and waits for them for ever).
        if not hasattr(self._own, "filesystem"):
            self._own.filesystem = self._make()
        return self._own.filesystem

    def _make(self, **options: object) -> Any:  # noqa: ANN401 - fsspec is not typed
        # An instance that is shared would be shared with somebody's other settings.
        made = self._kind(**self._storage_options, **options, skip_instance_cache=True)
        # What another process wrote is not in a listing from before. As an argument it would go on
        # to whatever library some file systems hand all their arguments to.
        if hasattr(made, "dircache"):
            made.dircache.use_listings_cache = False
        return made

    async def _in_thread(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def run() -> None:
            result: T | None = None
            failure: BaseException | None = None
            if future.cancelled():
                return
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - raised again where it is awaited
                failure = error
            try:
                loop.call_soon_threadsafe(settle, result, failure)
            except RuntimeError:
                # The loop ended with the backend.
                return

        self._threads.replace_stuck(_STUCK_SECONDS)
        if not self._threads.submit(run):
            raise BackendError(f"{self._address.shown}: too many calls wait for this store already")
        return await future

    def _discard(self, temporary: str) -> None:
        async def remove() -> None:
            try:
                await self._call("rm_file", temporary)
            except Exception:  # noqa: BLE001 - it may never have been there
                return

        self._discarding = asyncio.ensure_future(remove())


def _filesystem_class(protocol: str, shown: str) -> type[Any]:
    try:
        import fsspec  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(f"{shown}: {error}; pip install 'kvcodec[fsspec]' brings it") from error
    try:
        return cast("type[Any]", fsspec.get_filesystem_class(protocol))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{shown}: {error}") from error


def _parameters(kind: type[Any]) -> dict[str, object]:
    """The named parameters of all constructors of a class, with their defaults."""
    found: dict[str, object] = {}
    for base in reversed(kind.__mro__):
        constructor = vars(base).get("__init__")
        if constructor is not None:
            for name, parameter in inspect.signature(constructor).parameters.items():
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    found[name] = parameter.default
    return found


def _has_move(kind: type[Any]) -> bool:
    """Whether a file system moves by itself: fsspec's own way is to copy and to delete."""
    name = "_mv_file" if kind.async_impl else "mv"
    return any(
        name in vars(base)
        for base in kind.__mro__
        if base.__module__ not in ("fsspec.spec", "fsspec.asyn")
    )


def _typed(name: str, value: str, default: object, shown: str) -> object:
    """A value from a URL in the type of the parameter's default."""
    try:
        if isinstance(default, bool):
            return {"0": False, "1": True, "false": False, "true": True}[value.lower()]
        if isinstance(default, int | float):
            return type(default)(value)
    except (KeyError, ValueError):
        raise ConfigError(
            f"{shown}: {name} is {value!r}, wanted a {type(default).__name__}"
        ) from None
    return value


def _described(key: str, info: Mapping[str, Any]) -> StoredObject:
    times = (info[name] for name in _MODIFIED if info.get(name) is not None)
    modified = next(times, 0.0)
    if isinstance(modified, datetime):
        modified = modified.timestamp()
    elif not isinstance(modified, int | float):
        modified = 0.0
    return StoredObject(key, int(info.get("size") or 0), float(modified))
