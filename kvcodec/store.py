"""PageStore: one namespace of pages, encoded by a spec, kept by a backend.

Every call ends by its deadline and answers per page; what a store or a page does wrong is a
counter, never an exception. Encoding one chunk of a batch overlaps writing another; reading one
overlaps decoding another.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from kvcodec.auto import BatchTimer
from kvcodec.backend import GetResult, PutResult, open_backend
from kvcodec.encoders import Encoders
from kvcodec.errors import ConfigError, PageError
from kvcodec.guard import Attempt
from kvcodec.identity import MAX_KEY_BYTES, Namespace, encode_key
from kvcodec.layout import PageLayout, PageViews
from kvcodec.pipeline import Pipeline, StoreOptions
from kvcodec.plan import PagePlan
from kvcodec.rotary import Rotary
from kvcodec.spec import CodecSpec
from kvcodec.transfer import Chunk, Transfer

__all__ = ["PageStore", "Pipeline", "StoreOptions", "open_store"]

_CHUNK_BYTES = 2 << 20
_MAX_CHUNK_PAGES = 32
_CLEAR_TIMEOUT_SECONDS = 60.0
_REMEMBERED_NAMES = 65536
_ROW_ALIGNMENT = 4096

T = TypeVar("T")


class PageStore:
    """The pages of one namespace on a pipeline. Thread-safe."""

    def __init__(
        self,
        pipeline: Pipeline,
        namespace: Namespace,
        spec: CodecSpec,
        *,
        alternatives: Sequence[CodecSpec] = (),
        protected_spec: CodecSpec | None = None,
        rotary: Rotary | None = None,
    ) -> None:
        """`spec` encodes pages; with `alternatives`, whichever of all these is quickest with this
        store, those named first preferred (`kvcodec.auto`). `protected_spec` encodes the pages that
        a backup marks as protected (default raw). `rotary` tells how the model rotates its keys,
        for codecs that can use it.

        Raises `ConfigError` where a spec cannot be honoured for this layout, or never within the
        byte budget, or a page does not fit the buffers.
        """
        self._pipeline = pipeline
        self.namespace = namespace
        self._rewrite: OrderedDict[str, None] = OrderedDict()
        self._encoders = Encoders(
            pipeline,
            namespace,
            [spec, *alternatives],
            protected_spec=protected_spec,
            rotary=rotary,
        )
        page_bytes = self._encoders.largest_page_bytes(MAX_KEY_BYTES)
        # Rows at memory pages: a disk reads into those, and writes from them, without a copy.
        self._row_bytes = -(-page_bytes // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        if 2 * self._row_bytes > pipeline.options.buffer_bytes:
            raise ConfigError(
                f"buffer_bytes is {pipeline.options.buffer_bytes}; two pages of this layout take "
                f"{2 * self._row_bytes}: raise buffer_bytes or use smaller pages"
            )
        wanted = max(
            pipeline.backend.batch_size,
            min(_CHUNK_BYTES // self.plan().page_bytes, _MAX_CHUNK_PAGES),
        )
        self.chunk_pages = max(
            1, min(wanted, pipeline.options.buffer_bytes // (2 * self._row_bytes))
        )
        self._encoders.measure(self.chunk_pages)

    @property
    def spec(self) -> CodecSpec:
        """The spec that pages are encoded by now."""
        return self._encoders.spec

    @property
    def layout(self) -> PageLayout:
        """The layout of every page here."""
        return self.namespace.layout

    def plan(self, which: str = "plain", key_bytes: int = 64) -> PagePlan:
        """The plan of pages with keys of that length: ``plain``, ``protected`` or ``raw``."""
        return self._encoders.present.plan(which, key_bytes)

    def exists(self, keys: Sequence[str]) -> list[bool]:
        """Whether each page is stored. No answer in time is a no."""
        return self._exists(self._names(keys))

    def exists_prefix(self, keys: Sequence[str]) -> int:
        """How many pages from the first on are stored without a gap. No answer in time is a gap."""
        names, backend = self._names(keys), self._pipeline.backend

        def ask(seconds: float) -> int:
            return backend.exists_prefix(names, timeout_seconds=seconds)

        return min(self._question(ask, lambda count: count > 0, len(names)) or 0, len(names))

    def backup(
        self, keys: Sequence[str], views: PageViews, *, protected: Sequence[bool] | None = None
    ) -> list[bool]:
        """Encode pages and store them; True where the page is stored now.

        Takes at most the time-outs of an exists and of a backup together. A page that is stored
        already is not written again. A page with values outside the codec's domain is stored raw;
        one that does not fit the byte budget is not stored.
        Nothing is read from `views` after this returns.
        """
        names = self._names(keys)
        if not self._pipeline.writes.admits:
            self._count("backup.refused", len(keys))
            return [False] * len(keys)
        results = [
            there and name not in self._rewrite
            for there, name in zip(self._exists(names), names, strict=True)
        ]
        todo = [index for index, stored in enumerate(results) if not stored]
        self._count("backup.present", len(keys) - len(todo))
        marks = (
            ["protected" if mark else "plain" for mark in protected]
            if protected
            else ["plain"] * len(keys)
        )

        encoder, timer = self._encoders.choose(), BatchTimer()

        def encode(chunk: Chunk) -> None:
            data = [encode_key(keys[index]) for index in chunk.indices]
            mark, selected = marks[chunk.indices[0]], views.select(chunk.indices)
            chunk.fill(encoder.encode(mark, data, selected, chunk.rows))
            if mark == "plain":
                self._encoders.note_pages(encoder, chunk.pages)

        def put(chunk: Chunk, seconds: float) -> list[PutResult] | None:
            wanted = [names[index] for index in chunk.indices]
            backend = self._pipeline.backend
            if not wanted:  # nothing fitted the budget
                return []
            with timer.chunk():
                return self._pipeline.guarded(
                    "backup", lambda: backend.put(wanted, chunk.pages, timeout_seconds=seconds)
                )

        attempt = Attempt()

        def settle(chunk: Chunk, answers: list[PutResult] | None) -> None:
            attempt.note(answers)
            for index, page, error in zip(chunk.indices, chunk.pages, answers or [], strict=False):
                results[index] = error is None
                self._count("backup.stored" if error is None else f"backup.{error.label}")
                if error is None:
                    timer.bytes += len(page)
                    self._rewrite.pop(names[index], None)

        transfer: Transfer[list[PutResult]] = self._transfer(
            self._pipeline.options.backup_timeout_seconds
        )
        attempt.silent += transfer.run(
            self._runs(todo, keys, marks),
            prepare=encode,
            work=put,
            settle=settle,
            drop=lambda indices: self._count("backup.dropped", len(indices)),
        )
        self._pipeline.writes.settle(attempt)
        self._encoders.note_write(timer)
        self._count("backup.failed", results.count(False))
        return results

    def prefetch(self, keys: Sequence[str], views: PageViews) -> list[bool]:
        """Read pages, verify them and decode them into `views`; True where the page is there now.

        Nothing is written to `views` after this returns. A page that turns out damaged is removed
        from the store.
        """
        names = self._names(keys)
        results = [False] * len(keys)
        if not self._pipeline.reads.admits:
            self._count("prefetch.refused", len(keys))
            return results
        attempt, timer = Attempt(), BatchTimer()
        deadline = time.monotonic() + self._pipeline.options.prefetch_timeout_seconds

        def get(chunk: Chunk, seconds: float) -> list[GetResult] | None:
            wanted, rows = (
                [names[index] for index in chunk.indices],
                [row.data for row in chunk.rows],
            )
            backend = self._pipeline.backend
            with timer.chunk():
                return self._pipeline.guarded(
                    "prefetch", lambda: backend.get_into(wanted, rows, timeout_seconds=seconds)
                )

        def settle(chunk: Chunk, answers: list[GetResult] | None) -> None:
            attempt.note(answers)
            read = []
            for row, answer in enumerate(answers or []):
                if isinstance(answer, int) and answer <= self._row_bytes:
                    read.append((chunk.indices[row], chunk.rows[row][:answer]))
                elif isinstance(answer, int):
                    # Perhaps a newer writer's page with large extensions: not ours to remove.
                    self._reject(names[chunk.indices[row]], "unsupported:length", heal=False)
                else:
                    self._count("prefetch.miss" if answer is None else f"prefetch.{answer.label}")
            if not read:
                return
            timer.bytes += sum(len(page) for _, page in read)
            indices = [index for index, _ in read]
            errors = self._decode(indices, [page for _, page in read], keys, views, deadline)
            for index, error in zip(indices, errors, strict=True):
                results[index] = error is None
                if error is None:
                    self._count("prefetch.hit")
                else:
                    self._reject(names[index], error.reason, heal=error.kind == "corrupt")

        transfer: Transfer[list[GetResult]] = self._transfer(
            self._pipeline.options.prefetch_timeout_seconds
        )
        attempt.silent += transfer.run(
            self._runs(list(range(len(keys))), keys, ["plain"] * len(keys)),
            prepare=lambda _: None,
            work=get,
            settle=settle,
            drop=lambda indices: self._count("prefetch.dropped", len(indices)),
        )
        self._pipeline.reads.settle(attempt)
        self._encoders.note_read(timer)
        self._count("prefetch.failed", results.count(False))
        return results

    def clear(self) -> int:
        """Delete every page of this namespace, and no other; how many were deleted."""
        backend = self._pipeline.backend

        def delete() -> int:
            names = [info.name for info in backend.list(self.namespace.digest.hex())]
            return sum(backend.delete(names, timeout_seconds=_CLEAR_TIMEOUT_SECONDS))

        self._rewrite.clear()
        guarded = self._pipeline.io.call(
            lambda: self._pipeline.guarded("clear", delete), None, _CLEAR_TIMEOUT_SECONDS
        )
        return guarded or 0

    def _names(self, keys: Sequence[str]) -> list[str]:
        return [self.namespace.object_name(key) for key in keys]

    def _count(self, name: str, amount: int = 1) -> None:
        if amount:
            self._pipeline.counts.add(name, amount)

    def _exists(self, names: list[str]) -> list[bool]:
        backend = self._pipeline.backend

        def ask(seconds: float) -> list[bool]:
            return backend.exists(names, timeout_seconds=seconds)

        answer = self._question(ask, lambda there: True in there, len(names))
        return [False] * len(names) if answer is None else answer

    def _question(
        self, ask: Callable[[float], T], finds: Callable[[T], bool], count: int
    ) -> T | None:
        """What the store answers to a question about so many pages, None if nothing in time."""
        timeout = self._pipeline.options.exists_timeout_seconds
        if not self._pipeline.reads.admits:
            self._count("exists.refused", count)
            return None
        started, attempt = time.monotonic(), Attempt()
        answer = self._pipeline.io.call(
            # A little less than the caller waits, so that a partial answer still arrives.
            lambda: self._pipeline.guarded("exists", lambda: ask(0.9 * timeout)),
            None,
            timeout,
        )
        # A backend answers "no" to what it could not ask in time, so a call that took all its time
        # and found nothing is silence.
        if time.monotonic() - started > 0.85 * timeout and not (answer and finds(answer)):
            attempt.silent = 1
        else:
            attempt.note(None if answer is None else [answer])
        self._pipeline.reads.settle(attempt)
        if answer is None:
            self._count("exists.unanswered")
        return answer

    def _decode(
        self,
        indices: list[int],
        pages: list[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]],
        keys: Sequence[str],
        views: PageViews,
        deadline: float,
    ) -> list[PageError | None]:
        data = [encode_key(keys[index]) for index in indices]
        self._count("prefetch.read_bytes", sum(len(page) for page in pages))
        return self._pipeline.codec.decode_into(
            self.namespace,
            self._encoders.present.likely_plan(len(data[0])),
            data,
            pages,
            views.select(indices),
            minimum_bits=self._pipeline.options.minimum_bits,
            timeout_seconds=max(0.0, deadline - time.monotonic()),
        )

    def _reject(self, name: str, reason: str, *, heal: bool) -> None:
        """Count a page that is not what was asked for. The next backup writes it again; a damaged
        one goes at once.
        """
        self._count(f"prefetch.{reason}")
        self._rewrite[name] = None
        if len(self._rewrite) > _REMEMBERED_NAMES:
            self._rewrite.popitem(last=False)
        if heal:
            backend, timeout = self._pipeline.backend, self._pipeline.options.backup_timeout_seconds

            def delete() -> None:
                self._pipeline.guarded(
                    "heal", lambda: backend.delete([name], timeout_seconds=timeout)
                )

            self._pipeline.io.submit(delete)

    def _transfer(self, timeout_seconds: float) -> Transfer[list[T]]:
        return Transfer(
            self._pipeline.io,
            self._pipeline.buffers,
            row_bytes=self._row_bytes,
            chunk_pages=self.chunk_pages,
            deadline=time.monotonic() + timeout_seconds,
        )

    def _runs(
        self, indices: list[int], keys: Sequence[str], marks: Sequence[str]
    ) -> Iterator[list[int]]:
        """Cut a batch into runs of pages with one plan, small enough that several overlap."""
        run: list[int] = []
        for index in indices:
            kind = (marks[index], len(encode_key(keys[index])))
            if run and (
                len(run) == self.chunk_pages
                or kind != (marks[run[0]], len(encode_key(keys[run[0]])))
            ):
                yield run
                run = []
            run.append(index)
        if run:
            yield run


def open_store(
    url: str, namespace: Namespace, spec: CodecSpec, *, options: StoreOptions | None = None
) -> tuple[Pipeline, PageStore]:
    """A page store on a pipeline of its own, from a store URL. Close the pipeline when done."""
    pipeline = Pipeline(open_backend(url), options)
    return pipeline, PageStore(pipeline, namespace, spec)
