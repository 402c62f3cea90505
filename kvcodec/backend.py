"""Where encoded pages live: the contract every store fulfils, and the registry of URL schemes.

A backend moves opaque bytes whole. It knows no layout and no codec, and it never interprets an
object. Names are ``<32 hex digits>/<64 hex digits>`` (namespace digest, object digest; see
FORMAT.md 2.5), so they are safe in any store. Backends register through the entry-point group
``kvcodec.backends``: the entry's name is the URL scheme, or the part of it before a ``+``
(``fsspec`` serves ``fsspec+s3://``), and its value is a class with ``from_url``.
"""

from __future__ import annotations

import abc
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import entry_points
from urllib.parse import SplitResult, unquote, urlsplit

from kvcodec.errors import BackendError, BackendTimeout, ConfigError

__all__ = [
    "Backend",
    "Deadline",
    "GetResult",
    "ObjectInfo",
    "PutResult",
    "check_name",
    "check_number",
    "checked_buffers",
    "checked_names",
    "checked_objects",
    "closed_error",
    "display_url",
    "open_backend",
    "parse_byte_count",
    "parse_options",
]

_NAME = re.compile(r"[0-9a-f]{32}/[0-9a-f]{64}")
_SECRET_OPTION = re.compile(r"(?i)(pass|secret|token|key|credential|sas|auth|json)")
_BYTE_COUNT = re.compile(r"(\d{1,18})\s*(?:([kmgt])(i?)b?|b)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object: name, length, and when it was written (seconds since the epoch)."""

    name: str
    stored_bytes: int
    modified_seconds: float


#: Per object: None when it is stored, else why not.
PutResult = BackendError | None
#: Per object: its length in bytes, None when there is no such object, or why it could not be read.
#: A length above that of the buffer means nothing usable was read.
GetResult = int | None | BackendError


class Backend(abc.ABC):
    """A store of whole objects. Every method is thread-safe and takes a batch; results come per
    object.

    `timeout_seconds` bounds the whole call as far as the operating system lets it; objects not
    reached in time answer with `BackendTimeout`, and with 0 nothing is tried. A batch with a broken
    argument raises `ConfigError` before anything is done; a failing store answers.
    """

    #: How many objects one call should carry for good throughput; callers split their batches
    #: accordingly.
    batch_size: int = 4

    @classmethod
    @abc.abstractmethod
    def from_url(cls, url: str, *, create: bool = True) -> Backend:
        """Open the store a URL names. Raises `ConfigError` for an unknown option or a store that
        cannot be used.

        A store that does not exist yet is made, unless `create` is false: then it is a
        `ConfigError`, and nothing is written. A server that is away at the moment is no error here:
        it may come back, and until then calls answer `BackendError`.
        """

    @abc.abstractmethod
    def put(
        self, names: Sequence[str], objects: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[PutResult]:
        """Store objects, of one byte at least, in place of what was there. Each becomes visible
        whole or not at all; the last complete writer of a name wins.
        """

    @abc.abstractmethod
    def get_into(
        self, names: Sequence[str], buffers: Sequence[memoryview], *, timeout_seconds: float
    ) -> list[GetResult]:
        """Read objects into the starts of the caller's buffers; the rest of a buffer stays."""

    def lend(self, name: str) -> AbstractContextManager[memoryview] | None:
        """An object that lies in this process's memory, where it lies: a context to enter at once,
        in which nothing changes those bytes. None where `get_into` has to be asked.

        For who would only copy it on; it never blocks.
        """
        del name
        return None

    @abc.abstractmethod
    def exists(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Whether each object is there; an unanswered question is a no."""

    def exists_prefix(self, names: Sequence[str], *, timeout_seconds: float) -> int:
        """How many objects from the first on are there without a gap; an unanswered question is a
        gap. A store that can stop at the gap, or count by itself, overrides this.
        """
        found = self.exists(names, timeout_seconds=timeout_seconds)
        return found.index(False) if False in found else len(found)

    @abc.abstractmethod
    def delete(self, names: Sequence[str], *, timeout_seconds: float) -> list[bool]:
        """Remove objects; True where one was there and is gone now."""

    @abc.abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All complete objects whose name starts with `prefix` (a namespace digest or empty), in
        any order.
        """

    @abc.abstractmethod
    def stat(self, name: str, *, timeout_seconds: float) -> ObjectInfo | None:
        """One object's description, None when there is no such object. Raises `BackendError` if the
        store fails.
        """

    def staging_memory(self, size: int) -> memoryview | None:
        """Writable memory of `size` bytes between which and the store objects move fastest: shared
        with a server, registered with a network card. None where any memory will do.

        It is freed when the last reference to it is gone.
        """
        del size
        return None

    def is_idle(self, memory: memoryview) -> bool:
        """Whether nobody but the caller can write to this staging memory any more. A call that gave
        up at its deadline may leave a server behind that is still writing.
        """
        del memory
        return True

    @property
    def origin(self) -> Backend:
        """The store itself, behind whatever keeps copies in front of it: who wants to know whether
        it is well asks this one. It is closed with the one in front.
        """
        return self

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of files and connections. Afterwards nothing exists, reads and writes answer
        `BackendError`, `list` and `stat` raise it. Closing twice is fine.
        """

    @abc.abstractmethod
    def counters(self) -> Mapping[str, int]:
        """Monotonic counts of what happened inside (evicted objects, swept orphans ...); never
        blocks.
        """

    def gauges(self) -> Mapping[str, int]:
        """Numbers of now, as far as they are known without asking anybody; never blocks.

        ``stored_bytes`` are those of the objects, ``limit_bytes`` how many there may be.
        """
        return {}


def check_name(name: str) -> str:
    """The name itself, if it has the one allowed form; `ConfigError` otherwise."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"object name {name[:120]!r} is not <32 hex digits>/<64 hex digits>")
    return name


def check_number(name: str, value: object, whole: bool, low: float, high: float) -> None:
    """`ConfigError` unless the option's value is a number, a whole one if asked, in this range."""
    allowed = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{name} is {value!r}, allowed is {kind} from {low} to {high}")


def parse_byte_count(name: str, text: str) -> int:
    """``"64MiB"``, ``"10GB"``, ``"4096"`` in bytes."""
    match = _BYTE_COUNT.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"{name} is {text!r}, wanted a number of bytes such as 4096, 64MiB or 10GB"
        )
    number, unit, binary = match.groups()
    power = "_kmgt".index(unit.lower()) if unit else 0
    scale: int = (1024 if binary else 1000) ** power
    return int(number) * scale


def parse_options(url: str, allowed: Sequence[str]) -> tuple[SplitResult, dict[str, str]]:
    """Split a store URL; unknown or repeated query options raise `ConfigError`."""
    parts = _split(url)
    options: dict[str, str] = {}
    for option in filter(None, parts.query.split("&")):
        # A "+" stays one: store URLs are no forms of a web page, and some have it in their scheme.
        name, _, value = (unquote(part) for part in option.partition("="))
        if name not in allowed:
            raise ConfigError(
                f"{display_url(url)!r}: unknown option {name!r}, "
                f"known: {', '.join(sorted(allowed)) or 'none'}"
            )
        if name in options:
            raise ConfigError(f"{display_url(url)!r}: option {name!r} is given twice")
        options[name] = value
    return parts, options


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"{display_url(url)!r} is not a URL: {error}") from error


def display_url(url: str) -> str:
    """The URL with its secrets starred out, for messages and logs."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("://")[0] + "://***"  # no telling where a secret may be
    if "://" not in url:
        return url
    user, at, host = parts.netloc.rpartition("@")
    if ":" in user:
        user = user.partition(":")[0] + ":***"
    query = "&".join(map(_display_option, parts.query.split("&")))
    rest = ("?" + query if query else "") + ("#" + parts.fragment if parts.fragment else "")
    return f"{parts.scheme}://{user}{at}{host}{parts.path}{rest}"


def _display_option(option: str) -> str:
    name, equals, value = option.partition("=")
    if _SECRET_OPTION.search(name) and equals:
        return f"{name}=***"
    return f"{name}={display_url(unquote(value))}" if "://" in unquote(value) else option


def open_backend(url: str, *, create: bool = True) -> Backend:
    """Open the store a URL names, through the entry point registered for its scheme.

    `create` as in `Backend.from_url`.
    """
    scheme = _split(url).scheme
    entries = {entry.name: entry for entry in entry_points(group="kvcodec.backends")}
    entry = entries.get(scheme) or entries.get(scheme.partition("+")[0])
    if entry is None:
        known = (
            ", ".join(f"{name}://" for name in sorted(entries)) or "none (is kvcodec installed?)"
        )
        raise ConfigError(f"no backend for the URL {display_url(url)!r}; known schemes: {known}")
    try:
        backend_class = entry.load()
    except ImportError as error:
        raise ConfigError(
            f"the backend for {scheme}:// cannot be loaded: {error}; "
            f"pip install 'kvcodec[{entry.name}]' brings what kvcodec's own backends need"
        ) from error
    backend: Backend = backend_class.from_url(url, create=create)
    return backend


# What every backend asks of its arguments.


class Deadline:
    """The moment a call has to answer by, on the clock that nobody can set."""

    __slots__ = ("_at", "_timeout_seconds")

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._at = time.monotonic() + timeout_seconds

    def passed(self) -> bool:
        """Whether it is too late to start anything."""
        return time.monotonic() >= self._at

    def remaining_seconds(self) -> float:
        """How much time is left for the next step; never negative."""
        return max(0.0, self._at - time.monotonic())

    def error(self, verb: str, name: str) -> BackendTimeout:
        """The answer for an object that was not reached."""
        return BackendTimeout(f"{verb} {name}: not reached within {self._timeout_seconds:g} s")


def checked_names(names: Sequence[str]) -> list[str]:
    """The names, each of the one allowed form; `ConfigError` otherwise."""
    return [check_name(name) for name in names]


def checked_objects(
    names: Sequence[str], objects: Sequence[memoryview]
) -> list[tuple[str, memoryview]]:
    """Names paired with flat views of the bytes to store; `ConfigError` for what cannot be stored.

    An empty object is refused: a page is never empty, while a file of no bytes is what a crash
    leaves behind, and a reader has to be able to tell them apart.
    """
    pairs = _paired(names, objects, "objects")
    for name, view in pairs:
        if not len(view):
            raise ConfigError(f"object {name} is empty; an object has at least one byte")
    return pairs


def checked_buffers(
    names: Sequence[str], buffers: Sequence[memoryview]
) -> list[tuple[str, memoryview]]:
    """Names paired with flat writable views of the buffers to read into."""
    pairs = _paired(names, buffers, "buffers")
    for name, view in pairs:
        if view.readonly:
            raise ConfigError(f"the buffer for {name} is read-only")
    return pairs


def closed_error(url: str) -> BackendError:
    """The answer of a backend that was closed."""
    return BackendError(f"{url} is closed")


def _paired(
    names: Sequence[str], views: Sequence[memoryview], what: str
) -> list[tuple[str, memoryview]]:
    if len(names) != len(views):
        raise ConfigError(f"{len(names)} names for {len(views)} {what}")
    pairs = []
    for name, view in zip(names, views, strict=True):
        check_name(name)
        if not view.c_contiguous:
            raise ConfigError(f"the memory for {name} is not contiguous")
        pairs.append((name, view if view.format == "B" and view.ndim == 1 else view.cast("B")))
    return pairs
