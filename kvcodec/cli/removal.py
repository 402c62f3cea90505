"""What ``kvcodec rm`` and ``kvcodec gc`` do: choose pages, and delete exactly those."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from kvcodec.backend import Backend, ObjectInfo
from kvcodec.cli.listing import Listing
from kvcodec.cli.output import ExitCode, Json
from kvcodec.errors import BackendError

__all__ = ["MOST_FAILURES_IN_A_ROW", "Choice", "Removal", "chosen", "remove"]

#: After so many failures in a row the store is asked no more: each may cost two time-outs.
MOST_FAILURES_IN_A_ROW = 10

_BATCH = 64


@dataclass(frozen=True, slots=True)
class Choice:
    """The pages that one rule condemns."""

    reason: str
    listing: Listing


def chosen(
    listing: Listing,
    *,
    keep_namespaces: Sequence[str] = (),
    written_before_seconds: float | None = None,
    max_bytes: int | None = None,
) -> list[Choice]:
    """What a garbage collection deletes, rule by rule; within a rule, the oldest first.

    First all namespaces that are not kept, if any are named; of the rest, what was written before a
    moment; of the rest, the oldest pages until no more than `max_bytes` are left.
    """
    times, sizes = listing.times(), listing.sizes()
    order = np.argsort(times, kind="stable")
    left = np.ones(len(listing), np.bool_)
    choices = []

    def condemn(reason: str, condemned: npt.NDArray[np.bool_]) -> None:
        victims = order[(left & condemned)[order]]
        left[victims] = False
        choices.append(Choice(reason, listing.taken(victims)))

    if keep_namespaces:
        kept = np.zeros(len(listing), np.bool_)
        for digest in keep_namespaces:
            kept |= listing.in_namespace(digest)
        condemn("namespace", ~kept)
    if written_before_seconds is not None:
        condemn("age", times < written_before_seconds)
    if max_bytes is not None:
        # Newest first, as long as they fit together.
        newest = order[::-1][left[order[::-1]]]
        fit = int(np.searchsorted(np.cumsum(sizes[newest]), max_bytes, side="right"))
        over = np.zeros(len(listing), np.bool_)
        over[newest[fit:]] = True
        condemn("size", over)
    return choices


@dataclass(slots=True)
class Removal:
    """What became of the pages that were to be deleted."""

    deleted: int = 0
    deleted_bytes: int = 0
    gone: int = 0
    unasked: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    failures_in_a_row: int = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether the store has to be taken for away."""
        return self.failures_in_a_row >= MOST_FAILURES_IN_A_ROW

    @property
    def exit_code(self) -> ExitCode:
        """Whether everything that was to go has gone."""
        return ExitCode.FAILED if self.failures else ExitCode.OK

    def as_json(self) -> dict[str, Json]:
        """The counts, and the pages that are still there."""
        return {
            "deleted": self.deleted,
            "deleted_bytes": self.deleted_bytes,
            "gone": self.gone,
            "failed": len(self.failures),
            "unasked": self.unasked,
            "failures": [{"name": name, "message": text} for name, text in self.failures],
        }


def remove(
    backend: Backend,
    objects: Iterable[ObjectInfo],
    *,
    timeout_seconds: float,
    heard: Callable[[int, Removal], None],
) -> Removal:
    """Delete objects in their order; `heard` is told of the bytes of each batch.

    Counted is what the store confirmed. An object that it did not delete is looked for, to tell one
    that was gone already from one that could not be deleted.
    """
    result = Removal()
    rest = iter(objects)
    while batch := list(islice(rest, _BATCH)):
        if result.is_hopeless:
            result.unasked += len(batch)
            continue
        names = [info.name for info in batch]
        answers = backend.delete(names, timeout_seconds=timeout_seconds)
        for info, is_gone in zip(batch, answers, strict=True):
            if is_gone:
                result.deleted += 1
                result.deleted_bytes += info.stored_bytes
                result.failures_in_a_row = 0
            elif result.is_hopeless:
                result.unasked += 1
            else:
                _look_for(backend, info, timeout_seconds, result)
        heard(sum(info.stored_bytes for info in batch), result)
    return result


def _look_for(backend: Backend, info: ObjectInfo, timeout_seconds: float, result: Removal) -> None:
    try:
        there = backend.stat(info.name, timeout_seconds=timeout_seconds)
        why = "the store did not delete it"
    except BackendError as error:
        there, why = info, str(error)
    if there is None:
        result.gone += 1
        result.failures_in_a_row = 0
    else:
        result.failures.append((info.name, why))
        result.failures_in_a_row += 1
