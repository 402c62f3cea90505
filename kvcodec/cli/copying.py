"""What ``kvcodec copy`` does: bring the pages of one store into another, each verified first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvcodec.backend import Backend, ObjectInfo
from kvcodec.cli.crew import Pace
from kvcodec.cli.listing import Listing, listed_objects
from kvcodec.cli.output import Json
from kvcodec.cli.pages import fault_of
from kvcodec.cli.stores import PageReader
from kvcodec.cli.verification import Findings, PageWork
from kvcodec.errors import BackendError

__all__ = ["Copier", "Copying", "missing_from"]


@dataclass(slots=True)
class Copying(Findings):
    """What became of the pages so far."""

    copied: int = 0
    copied_bytes: int = 0
    skipped: int = 0
    skipped_bytes: int = 0
    gone: int = 0
    unasked: int = 0

    @property
    def handled(self) -> int:
        """Pages of which it is known what became of them."""
        return self.copied + self.skipped + self.gone + len(self.faulty)

    def as_json(self) -> dict[str, Json]:
        """The counts, and every page that was not copied."""
        return {
            "copied": self.copied,
            "copied_bytes": self.copied_bytes,
            "skipped": self.skipped,
            "skipped_bytes": self.skipped_bytes,
            "gone": self.gone,
            "unwritten": len(self.unwritten),
            "unasked": self.unasked,
        } | self.faults_json()


def missing_from(
    target: Backend, source: Listing, namespace: str, *, of_any_size: bool = False
) -> Listing | None:
    """The objects of `source`, which is in order of names, that the target lacks, or has in another
    size unless any will do. None if the target cannot be listed.
    """
    there = [False] * len(source)
    try:
        for info in listed_objects(target, namespace):
            index = source.place_of(info.name)
            if index < len(source) and source[index].name == info.name:
                there[index] = of_any_size or source[index].stored_bytes == info.stored_bytes
    except BackendError:
        return None
    return Listing.of(info for info, is_there in zip(source, there, strict=True) if not is_there)


class Copier(PageWork[ObjectInfo, Copying]):
    """Copies pages on a few threads. What the target refuses is reported and holds nothing up."""

    def __init__(
        self,
        source: Backend,
        target: Backend,
        *,
        threads: int,
        timeout_seconds: float,
        verify: bool,
        ask_target: bool,
        pace: Pace,
    ) -> None:
        """With `ask_target` the target is asked for each page whether it has it already."""
        super().__init__(threads, Copying())
        self._source = source
        self._target = target
        self._timeout = timeout_seconds
        self._verify = verify
        self._ask_target = ask_target
        self._pace = pace

    def run(self, objects: Listing, heard: Callable[[ObjectInfo], None]) -> Copying:
        """Copy these pages; `heard` is told of each one, from any thread."""

        def worker() -> Callable[[ObjectInfo], None]:
            reader = PageReader(self._source, self._timeout)

            def copy(info: ObjectInfo) -> None:
                self._copy(reader, info)
                heard(info)

            return copy

        self._crew.run(self._pace.paced(objects), worker)
        return self.result

    def _copy(self, reader: PageReader, info: ObjectInfo) -> None:
        if self._ask_target and self._is_there(info):
            with self._lock:
                self.result.skipped += 1
                self.result.skipped_bytes += info.stored_bytes
            return
        try:
            data = reader.read(info.name, info.stored_bytes)
        except BackendError as error:
            self._note_failure("source", info, error)
            return
        fault = fault_of(info.name, data) if self._verify and data is not None else None
        if data is None or fault is not None:
            with self._lock:
                self.result.failures_in_a_row = 0
                if fault is not None:
                    self.result.note(info.name, fault, info.stored_bytes)
                else:
                    self.result.gone += 1
            return
        (failure,) = self._target.put([info.name], [data], timeout_seconds=self._timeout)
        if failure is not None:
            self._note_failure("target", info, failure, is_write=True)
            return
        with self._lock:
            self.result.failures_in_a_row = 0
            self.result.copied += 1
            self.result.copied_bytes += len(data)

    def _is_there(self, info: ObjectInfo) -> bool:
        try:
            found = self._target.stat(info.name, timeout_seconds=self._timeout)
        except BackendError:
            return False  # the put will say what is wrong
        return found is not None and found.stored_bytes == info.stored_bytes
