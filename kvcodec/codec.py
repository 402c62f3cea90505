"""Raw pages <-> encoded pages: checks, then one call of the native library per batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcodec import native
from kvcodec.derotation import ROTATED_ROLES
from kvcodec.errors import ConfigError, CorruptPage, NativeError, PageError, UndecodedPage
from kvcodec.format import PAGE_BYTES_OFFSET, EncodedPage
from kvcodec.identity import Namespace
from kvcodec.layout import PageViews, StreamStrides
from kvcodec.plan import PagePlan
from kvcodec.rotary import INTERLEAVED

__all__ = ["Codec", "Encoded", "encoded_size"]

#: Plans of pages that were encoded otherwise than expected: so many are remembered for each of so
#: many namespaces.
_FOREIGN_PLANS = 8
_FOREIGN_NAMESPACES = 64

Bytes = npt.NDArray[np.uint8]


def encoded_size(plan: PagePlan) -> int:
    """Exact bytes of every page encoded under `plan`; the most, where a section is coded."""
    return plan.page_bytes


class Encoded(NamedTuple):
    """What encoding made of each page: its length, and how many groups held a value outside the
    codec's domain (NaN, infinite, 2^127 or more) and decode to NaN. Of fp8 these are rows with a
    NaN or a number beyond 464, which saturates. Coded sections have none: they fall back to raw.
    """

    page_bytes: npt.NDArray[np.uint64]
    nonfinite_groups: npt.NDArray[np.uint64]


@lru_cache(maxsize=128)
def _native_plan(plan: PagePlan, strides: tuple[StreamStrides, ...]) -> native.Plan:
    layout = plan.layout
    return native.Plan(
        dtype=int(layout.dtype),
        token_count=layout.token_count,
        layer_count=layout.layer_count,
        streams=[
            native.StreamRows(
                head_count=stream.head_count,
                head_size=stream.head_size,
                group_heads=min(stride.group_heads, stream.head_count),
                layer_stride=stride.layer_bytes,
                group_stride=stride.group_bytes,
                head_stride=stride.head_bytes,
                token_stride=stride.token_bytes,
                is_rotated=stream.role in ROTATED_ROLES,
            )
            for stream, stride in zip(layout.streams, strides, strict=True)
        ],
        sections=[
            native.Section(
                kind=int(codec.kind),
                bits=codec.bits or 8 * layout.dtype.itemsize,
                asymmetric=codec.asymmetric,
                channel=bool(codec.axis),
                transform=int(codec.transform),
                group_size=max(codec.group_size, 0),
                offset=int(offset),
                stored_bytes=int(stored),
                checksum_offset=int(checksum),
                size_offset=int(size),
            )
            for codec, offset, stored, checksum, size in zip(
                plan.codecs,
                plan.section_offsets,
                plan.stored_bytes,
                plan.checksum_offsets,
                plan.size_offsets,
                strict=True,
            )
        ],
        header=plan.header,
        key_offset=plan.key_offset,
        key_bytes=plan.key_bytes,
        page_bytes=plan.page_bytes,
        size_offset=0 if plan.is_fixed else PAGE_BYTES_OFFSET,
        rotary=None
        if plan.rotary is None
        else native.RotaryPairs(
            interleaved=plan.rotary.style == INTERLEAVED,
            table=plan.rotary.table(layout.token_count),
        ),
    )


def _check_batch(
    plan: PagePlan, keys: Sequence[bytes], pages: Sequence[Bytes], views: PageViews
) -> None:
    if views.layout != plan.layout:
        raise ConfigError(f"the views have the layout {views.layout}, the plan has {plan.layout}")
    if not len(keys) == len(pages) == len(views):
        raise ConfigError(f"{len(keys)} keys, {len(pages)} encoded pages and {len(views)} views")
    for key, page in zip(keys, pages, strict=True):
        if len(key) != plan.key_bytes:
            raise ConfigError(
                f"a key of {len(key)} bytes under a plan for keys of {plan.key_bytes}"
            )
        try:
            key.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"the page key {key!r} is not UTF-8") from error
        if page.ndim != 1 or page.dtype != np.uint8 or not page.flags.c_contiguous:
            raise ConfigError(
                f"an encoded page is a contiguous uint8 array, not {page.dtype} {page.shape}"
            )


class Codec:
    """Encodes and decodes batches on a bounded pool of native threads.

    Pages are read from and written to the caller's memory in place. A batch is one native call,
    which holds no GIL. Thread-safe; the threads start at the first call and again after a fork.
    """

    def __init__(self, threads: int = 2) -> None:
        if not 1 <= threads <= 64:
            raise ConfigError(f"codec_threads is {threads}, allowed is 1 to 64")
        self._pool = native.Pool(threads)
        self._foreign: dict[tuple[bytes, int], tuple[PagePlan, ...]] = {}

    def encode_into(
        self, plan: PagePlan, keys: Sequence[bytes], views: PageViews, targets: Sequence[Bytes]
    ) -> Encoded:
        """Encode pages into the starts of `targets`, uint8 arrays of at least `plan.page_bytes`.

        A caller that wants to keep values outside the codec's domain encodes such a page raw.
        Raises `NativeError` if memory runs out.
        """
        _check_batch(plan, keys, targets, views)
        for target in targets:
            if len(target) < plan.page_bytes or not target.flags.writeable:
                raise ConfigError(
                    f"a target of {len(target)} bytes; a page takes {plan.page_bytes}, writable"
                )
        batch = self._submit(native.ENCODE, plan, keys, views, targets)
        batch.wait(None)
        if (batch.status == native.OUT_OF_MEMORY).any():
            raise NativeError("no memory to encode pages with")
        assert not batch.status.any(), f"encode failed: {batch.status}"
        return Encoded(batch.encoded_bytes, batch.nonfinite_groups)

    def decode_into(
        self,
        namespace: Namespace,
        plan: PagePlan,
        keys: Sequence[bytes],
        pages: Sequence[Bytes],
        views: PageViews,
        *,
        minimum_bits: int = 0,
        timeout_seconds: float | None = None,
    ) -> list[PageError | None]:
        """Verify `pages` (uint8 arrays) and decode them into `views`; None where a page is there,
        else why not.

        `plan` is the one these pages most likely have; others that pages of this namespace had
        before are tried after it. A page encoded in yet another way is read by its own header,
        which takes longer. The memory of a refused page may have been written in part. No write
        happens after the return.
        """
        _check_batch(plan, keys, pages, views)
        if not views.writable:
            raise ConfigError("the views are of read-only memory, into which nothing is decoded")
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        results: list[PageError | None] = [_FOREIGN] * len(keys)
        room = (namespace.digest, plan.key_bytes)
        for likely in (plan, *self._foreign.get(room, ())):
            todo = [index for index, result in enumerate(results) if result is _FOREIGN]
            if not todo:
                return results
            if _has_bits(likely, minimum_bits):
                decoded = self._decode(likely, todo, keys, pages, views, deadline)
                for index, result in zip(todo, decoded, strict=True):
                    results[index] = result
        foreign: dict[int, tuple[PagePlan, list[int]]] = {}
        for index, result in enumerate(results):
            if result is not _FOREIGN:
                continue
            try:
                page = EncodedPage.parse(pages[index].data)
                page.header.expect(namespace, keys[index].decode(), minimum_bits=minimum_bits)
                own = self._foreign_plan(room, page)
            except PageError as error:
                results[index] = error
            else:
                foreign.setdefault(id(own), (own, []))[1].append(index)
        for own, indices in foreign.values():
            decoded = self._decode(own, indices, keys, pages, views, deadline)
            for index, result in zip(indices, decoded, strict=True):
                results[index] = result
        return results

    def _foreign_plan(self, room: tuple[bytes, int], page: EncodedPage) -> PagePlan:
        """The plan of a page, remembered for the pages after it. Only one that stood the comparison
        with what is expected in this room may come here.
        """
        plan = PagePlan.of_page(page.header, page.data)
        known = self._foreign.get(room, ())
        for other in known:
            if other.header == plan.header:
                return other
        if len(self._foreign) >= _FOREIGN_NAMESPACES and room not in self._foreign:
            self._foreign = {}
        self._foreign[room] = (plan, *known)[:_FOREIGN_PLANS]
        return plan

    def _decode(
        self,
        plan: PagePlan,
        indices: Sequence[int],
        keys: Sequence[bytes],
        pages: Sequence[Bytes],
        views: PageViews,
        deadline: float | None,
    ) -> list[PageError | None]:
        batch = self._submit(
            native.DECODE,
            plan,
            [keys[index] for index in indices],
            views.select(indices),
            [pages[index] for index in indices],
        )
        if not batch.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
            batch.cancel()
            batch.wait(None)
        return [
            _error(int(status), int(section))
            for status, section in zip(batch.status, batch.section, strict=True)
        ]

    def _submit(
        self,
        operation: int,
        plan: PagePlan,
        keys: Sequence[bytes],
        views: PageViews,
        pages: Sequence[Bytes],
    ) -> native.Batch:
        addresses = np.array([page.__array_interface__["data"][0] for page in pages], np.uint64)
        lengths = np.array([len(page) for page in pages], np.uint64)
        return self._pool.submit(
            operation,
            _native_plan(plan, views.strides),
            addresses,
            lengths,
            list(keys),
            views.bases,
        )

    def close(self) -> None:
        """End the threads; further batches raise `NativeError`."""
        self._pool.close()


def _has_bits(plan: PagePlan, minimum_bits: int) -> bool:
    if not minimum_bits:
        return True
    return all((codec.nominal_bits or minimum_bits) >= minimum_bits for codec in plan.codecs)


#: Stands for "not encoded under the expected plan"; never leaves this module.
_FOREIGN = CorruptPage("foreign", "encoded otherwise than expected")


def _error(status: int, section: int) -> PageError | None:
    if status == native.OK:
        return None
    if status in (native.HEADER_DIFFERS, native.BAD_LENGTH):
        return _FOREIGN
    if status == native.BAD_HEADER_CHECKSUM:
        return CorruptPage("header_checksum", "the header does not have its checksum")
    if status == native.BAD_SECTION_CHECKSUM:
        return CorruptPage("section_checksum", f"section {section} does not have its checksum")
    if status == native.BAD_PADDING:
        return CorruptPage("padding", f"the padding of section {section} is not zero")
    if status == native.BAD_STREAM:
        return CorruptPage("section_stream", f"section {section} does not decode")
    if status == native.OUT_OF_MEMORY:
        return UndecodedPage("memory", "no memory to decode the page with")
    return UndecodedPage("deadline", "the deadline passed before the page was decoded")
