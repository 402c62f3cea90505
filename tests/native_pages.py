"""Batches for the tests of kvcodec.native: plans without a real header, rows in odd places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from kvcodec import native
from kvcodec.layout import DType
from kvcodec.reference import encode_section, from_float32
from kvcodec.spec import Axis, Kind, SectionCodec

KEY = b"key of a page"
TABLE_OFFSET = 64
ENTRY_BYTES = 24

Bits = npt.NDArray[np.unsignedinteger]
Bytes = npt.NDArray[np.uint8]

BITS = {DType.BF16: np.uint16, DType.FP16: np.uint16, DType.FP32: np.uint32}
SPECIAL = {
    DType.BF16: [0x7FC0, 0xFF81, 0x7F80, 0xFF80, 0x7EFF, 0xFEFF, 0x7F00, 1, 0x8001, 0x8000, 0],
    DType.FP16: [0x7E00, 0xFC01, 0x7C00, 0xFC00, 0x7BFF, 0xFBFF, 0x03FF, 1, 0x8001, 0x8000, 0],
    DType.FP32: [
        0x7FC00000,
        0xFF800001,
        0x7F800000,
        0x7EFFFFFF,
        0x7F000000,
        1,
        0x80000001,
        0x80000000,
        0,
    ],
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One stream of (layers, heads, tokens, head_size) elements, and a codec per layer."""

    dtype: DType
    codecs: tuple[SectionCodec, ...]
    head_count: int
    token_count: int
    head_size: int

    @property
    def rows(self) -> tuple[int, int, int, int]:
        return (len(self.codecs), self.head_count, self.token_count, self.head_size)

    @property
    def item(self) -> type[np.unsignedinteger]:
        return BITS.get(self.dtype, np.uint8)

    def section(self, codec: SectionCodec) -> dict[str, int | bool]:
        """The codec as the native library takes it."""
        codec = codec.resolved(self.head_size, self.token_count)
        raw = codec.kind is Kind.RAW
        return {
            "kind": int(codec.kind),
            "bits": 8 * self.dtype.itemsize if raw else codec.bits,
            "asymmetric": codec.asymmetric,
            "channel": codec.axis is Axis.CHANNEL,
            "group_size": 0 if raw else codec.group_size,
        }


