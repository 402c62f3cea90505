"""Raw pages in and out: for clients without libkvcodec, the sidecar encodes and decodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from kvcodec.backend import PutResult
from kvcodec.errors import ConfigError, CorruptPage, UnsupportedPage
from kvcodec.format import FIXED, MAX_EXTENSION_BYTES, SECTION, STREAM
from kvcodec.identity import Namespace, encode_key
from kvcodec.layout import PageLayout, PageViews, StreamStrides
from kvcodec.plan import PagePlan, check_spec
from kvcodec.spec import CodecSpec, Kind, SectionCodec
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_server._steps import begin_step
from kvcodec_server.metadata import namespace_of
from kvcodec_server.status import get_outcome, outcome_of, put_outcome
from kvcodec_server.store_calls import Countdown, Pending, StoreCalls

__all__ = ["RawPages", "canonical_views"]

_GROUP_PAGES = 8

Bytes = npt.NDArray[np.uint8]


def canonical_views(
    layout: PageLayout, pages: Sequence[memoryview], *, writable: bool
) -> PageViews:
    """Raw pages of `layout.raw_bytes` each, in canonical order (FORMAT.md 1): layer by layer,
    inside a layer stream by stream, inside a stream (head, token, element).
    """
    sizes = [layout.section_raw_bytes(stream) for stream in layout.streams]
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.uint64)
    strides = []
    for stream in layout.streams:
        row_bytes = stream.head_size * layout.dtype.itemsize
        strides.append(
            StreamStrides(
                layer_bytes=sum(sizes),
                head_bytes=layout.token_count * row_bytes,
                token_bytes=row_bytes,
            )
        )
    arrays = [np.frombuffer(page, np.uint8) for page in pages]
    starts = np.array([array.__array_interface__["data"][0] for array in arrays], np.uint64)
    return PageViews(
        layout=layout,
        strides=tuple(strides),
        bases=np.ascontiguousarray(starts[:, None] + offsets[None, :]),
        owner=arrays,
        writable=writable,
    )


class RawPages:
    """Raw pages of one namespace over a store. `message` says which, and how to encode.

    Raises `ConfigError` for a layout or a spec that cannot be honoured.
    """

    def __init__(self, calls: StoreCalls, message: pb.RawPages, max_object_bytes: int) -> None:
        self._calls = calls
        self._pipeline = calls.pipeline
        self.namespace: Namespace = namespace_of(message.identity, message.layout)
        self.layout = self.namespace.layout
        self._minimum_bits = message.minimum_bits
        self._spec = CodecSpec.parse(message.spec or "raw")
        if self.layout.raw_bytes > max_object_bytes:
            raise ConfigError(
                f"a raw page has {self.layout.raw_bytes} bytes, allowed are {max_object_bytes} "
                f"(max_object_bytes)"
            )
        check_spec(self._spec, self.layout, 0)

    def get(
        self, keys: Sequence[str], targets: Sequence[memoryview], seconds: float
    ) -> list[pb.Outcome]:
        """Read, verify and decode pages into the starts of `targets`; nothing is written to them
        after the return.
        """
        deadline = time.monotonic() + seconds
        outcomes: list[pb.Outcome] = []
        for start in range(0, len(keys), _GROUP_PAGES):
            group = slice(start, start + _GROUP_PAGES)
            outcomes += self._get_group(keys[group], targets[group], deadline)
        return outcomes

    def put(
        self,
        keys: Sequence[str],
        pages: Sequence[memoryview],
        seconds: float,
        read: Callable[[], None],
    ) -> list[pb.Outcome]:
        """Encode and store pages; `read` is called once all are encoded.

        A page with values that the codec cannot hold is stored raw.
        """
        deadline = time.monotonic() + seconds
        pending = []
        try:
            for page in pages:
                if len(page) != self.layout.raw_bytes:
                    raise ConfigError(
                        f"a raw page of {len(page)} bytes, the layout has {self.layout.raw_bytes}"
                    )
            data = [encode_key(key) for key in keys]
            for key, page in zip(data, pages, strict=True):
                pending.append(self._start_put(key, page, deadline))
        finally:
            read()
        return [
            outcome_of(self._calls.no_memory("put"))
            if started is None
            else put_outcome(started[1].wait()[0][0], started[0])
            for started in pending
        ]

    def _start_put(
        self, data: bytes, page: memoryview, deadline: float
    ) -> tuple[int, Pending[PutResult]] | None:
        plan = self._plan(self._spec, data)
        raw = self._plan(CodecSpec(), data)
        row_bytes = max(plan.page_bytes, raw.page_bytes)
        buffer = self._pipeline.buffers.acquire(row_bytes, _left(deadline))
        if buffer is None:
            return None
        views = canonical_views(self.layout, [page], writable=False)
        started, step = time.perf_counter_ns(), begin_step("encode")
        encoded = self._pipeline.codec.encode_into(plan, [data], views, [buffer])
        if encoded.nonfinite_groups.any():
            encoded = self._pipeline.codec.encode_into(raw, [data], views, [buffer])
        self._count("encode", _codecs_of(self.layout, buffer), started)
        if step is not None:
            step.end(pages=1, byte_count=len(page))
        page_bytes = int(encoded.page_bytes[0])
        source = buffer.data[:page_bytes]
        name = self.namespace.object_name(data.decode())
        release = partial(self._pipeline.buffers.release, buffer)
        return page_bytes, self._calls.put([name], [source], _left(deadline), release)

    def _get_group(
        self, keys: Sequence[str], targets: Sequence[memoryview], deadline: float
    ) -> list[pb.Outcome]:
        data = [encode_key(key) for key in keys]
        plans = [self._plan(CodecSpec(), key) for key in data]
        # Any codec takes less than raw, but for headers and codecs nobody would choose.
        row_bytes = max(plan.page_bytes for plan in plans) + MAX_EXTENSION_BYTES
        buffer = self._pipeline.buffers.acquire(row_bytes * len(keys), _left(deadline))
        if buffer is None:
            error = self._calls.no_memory("get", len(keys))
            return [outcome_of(error) for _ in keys]
        release = Countdown(2, partial(self._pipeline.buffers.release, buffer))
        try:
            rows = buffer.reshape(-1, row_bytes)
            names = [self.namespace.object_name(key) for key in keys]
            results, _ = self._calls.get(
                names, [row.data for row in rows], _left(deadline), release
            ).wait()
            outcomes = []
            for index, result in enumerate(results):
                outcome = get_outcome(result, row_bytes)
                if outcome.status == pb.STATUS_TOO_LONG:
                    outcome = outcome_of(UnsupportedPage("length", outcome.length, row_bytes))
                elif outcome.status == pb.STATUS_OK:
                    page = rows[index][: outcome.length]
                    outcome = self._decode(
                        plans[index], data[index], page, targets[index], deadline
                    )
                outcomes.append(outcome)
            return outcomes
        finally:
            release()

    def _decode(
        self, plan: PagePlan, key: bytes, page: Bytes, target: memoryview, deadline: float
    ) -> pb.Outcome:
        raw_bytes = self.layout.raw_bytes
        if len(target) < raw_bytes:
            return pb.Outcome(status=pb.STATUS_TOO_LONG, length=raw_bytes)
        views = canonical_views(self.layout, [target[:raw_bytes]], writable=True)
        started = time.perf_counter_ns()
        step = begin_step("decode")
        (error,) = self._pipeline.codec.decode_into(
            self.namespace,
            plan,
            [key],
            [page],
            views,
            minimum_bits=self._minimum_bits,
            timeout_seconds=_left(deadline),
        )
        self._count("decode", "none" if error else _codecs_of(self.layout, page), started)
        if step is not None:
            step.end(pages=1, byte_count=raw_bytes, error=error.reason if error else "")
        if isinstance(error, CorruptPage):
            self._calls.remove_damaged(self.namespace.object_name(key.decode()))
        return (
            pb.Outcome(status=pb.STATUS_OK, length=raw_bytes)
            if error is None
            else outcome_of(error)
        )

    def _count(self, operation: str, codecs: str, started_ns: int) -> None:
        counts = self._pipeline.counts
        counts.add(f"codec_nanoseconds.{operation}.{codecs}", time.perf_counter_ns() - started_ns)
        counts.add(f"codec_pages.{operation}.{codecs}")

    def _plan(self, spec: CodecSpec, key: bytes) -> PagePlan:
        return PagePlan.build(self.namespace, spec.section_codecs(self.layout), len(key))


def _codecs_of(layout: PageLayout, page: Bytes) -> str:
    """Those of a sound page of this layout, such as ``int4`` or ``int4+int8``: few, whatever its
    layers are.
    """
    start = FIXED.size + len(layout.streams) * STREAM.size
    size = layout.section_count * SECTION.itemsize
    table = page[start : start + size].reshape(-1, SECTION.itemsize)
    return _codecs_in(table[:, :2].tobytes())


@lru_cache(maxsize=64)
def _codecs_in(kinds_and_bits: bytes) -> str:
    pairs = zip(kinds_and_bits[::2], kinds_and_bits[1::2], strict=True)
    return "+".join(sorted({_codec_in(Kind(kind), bits).text for kind, bits in pairs}))


def _codec_in(kind: Kind, bits: int) -> SectionCodec:
    return SectionCodec(kind, bits if kind in (Kind.INT, Kind.ECQ, Kind.FP8) else 0)


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
