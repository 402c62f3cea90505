"""What ``kvcodec transcode`` does: encode the pages of a store anew, each verified before and
after.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from kvcodec.backend import Backend, ObjectInfo
from kvcodec.cli.crew import Pace
from kvcodec.cli.listing import Listing
from kvcodec.cli.output import Json
from kvcodec.cli.pages import fault_of
from kvcodec.cli.stores import PageReader
from kvcodec.cli.verification import Findings, PageWork
from kvcodec.errors import BackendError, PageError
from kvcodec.format import EncodedPage
from kvcodec.transcoding import Outcome, Transcoder

__all__ = ["StoreTranscoder", "Transcoding"]


@dataclass(slots=True)
class Transcoding(Findings):
    """What became of the pages so far."""

    transcoded: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    #: Pages that stay what they are, by outcome.
    left: Counter[Outcome] = field(default_factory=Counter)
    copied: int = 0
    copied_bytes: int = 0
    present: int = 0
    changed: int = 0
    gone: int = 0
    unasked: int = 0
    unfit_reasons: set[str] = field(default_factory=set)

    @property
    def handled(self) -> int:
        """Pages of which it is known what became of them."""
        done = self.transcoded + self.left.total() + self.present + self.changed + self.gone
        return done + len(self.faulty)

    def as_json(self) -> dict[str, Json]:
        """The counts, and every page that could not be looked at or written."""
        counts: dict[str, Json] = {
            "transcoded": self.transcoded,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "left": {
                outcome.value: self.left[outcome]
                for outcome in Outcome
                if outcome is not Outcome.SMALLER
            },
            "unfit_reasons": sorted(self.unfit_reasons),
            "copied": self.copied,
            "copied_bytes": self.copied_bytes,
            "present": self.present,
            "changed": self.changed,
            "gone": self.gone,
            "unwritten": len(self.unwritten),
            "unasked": self.unasked,
        }
        return counts | self.faults_json()


class StoreTranscoder(PageWork[ObjectInfo, Transcoding]):
    """Transcodes pages on a few threads, in place or into another store.

    In place nothing is written but smaller pages, each as a whole. A page that was replaced or
    deleted since it was read is left to who did so. Another store gets what stays as well.
    """

    def __init__(
        self,
        source: Backend,
        target: Backend | None,
        *,
        threads: int,
        timeout_seconds: float,
        limit: int,
        dry_run: bool,
        read_back: bool,
        ask_target: bool,
        pace: Pace,
        transcoder: Callable[[], Transcoder],
    ) -> None:
        """`transcoder` makes one for each thread. No more than `limit` pages are transcoded, 0 for
        all. `target` is None for in place; with `ask_target` it is asked for each page.
        """
        super().__init__(threads, Transcoding())
        self._source = source
        self._target = target
        self._timeout = timeout_seconds
        self._limit = limit
        self._dry_run = dry_run
        self._read_back = read_back
        self._ask_target = ask_target
        self._pace = pace
        self._transcoder = transcoder
        self._begun = 0

    def run(self, objects: Listing, heard: Callable[[ObjectInfo], None]) -> Transcoding:
        """Transcode these pages; `heard` is told of each one, from any thread."""

        def worker() -> Callable[[ObjectInfo], None]:
            reader = PageReader(self._source, self._timeout)
            again = PageReader(self._target or self._source, self._timeout)
            transcoder = self._transcoder()

            def work(info: ObjectInfo) -> None:
                self._work(reader, again, transcoder, info)
                heard(info)

            return work

        self._crew.run(self._pace.paced(objects), worker)
        return self.result

    def _work(
        self, reader: PageReader, again: PageReader, transcoder: Transcoder, info: ObjectInfo
    ) -> None:
        if self._ask_target and self._is_there(info):
            with self._lock:
                self.result.present += 1
            return
        try:
            data = reader.read(info.name, info.stored_bytes)
        except BackendError as error:
            self._note_failure("source", info, error)
            return
        if data is None:
            with self._lock:
                self.result.failures_in_a_row = 0
                self.result.gone += 1
            return
        try:
            fault = fault_of(info.name, data)
            if fault is not None:
                raise fault
            outcome, found = transcoder.transcode(EncodedPage.parse(data))
            # A mistake of ours must not cost anybody a page.
            fault = None if found is None else fault_of(info.name, found)
            if fault is not None:
                raise fault
        except PageError as error:
            with self._lock:
                self.result.failures_in_a_row = 0
                self.result.note(info.name, error, len(data))
            return
        if found is not None and not self._may_write():
            return
        if self._write(again, info, data, data if found is None else found):
            with self._lock:
                self._count(outcome, data, found, transcoder)

    def _may_write(self) -> bool:
        """Whether one more page may be transcoded."""
        with self._lock:
            if self._limit and self._begun >= self._limit:
                self._crew.stop()
                return False
            self._begun += 1
            return True

    def _write(
        self, again: PageReader, info: ObjectInfo, before: memoryview, after: memoryview
    ) -> bool:
        """Put a page where it belongs, if it is to be put anywhere. Whether that was done, or
        nothing had to be.
        """
        if self._dry_run or (self._target is None and after is before):
            return True
        target = self._target or self._source
        try:
            if self._target is None and not self._is_unchanged(info, before):
                return False
            (failure,) = target.put([info.name], [after], timeout_seconds=self._timeout)
            if failure is not None:
                raise failure
        except BackendError as error:
            where = "source" if self._target is None else "target"
            self._note_failure(where, info, error, is_write=True)
            return False
        return not self._read_back or self._is_sound(again, info, len(after))

    def _is_unchanged(self, info: ObjectInfo, before: memoryview) -> bool:
        """Whether the store still has the page that was read, as far as its size tells: a finer
        page is a longer one. Raises `BackendError`.
        """
        now = self._source.stat(info.name, timeout_seconds=self._timeout)
        with self._lock:
            self.result.gone += now is None
            self.result.changed += now is not None and now.stored_bytes != len(before)
        return now is not None and now.stored_bytes == len(before)

    def _is_sound(self, again: PageReader, info: ObjectInfo, stored_bytes: int) -> bool:
        """Whether what was written comes back. What replaced it meanwhile is as good."""
        try:
            data = again.read(info.name, stored_bytes)
        except BackendError as error:
            self._note_failure("read_back", info, error, is_write=True)
            return False
        fault = None if data is None else fault_of(info.name, data)
        if fault is not None:
            with self._lock:
                self.result.note(info.name, fault, stored_bytes)
        return fault is None

    def _count(
        self,
        outcome: Outcome,
        before: memoryview,
        after: memoryview | None,
        transcoder: Transcoder,
    ) -> None:
        result = self.result
        result.failures_in_a_row = 0
        if after is not None:
            result.transcoded += 1
            result.bytes_before += len(before)
            result.bytes_after += len(after)
            return
        result.left[outcome] += 1
        result.unfit_reasons |= transcoder.reasons
        if self._target is not None and not self._dry_run:
            result.copied += 1
            result.copied_bytes += len(before)

    def _is_there(self, info: ObjectInfo) -> bool:
        assert self._target is not None
        try:
            return self._target.stat(info.name, timeout_seconds=self._timeout) is not None
        except BackendError:
            return False  # the put will say what is wrong