def pad64(size: int) -> int:
    return -(-size // 64) * 64


def make_plan(shape: Shape, rows: Bits, **changes: object) -> native.Plan:
    """A plan for pages whose rows lie like those of `rows`, the (layers, ...) array of one page."""
    sections = []
    key_offset = TABLE_OFFSET + ENTRY_BYTES * len(shape.codecs)
    header_bytes = offset = pad64(key_offset + len(KEY) + 8)
    for index, codec in enumerate(shape.codecs):
        fields = shape.section(codec)
        stored = native.section_bytes(
            dtype=shape.dtype,
            head_count=shape.head_count,
            token_count=shape.token_count,
            head_size=shape.head_size,
            **fields,  # type: ignore[arg-type]
        )
        place = TABLE_OFFSET + ENTRY_BYTES * index + 16
        sections.append(
            native.Section(offset=offset, stored_bytes=stored, checksum_offset=place, **fields)  # type: ignore[arg-type]
        )
        offset += pad64(stored)
    streams = [
        native.StreamRows(
            head_count=shape.head_count,
            head_size=shape.head_size,
            group_heads=shape.head_count,
            layer_stride=rows.strides[0],
            group_stride=0,
            head_stride=rows.strides[1],
            token_stride=rows.strides[2],
        )
    ]
    settings: dict[str, object] = {
        "dtype": int(shape.dtype),
        "token_count": shape.token_count,
        "layer_count": len(shape.codecs),
        "streams": streams,
        "sections": sections,
        "header": bytes(range(1, 65)).ljust(header_bytes, b"\x55"),
        "key_offset": key_offset,
        "key_bytes": len(KEY),
        "page_bytes": offset,
    }
    return native.Plan(**(settings | changes))  # type: ignore[arg-type]


def section_of(plan: native.Plan, shape: Shape, page: Bytes, index: int) -> bytes:
    """The stored bytes of a section, with its padding."""
    sizes = [
        pad64(
            native.section_bytes(
                dtype=shape.dtype,
                head_count=shape.head_count,
                token_count=shape.token_count,
                head_size=shape.head_size,
                **shape.section(codec),  # type: ignore[arg-type]
            )
        )
        for codec in shape.codecs
    ]
    start = plan.page_bytes - sum(sizes[index:])
    return page[start : start + sizes[index]].tobytes()


def store_checksum(page: Bytes, place: int, data: bytes) -> None:
    """Write the checksum of `data` into a page."""
    checksum = xxhash.xxh3_64_intdigest(data).to_bytes(8, "little")
    page[place : place + 8] = np.frombuffer(checksum, np.uint8)


def address_of(array: npt.NDArray[np.generic]) -> int:
    return int(array.__array_interface__["data"][0])


def start(
    pool: native.Pool,
    operation: int,
    plan: native.Plan,
    pages: Sequence[Bytes],
    rows: Sequence[Bits],
    keys: Sequence[bytes] | None = None,
) -> native.Batch:
    """Submit pages, each with the array that its rows are read from or written to."""
    return pool.submit(
        operation,
        plan,
        np.array([address_of(page) for page in pages], np.uint64),
        np.array([len(page) for page in pages], np.uint64),
        [KEY] * len(pages) if keys is None else keys,
        np.array([[address_of(array)] for array in rows], np.uint64).reshape(len(pages), 1),
        owner=(pages, rows),
    )


def run(
    pool: native.Pool, operation: int, plan: native.Plan, page: Bytes, rows: Bits, key: bytes = KEY
) -> native.Batch:
    batch = start(pool, operation, plan, [page], [rows], [key])
    assert batch.wait(60)
    return batch


def encoded(pool: native.Pool, plan: native.Plan, rows: Bits) -> Bytes:
    """A page of `rows`."""
    page = np.zeros(plan.page_bytes, np.uint8)
    assert run(pool, native.ENCODE, plan, page, rows).status.tolist() == [native.OK]
    return page


def reference_section(shape: Shape, rows: Bits, index: int) -> tuple[bytes, int]:
    """One layer by the oracle: its stored bytes, and how many groups lie outside the domain."""
    rows = np.ascontiguousarray(rows[index])
    return encode_section(rows, shape.dtype, shape.codecs[index])


def random_shape(random: np.random.Generator) -> Shape:
    """A shape with two layers and any codecs, group sizes and tails."""
    token_count = int(random.integers(1, 40))
    head_size = int(random.choice([1, 3, 16, 31, 64, 65, 96, 127, 128, 192, 256]))
    codecs = []
    for _ in range(2):
        axis = Axis(int(random.integers(2)))
        length = token_count if axis is Axis.CHANNEL else head_size
        sizes = [16, 32, 64, 128, int(random.integers(1, length + 1))]
        codec = SectionCodec.integer(
            int(random.choice([2, 4, 8])),
            asymmetric=bool(random.integers(2)),
            axis=axis,
            group_size=int(random.choice(sizes)),
        )
        codecs.append(codec.resolved(head_size, token_count))
    return Shape(
        dtype=DType(int(random.integers(1, 4))),
        codecs=tuple(codecs),
        head_count=int(random.integers(1, 5)),
        token_count=token_count,
        head_size=head_size,
    )


def random_values(random: np.random.Generator, shape: Shape) -> Bits:
    """Elements like a cache's, of any magnitude, of any bits, or with NaN and its like."""
    mode = int(random.integers(5))
    if mode == 0:
        bits = random.integers(0, 1 << 8 * shape.dtype.itemsize, shape.rows).astype(shape.item)
    else:
        scale = {1: 10.0 ** random.uniform(-42, 36), 2: 6e4}.get(mode, 1.0)
        values = random.standard_normal(shape.rows) * scale + random.choice([0, 3]) * scale
        with np.errstate(over="ignore"):
            bits = from_float32(values.astype(np.float32), shape.dtype).astype(shape.item)
    if mode >= 3:
        flat = bits.reshape(-1)
        places = random.integers(0, flat.size, max(1, flat.size // 60))
        flat[places] = random.choice(SPECIAL[shape.dtype], len(places))
    return bits


def scattered(
    random: np.random.Generator, shape: Shape, fill: int, shift: int, order: Sequence[int]
) -> tuple[Bytes, Bits]:
    """A buffer full of `fill`, and rows in it: that order of axes, gaps, `shift` bytes off."""
    gaps = random.integers(0, 3, 4) * random.integers(0, 40, 4)
    row_bytes = shape.head_size * shape.dtype.itemsize
    strides = [0, 0, 0]
    size = row_bytes
    for axis, gap in zip(order, gaps, strict=False):
        size += int(gap)
        strides[axis] = size
        size *= shape.rows[axis]
    buffer = np.full(size + shift + 64, fill, np.uint8)
    rows = np.ndarray(shape.rows, shape.item, buffer.data, shift, (*strides, shape.dtype.itemsize))
    return buffer, rows
