"""What ``kvcodec scrub`` does: verify a store page by page, in the order of names, so that it can
go on tomorrow where it stopped today.
"""

from __future__ import annotations

import heapq
import json
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace

from kvcodec.backend import ObjectInfo, check_name
from kvcodec.cli.crew import Pace
from kvcodec.cli.disposal import write_whole
from kvcodec.cli.listing import Listing
from kvcodec.errors import ConfigError

__all__ = ["Position", "Scrub", "ScrubState", "parse_seconds"]

_VERSION = 1
_SAVE_SECONDS = 5.0
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)\s*(ms|[smhdw]?)")
_UNIT_SECONDS = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_seconds(name: str, text: str) -> float:
    """``"7d"``, ``"90m"``, ``"3600"`` in seconds. Raises `ConfigError`."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{name} is {text!r}, wanted a time such as 90s, 15m, 12h, 7d or 2w")
    return float(match.group(1)) * _UNIT_SECONDS[match.group(2)]


@dataclass(frozen=True, slots=True)
class ScrubState:
    """How far a pass over a store has come."""

    url: str
    namespace: str
    #: The last name that is done with, empty at the begin of a pass.
    after: str = ""
    pass_started_seconds: float = 0.0
    #: When the last pass came to its end; 0 if none did yet.
    pass_finished_seconds: float = 0.0

    @classmethod
    def read(cls, path: str, url: str, namespace: str) -> ScrubState:
        """The state of a file; a new one if there is no such file.

        Raises `ConfigError` for a file that is none, or one of another store.
        """
        try:
            with open(path, encoding="utf-8") as file:
                document = json.load(file)
            state = cls._parsed(document)
        except FileNotFoundError:
            return cls(url, namespace)
        except OSError as error:
            raise ConfigError(f"--state {path!r} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"--state {path!r} is no state of a scrub ({error}); delete it to begin anew"
            ) from error
        if (state.url, state.namespace) != (url, namespace):
            of = f" --namespace {state.namespace}" if state.namespace else ""
            raise ConfigError(f"--state {path!r} is of the scrub of {state.url}{of}")
        return state

    @classmethod
    def _parsed(cls, document: dict[str, object]) -> ScrubState:
        if document.pop("version") != _VERSION:
            raise ValueError("of another version")
        state = cls(**document)  # type: ignore[arg-type]
        for each in fields(cls):
            wanted = {"str": str, "int": int, "float": int | float}[str(each.type)]
            if not isinstance(getattr(state, each.name), wanted):
                raise TypeError(f"{each.name} is {getattr(state, each.name)!r}")
        if state.after:
            check_name(state.after)
        return state

    def write(self, path: str) -> None:
        """Replace the file as a whole. Raises `ConfigError` where that cannot be."""
        text = json.dumps({"version": _VERSION, **asdict(self)}, indent=2) + "\n"
        try:
            write_whole(path, text.encode())
        except OSError as error:
            raise ConfigError(f"--state {path!r} cannot be written: {error.strerror}") from error


class Position:
    """The place up to which everything is done with, while threads finish out of order.

    Pages that the store did not answer for are only passed when a later one was answered: what a
    store that went away left unread is read by the next run. The caller holds a lock.
    """

    def __init__(self) -> None:
        self.done_count = 0  #: objects from the first on that need not be looked at again
        self._next = 0
        self._finished: list[tuple[int, bool]] = []

    def finish(self, index: int, answered: bool) -> None:
        """One object is done with."""
        heapq.heappush(self._finished, (index, answered))
        while self._finished and self._finished[0][0] == self._next:
            _, its_answer = heapq.heappop(self._finished)
            self._next += 1
            if its_answer:
                self.done_count = self._next


class Scrub:
    """One run over the part of a listing that is left, within a time."""

    def __init__(
        self,
        listing: Listing,
        state: ScrubState,
        path: str,
        *,
        bytes_per_second: int | None,
        max_seconds: float | None,
    ) -> None:
        """`listing` is in ascending order of names; `path` is empty to keep no state."""
        start = listing.place_of(state.after) if state.after else 0
        start += start < len(listing) and listing[start].name == state.after
        self._listing = listing
        self._start = start
        self._state = state if state.after else replace(state, pass_started_seconds=time.time())
        self._path = path
        self._pace = Pace(bytes_per_second)
        self._stop_at = float("inf") if max_seconds is None else time.monotonic() + max_seconds
        self._position = Position()
        self._lock = threading.Lock()
        self._saved_at = time.monotonic()

    @property
    def remaining(self) -> int:
        """Pages that are not done with yet."""
        return len(self._listing) - self._start - self._position.done_count

    @property
    def remaining_bytes(self) -> int:
        """Bytes of the pages from the place where this run begins."""
        return int(self._listing.sizes()[self._start :].sum())

    def objects(self) -> Iterator[ObjectInfo]:
        """What is to be checked, until the time is over."""
        for index in range(self._start, len(self._listing)):
            info = self._listing[index]
            self._pace.wait(info.stored_bytes, self._stop_at - time.monotonic())
            if time.monotonic() >= self._stop_at:
                return
            yield info

    def finish(self, index: int, answered: bool) -> None:
        """One page is done with; from any thread. The state is written now and then."""
        with self._lock:
            self._position.finish(index, answered)
            if self._path and time.monotonic() - self._saved_at > _SAVE_SECONDS:
                self._saved_at = time.monotonic()
                self.state().write(self._path)

    def state(self) -> ScrubState:
        """Where a next run has to begin: after the last page, at the front again."""
        old = self._state
        if not self.remaining:
            finished = time.time()
            return ScrubState(old.url, old.namespace, pass_finished_seconds=finished)
        done = self._start + self._position.done_count
        return replace(old, after=self._listing[done - 1].name if done else "")

    def save(self) -> None:
        """Write the state, if one is kept."""
        if self._path:
            with self._lock:
                self.state().write(self._path)
