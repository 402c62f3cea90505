"""Finding pages in a store by their key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from kvcodec.backend import Backend, check_name, display_url, open_backend
from kvcodec.cli.output import NoSuchPage
from kvcodec.cli.pages import MAX_PAGE_BYTES, StoredBytes
from kvcodec.errors import BackendError, ConfigError
from kvcodec.identity import object_name

__all__ = [
    "ObjectTooLarge",
    "PageReader",
    "check_namespace",
    "named_namespaces",
    "names_of_key",
    "opened",
    "read_key",
]

_LOOKUP_BATCH = 64


@contextmanager
def opened(url: str, *, create: bool = False) -> Iterator[Backend]:
    """The store of a URL, closed afterwards. Raises `ConfigError` for a URL that names none.

    A command that only looks must not make an empty store out of a typing error: see `create`.
    """
    backend = open_backend(url, create=create)
    try:
        yield backend
    finally:
        backend.close()


def check_namespace(digest: str) -> str:
    """A namespace digest as it stands in object names, or empty for all. Raises `ConfigError`."""
    if digest and (len(digest) != 32 or set(digest) - set("0123456789abcdef")):
        raise ConfigError(f"namespace {digest[:120]!r} is not 32 hex digits in lower case")
    return digest


def named_namespaces(backend: Backend) -> list[str]:
    """The digests of all namespaces that have a page in the store; lists the whole store."""
    return sorted({info.name.partition("/")[0] for info in backend.list()})


class ObjectTooLarge(BackendError):
    """An object that is longer than any page."""

    label = "too_large"


class PageReader:
    """Reads whole objects, one at a time, into a buffer that grows to the largest of them."""

    def __init__(self, backend: Backend, timeout_seconds: float) -> None:
        self._backend = backend
        self._timeout = timeout_seconds
        self._buffer = bytearray()

    def read(self, name: str, stored_bytes: int) -> memoryview | None:
        """An object that had `stored_bytes` a moment ago; None if it has gone.

        The memory is used again for the next one. Raises `BackendError`.
        """
        size = stored_bytes
        while True:
            if size > MAX_PAGE_BYTES:
                raise ObjectTooLarge(
                    f"{name} has {size} bytes, more than {MAX_PAGE_BYTES} are not read"
                )
            if len(self._buffer) < size:
                self._buffer = bytearray(size)
            view = memoryview(self._buffer)
            (answer,) = self._backend.get_into([name], [view], timeout_seconds=self._timeout)
            if isinstance(answer, BackendError):
                raise answer
            if answer is None:
                return None
            if answer <= len(view):
                return view[:answer]
            size = answer  # replaced by a longer one since it was measured


def names_of_key(key: str, namespaces: Callable[[], Sequence[str]]) -> list[str]:
    """The names that a page of this key can have.

    `key` is an object name, or an engine's key, which has one name in each of the `namespaces`:
    digests, asked for only then, because to know them may take a listing of the whole store.
    """
    try:
        return [check_name(key)]
    except ConfigError:
        return [object_name(bytes.fromhex(digest), key) for digest in namespaces()]


def read_key(url: str, key: str, namespace: str, timeout_seconds: float) -> list[StoredBytes]:
    """The pages of a key: one for each namespace that has it; every rank and pool has its own.

    `key` is an object name or an engine's key; `namespace` restricts the search for the latter to
    one digest. Raises `NoSuchPage` if there is none.
    """
    check_namespace(namespace)
    with opened(url) as backend:
        names = names_of_key(key, lambda: [namespace] if namespace else named_namespaces(backend))
        found = [
            name for batch in _batches(names) for name in _present(backend, batch, timeout_seconds)
        ]
        pages = [page for name in found if (page := _read_object(backend, name, timeout_seconds))]
    if not pages:
        raise NoSuchPage(
            f"{display_url(url)} has no page of the key {key!r} in {len(names)} namespace(s)"
        )
    return pages


def _batches(names: list[str]) -> Iterable[list[str]]:
    return (names[at : at + _LOOKUP_BATCH] for at in range(0, len(names), _LOOKUP_BATCH))


def _present(backend: Backend, names: list[str], timeout_seconds: float) -> list[str]:
    answers = backend.exists(names, timeout_seconds=timeout_seconds)
    return [name for name, there in zip(names, answers, strict=True) if there]


def _read_object(backend: Backend, name: str, timeout_seconds: float) -> StoredBytes | None:
    """The object, or None if it has gone meanwhile. Raises `BackendError`."""
    info = backend.stat(name, timeout_seconds=timeout_seconds)
    if info is None:
        return None
    data = PageReader(backend, timeout_seconds).read(name, info.stored_bytes)
    return None if data is None else StoredBytes(name, data, name, info.modified_seconds)
