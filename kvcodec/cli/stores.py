"""Finding pages in a store by their key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from kvcodec.backend import Backend, check_name, open_backend
from kvcodec.cli.output import NoSuchPage
from kvcodec.cli.pages import MAX_PAGE_BYTES, StoredBytes
from kvcodec.errors import BackendError, ConfigError
from kvcodec.identity import object_name

__all__ = ["check_namespace", "named_namespaces", "opened", "read_key"]

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


def read_key(url: str, key: str, namespace: str, timeout_seconds: float) -> list[StoredBytes]:
    """The pages of a key: one for each namespace that has it; every rank and pool has its own.

    `key` is an object name or an engine's key; `namespace` restricts the search for the latter to
    one digest. Raises `NoSuchPage` if there is none.
    """
    with opened(url) as backend:
        try:
            names = [check_name(key)]
        except ConfigError:
            wanted = [check_namespace(namespace)] if namespace else named_namespaces(backend)
            names = [object_name(bytes.fromhex(digest), key) for digest in wanted]
        found = [
            name for batch in _batches(names) for name in _present(backend, batch, timeout_seconds)
        ]
        pages = [page for name in found if (page := _read_object(backend, name, timeout_seconds))]
    if not pages:
        raise NoSuchPage(f"{url} has no page of the key {key!r} in {len(names)} namespace(s)")
    return pages


def _batches(names: list[str]) -> Iterable[list[str]]:
    return (names[at : at + _LOOKUP_BATCH] for at in range(0, len(names), _LOOKUP_BATCH))


def _present(backend: Backend, names: list[str], timeout_seconds: float) -> list[str]:
    answers = backend.exists(names, timeout_seconds=timeout_seconds)
    return [name for name, there in zip(names, answers, strict=True) if there]


def _read_object(backend: Backend, name: str, timeout_seconds: float) -> StoredBytes | None:
    """The object, or None if it has gone meanwhile. Raises `BackendError`."""
    info = backend.stat(name, timeout_seconds=timeout_seconds)
    size = 0 if info is None else info.stored_bytes
    while info is not None:
        if size > MAX_PAGE_BYTES:
            raise BackendError(f"{name} has {size} bytes, more than {MAX_PAGE_BYTES} are not read")
        buffer = memoryview(bytearray(size))
        (answer,) = backend.get_into([name], [buffer], timeout_seconds=timeout_seconds)
        if isinstance(answer, BackendError):
            raise answer
        if answer is None:
            return None
        if answer <= size:
            return StoredBytes(name, buffer[:answer], name, info.modified_seconds)
        size = answer  # replaced by a longer one since it was measured
    return None
