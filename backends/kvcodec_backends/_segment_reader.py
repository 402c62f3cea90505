"""Reading batches of objects: what lies side by side with one system call."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from kvcodec.backend import Deadline, GetResult
from kvcodec_backends._file_io import as_backend_error
from kvcodec_backends._segment_index import Location
from kvcodec_backends._segment_io import Bytes, as_bytes
from kvcodec_backends._segment_records import DEAD, raw_name, record_bytes
from kvcodec_backends._segment_store import SegmentStore

__all__ = ["read_objects"]

_RUN_BYTES = 8 << 20

#: Place in the batch, where the object lies, and the memory of just its length to read it into.
_Wanted = tuple[int, Location, Bytes]


def read_objects(
    store: SegmentStore, pairs: Sequence[tuple[str, memoryview]], deadline: Deadline
) -> list[GetResult]:
    """Read objects whole or not at all; an answer for each."""
    results: list[GetResult] = [None] * len(pairs)
    raw = [raw_name(name) for name, _ in pairs]
    pending = list(range(len(pairs)))
    # What was replaced or evicted during its read is looked up again. That ends: an object that
    # is still where it could not be read is forgotten.
    while pending:
        if deadline.passed():
            for place in pending:
                results[place] = deadline.error("get", pairs[place][0])
            break
        try:
            store.refresh()
        except OSError as error:
            for place in pending:
                results[place] = as_backend_error(error, "get", pairs[place][0], writing=False)
            break
        wanted: list[_Wanted] = []
        for place, location in zip(
            pending, store.index.find([raw[place] for place in pending]), strict=True
        ):
            buffer = pairs[place][1]
            if location is None:
                results[place] = None
            elif location.stored_bytes > len(buffer):
                results[place] = location.stored_bytes
            else:
                target = as_bytes(buffer)[: location.stored_bytes]
                wanted.append((place, location, target))
        pending = []
        for run in _runs(wanted):
            for place, location, answer in _read_run(store, run, pairs, deadline):
                if answer is None:
                    store.index.remove(raw[place], location)
                    pending.append(place)
                else:
                    results[place] = answer
    return results


def _runs(wanted: list[_Wanted]) -> Iterator[list[_Wanted]]:
    """Objects that lie side by side."""
    wanted.sort(key=lambda item: (item[1].segment.number, item[1].offset))
    run: list[_Wanted] = []
    end, run_bytes = -1, 0
    for item in wanted:
        location = item[1]
        if run and (
            location.offset != end
            or location.segment is not run[0][1].segment
            or run_bytes >= _RUN_BYTES
        ):
            yield run
            run, run_bytes = [], 0
        run.append(item)
        end = location.offset + record_bytes(location.stored_bytes)
        run_bytes += location.stored_bytes
    if run:
        yield run


def _read_run(
    store: SegmentStore,
    run: list[_Wanted],
    pairs: Sequence[tuple[str, memoryview]],
    deadline: Deadline,
) -> list[tuple[int, Location, GetResult]]:
    """Read neighbours; the answer is None for what is not there any more."""
    first = run[0][1]
    if deadline.passed():
        return [
            (place, location, deadline.error("get", pairs[place][0])) for place, location, _ in run
        ]
    try:
        with store.io.open(first.segment.path, os.O_RDONLY) as fd:
            records = store.io.read(fd, first.offset, [target for _, _, target in run])
    except FileNotFoundError:
        return [(place, location, None) for place, location, _ in run]
    except OSError as error:
        if len(run) > 1:
            # One bad block must not make its neighbours unreadable.
            return [answer for item in run for answer in _read_run(store, [item], pairs, deadline)]
        place, location, _ = run[0]
        return [(place, location, as_backend_error(error, "get", pairs[place][0], writing=False))]
    answers: list[tuple[int, Location, GetResult]] = []
    for (place, location, _), record in zip(run, records, strict=True):
        is_whole = location.is_at(record, raw_name(pairs[place][0]))
        is_dead = record is not None and record.state == DEAD
        if not (is_whole or is_dead) and os.path.exists(location.segment.path):
            store.count("damaged_objects", 1)
        answers.append((place, location, location.stored_bytes if is_whole else None))
    return answers
