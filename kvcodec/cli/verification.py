"""What ``kvcodec verify`` and ``kvcodec scrub`` do: read pages and check every byte of them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvcodec.backend import Backend, ObjectInfo
from kvcodec.cli.crew import Crew
from kvcodec.cli.disposal import Disposal
from kvcodec.cli.output import ExitCode, Json
from kvcodec.cli.pages import fault_of
from kvcodec.cli.stores import ObjectTooLarge, PageReader
from kvcodec.errors import BackendError, PageError, UnsupportedPage

__all__ = ["MOST_FAILURES_IN_A_ROW", "BadPage", "Findings", "PageWork", "Verification", "Verifier"]

#: A store that is away is asked no more after so many pages: each may cost a time-out.
MOST_FAILURES_IN_A_ROW = 100


@dataclass(frozen=True, slots=True)
class BadPage:
    """An object that is not a sound page, and why."""

    name: str
    reason: str
    message: str
    stored_bytes: int

    @classmethod
    def of_failure(cls, what: str, info: ObjectInfo, error: BackendError) -> BadPage:
        """An object that a store failed on: `what` is ``store``, or another place."""
        label = error.label if isinstance(error, ObjectTooLarge) else type(error).__name__
        return cls(info.name, f"{what}:{label}", str(error), info.stored_bytes)


@dataclass(slots=True)
class Findings:
    """What was wrong with the pages that were looked at. The caller holds its own lock."""

    bad: list[BadPage] = field(default_factory=list)
    unsupported: list[BadPage] = field(default_factory=list)
    unread: list[BadPage] = field(default_factory=list)
    unwritten: list[BadPage] = field(default_factory=list)
    failures_in_a_row: int = 0

    @property
    def faulty(self) -> list[BadPage]:
        """All that are not sound, the damaged ones first."""
        return [*self.bad, *self.unsupported, *self.unread, *self.unwritten]

    @property
    def reasons(self) -> dict[str, int]:
        """Pages by reason, for all that are not sound."""
        return dict(Counter(page.reason for page in self.faulty).most_common())

    @property
    def is_hopeless(self) -> bool:
        """Whether so many calls failed in a row that the store has to be taken for away."""
        return self.failures_in_a_row >= MOST_FAILURES_IN_A_ROW

    @property
    def exit_code(self) -> ExitCode:
        """Damage first, then what the store failed on, then what is not understood."""
        if self.bad:
            return ExitCode.BAD_PAGE
        if self.unread or self.unwritten:
            return ExitCode.FAILED
        return ExitCode.UNSUPPORTED if self.unsupported else ExitCode.OK

    def note(self, name: str, error: PageError, stored_bytes: int) -> None:
        """Note a page that is not what it should be."""
        page = BadPage(name, error.reason, str(error), stored_bytes)
        (self.unsupported if isinstance(error, UnsupportedPage) else self.bad).append(page)

    def note_failure(
        self, what: str, info: ObjectInfo, error: BackendError, *, is_write: bool = False
    ) -> None:
        """Note an object that a store failed on; `what` as in `BadPage.of_failure`."""
        pages = self.unwritten if is_write else self.unread
        pages.append(BadPage.of_failure(what, info, error))
        self.failures_in_a_row += not isinstance(error, ObjectTooLarge)

    def faults_json(self) -> dict[str, Json]:
        """How many pages are not sound, why, and each of them."""
        return {
            "bad": len(self.bad),
            "unsupported": len(self.unsupported),
            "unread": len(self.unread),
            "reasons": self.reasons,
            "pages": [
                {
                    "name": page.name,
                    "reason": page.reason,
                    "message": page.message,
                    "stored_bytes": page.stored_bytes,
                }
                for page in self.faulty
            ],
        }


@dataclass(slots=True)
class Verification(Findings):
    """What was found so far."""

    sound: int = 0
    bytes_read: int = 0
    gone: int = 0
    deleted: int = 0
    unasked: int = 0

    @property
    def checked(self) -> int:
        """Pages that were read and judged."""
        return self.sound + len(self.bad) + len(self.unsupported)

    @property
    def handled(self) -> int:
        """Pages of which it is known what became of them."""
        return self.checked + self.gone + len(self.unread)

    def as_json(self) -> dict[str, Json]:
        """The counts, and every page that is not sound."""
        return {
            "checked": self.checked,
            "sound": self.sound,
            "unasked": self.unasked,
            "gone": self.gone,
            "deleted": self.deleted,
            "bytes_read": self.bytes_read,
        } | self.faults_json()


Task = TypeVar("Task")
Result = TypeVar("Result", bound=Findings)


class PageWork(Generic[Task, Result]):
    """Work on pages that a few threads do, until a store has to be taken for away."""

    def __init__(self, threads: int, result: Result) -> None:
        self._lock = threading.Lock()
        self._crew: Crew[Task] = Crew(threads)
        self.result = result

    def _note_failure(
        self, what: str, info: ObjectInfo, error: BackendError, *, is_write: bool = False
    ) -> None:
        with self._lock:
            self.result.note_failure(what, info, error, is_write=is_write)
            if self.result.is_hopeless:
                self._crew.stop()


class Verifier(PageWork[tuple[int, ObjectInfo], Verification]):
    """Checks pages on a few threads; the checksums run without the GIL.

    Damaged and misplaced pages are handed to `dispose`, unsupported ones never: a newer kvcodec may
    have written them.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        threads: int,
        timeout_seconds: float,
        dispose: Disposal | None = None,
    ) -> None:
        super().__init__(threads, Verification())
        self._backend = backend
        self._timeout = timeout_seconds
        self._dispose = dispose

    def run(
        self,
        objects: Iterable[ObjectInfo],
        heard: Callable[[int, ObjectInfo, bool], None],
    ) -> Verification:
        """Check every page. `heard` is told from any thread: the page's place in the sequence, the
        page, and whether the store answered for it.
        """

        def worker() -> Callable[[tuple[int, ObjectInfo]], None]:
            reader = PageReader(self._backend, self._timeout)

            def check(task: tuple[int, ObjectInfo]) -> None:
                index, info = task
                answered = self._check(reader, info)
                heard(index, info, answered)

            return check

        self._crew.run(enumerate(objects), worker)
        return self.result

    def _check(self, reader: PageReader, info: ObjectInfo) -> bool:
        """Read one page and note what it is. Whether the store answered."""
        result = self.result
        try:
            data = reader.read(info.name, info.stored_bytes)
        except BackendError as error:
            self._note_failure("store", info, error)
            return isinstance(error, ObjectTooLarge)
        fault = None if data is None else fault_of(info.name, data)
        with self._lock:
            result.failures_in_a_row = 0
            if data is None:
                result.gone += 1
                return True
            result.bytes_read += len(data)
            if fault is None:
                result.sound += 1
                return True
            result.note(info.name, fault, len(data))
        if self._dispose is not None and not isinstance(fault, UnsupportedPage):
            gone = self._dispose(info.name, data)
            with self._lock:
                result.deleted += gone
        return True
