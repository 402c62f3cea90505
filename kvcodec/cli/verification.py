"""What ``kvcodec verify`` does: read every page of a store and check every byte of it."""

from __future__ import annotations

import itertools
import queue
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvcodec.backend import Backend, check_name
from kvcodec.cli.output import ExitCode, Json
from kvcodec.cli.pages import MAX_PAGE_BYTES, expected_name_error
from kvcodec.errors import BackendError, ConfigError, KVCodecError, PageError, UnsupportedPage
from kvcodec.format import EncodedPage

__all__ = ["BadPage", "Listing", "Verification", "Verifier"]

_NAME_BYTES = 48


@dataclass(frozen=True, slots=True)
class BadPage:
    """An object that is not a sound page, and why."""

    name: str
    reason: str
    message: str
    stored_bytes: int


class Listing:
    """The names and sizes of a store's objects, in 56 bytes each."""

    def __init__(self) -> None:
        self._names = bytearray()
        self._sizes = array("Q")
        self.stored_bytes = 0

    def add(self, name: str, stored_bytes: int) -> None:
        """Note one object. Raises `BackendError` if the store made up its name."""
        try:
            check_name(name)
        except ConfigError as error:
            raise BackendError(f"the store lists an object it cannot have: {error}") from error
        self._names += bytes.fromhex(name.replace("/", ""))
        self._sizes.append(stored_bytes)
        self.stored_bytes += stored_bytes

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for index, size in enumerate(self._sizes):
            digits = self._names[index * _NAME_BYTES : (index + 1) * _NAME_BYTES].hex()
            yield f"{digits[:32]}/{digits[32:]}", size


@dataclass(slots=True)
class Verification:
    """What was found so far."""

    sound: int = 0
    bytes_read: int = 0
    gone: int = 0
    deleted: int = 0
    bad: list[BadPage] = field(default_factory=list)
    unsupported: list[BadPage] = field(default_factory=list)
    unread: list[BadPage] = field(default_factory=list)

    @property
    def checked(self) -> int:
        """Pages that were read and judged."""
        return self.sound + len(self.bad) + len(self.unsupported)

    @property
    def reasons(self) -> dict[str, int]:
        """Pages by reason, for all that are not sound."""
        found = Counter(page.reason for page in (*self.bad, *self.unsupported, *self.unread))
        return dict(found.most_common())

    @property
    def exit_code(self) -> ExitCode:
        """Damage first, then what could not be read, then what is not understood."""
        if self.bad:
            return ExitCode.BAD_PAGE
        if self.unread:
            return ExitCode.FAILED
        return ExitCode.UNSUPPORTED if self.unsupported else ExitCode.OK

    def as_json(self) -> dict[str, Json]:
        """The counts, and every page that is not sound."""
        return {
            "checked": self.checked,
            "sound": self.sound,
            "bad": len(self.bad),
            "unsupported": len(self.unsupported),
            "unread": len(self.unread),
            "gone": self.gone,
            "deleted": self.deleted,
            "bytes_read": self.bytes_read,
            "reasons": self.reasons,
            "pages": [
                {
                    "name": page.name,
                    "reason": page.reason,
                    "message": page.message,
                    "stored_bytes": page.stored_bytes,
                }
                for page in (*self.bad, *self.unsupported, *self.unread)
            ],
        }


class Verifier:
    """Checks the pages of a listing on a few threads; the checksums run without the GIL."""

    def __init__(
        self, backend: Backend, *, threads: int, timeout_seconds: float, delete_bad: bool
    ) -> None:
        self._backend = backend
        self._threads = threads
        self._timeout = timeout_seconds
        self._delete_bad = delete_bad
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self.result = Verification()

    def run(self, listing: Listing, progress: Callable[[int], None]) -> Verification:
        """Check every page; `progress` hears of each one's stored bytes, from any thread."""
        tasks: queue.Queue[tuple[str, int] | None] = queue.Queue(4 * self._threads)
        endings: list[KVCodecError | None] = []
        threads = [
            threading.Thread(target=self._work, args=(tasks, progress, endings), daemon=True)
            for _ in range(self._threads)
        ]
        for thread in threads:
            thread.start()
        try:
            for task in itertools.chain(listing, [None] * len(threads)):
                if not _handed_over(tasks, task, threads):
                    break
            for thread in threads:
                thread.join()
        finally:
            self._stopped.set()
        for error in endings:
            if error is not None:
                raise error
        if len(endings) != len(threads):
            raise BackendError("the backend raised what it should have answered; see above")
        return self.result

    def _work(
        self,
        tasks: queue.Queue[tuple[str, int] | None],
        progress: Callable[[int], None],
        endings: list[KVCodecError | None],
    ) -> None:
        buffer = bytearray()
        ending: KVCodecError | None = None
        while (task := tasks.get()) is not None:
            if self._stopped.is_set():
                continue
            name, stored_bytes = task
            try:
                buffer = self._check(name, stored_bytes, buffer)
            except KVCodecError as error:
                ending = error
                self._stopped.set()
            progress(stored_bytes)
        endings.append(ending)

    def _check(self, name: str, stored_bytes: int, buffer: bytearray) -> bytearray:
        """Read one page and note what it is. Returns the buffer for the next one."""
        size = stored_bytes
        while True:
            if size > MAX_PAGE_BYTES:
                self._note_unread(name, "store:too_large", f"{size} bytes", size)
                return buffer
            if len(buffer) < size:
                buffer = bytearray(size)
            view = memoryview(buffer)
            (answer,) = self._backend.get_into([name], [view], timeout_seconds=self._timeout)
            if not isinstance(answer, int):
                break
            if answer <= len(buffer):
                self._judge(name, view[:answer])
                return buffer
            size = answer  # replaced by a longer one since it was listed
        if answer is None:
            with self._lock:
                self.result.gone += 1
        else:
            kind = type(answer).__name__
            self._note_unread(name, f"store:{kind}", str(answer), stored_bytes)
        return buffer

    def _note_unread(self, name: str, reason: str, message: str, stored_bytes: int) -> None:
        with self._lock:
            self.result.unread.append(BadPage(name, reason, message, stored_bytes))

    def _judge(self, name: str, data: memoryview) -> None:
        error = _fault(name, data)
        with self._lock:
            self.result.bytes_read += len(data)
            if error is None:
                self.result.sound += 1
                return
            page = BadPage(name, error.reason, str(error), len(data))
            if isinstance(error, UnsupportedPage):
                self.result.unsupported.append(page)
                return
            self.result.bad.append(page)
        if self._delete_bad:
            (gone,) = self._backend.delete([name], timeout_seconds=self._timeout)
            with self._lock:
                self.result.deleted += gone


def _handed_over(
    tasks: queue.Queue[tuple[str, int] | None],
    task: tuple[str, int] | None,
    threads: Sequence[threading.Thread],
) -> bool:
    """Whether some thread lives to take the task."""
    while any(thread.is_alive() for thread in threads):
        try:
            tasks.put(task, timeout=0.5)
        except queue.Full:
            continue
        return True
    return False


def _fault(name: str, data: memoryview) -> PageError | None:
    """Why these bytes are not the page of that name."""
    try:
        page = EncodedPage.parse(data)
        page.verify()
    except PageError as error:
        return error
    return expected_name_error(page, name)
