"""libkvcodec through its binding: sizes, what becomes of a page, arguments, the library itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import native_pages as pages
import numpy as np
import pytest
import xxhash
from native_pages import KEY, Shape, make_plan, run

from kvcodec import native
from kvcodec.errors import NativeError
from kvcodec.layout import DType
from kvcodec.native import _library
from kvcodec.reference import from_float32
from kvcodec.spec import RAW, SectionCodec

INT4 = SectionCodec.integer(4, group_size=64)
SMALL = Shape(dtype=DType.BF16, codecs=(INT4, RAW, INT4), head_count=2, token_count=5, head_size=64)


@pytest.fixture(scope="module")
def pool() -> Iterator[native.Pool]:
    pool = native.Pool(2)
    yield pool
    pool.close()


# --- sizes


SIZE = {"dtype": 1, "head_count": 2, "token_count": 3, "head_size": 100}


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        # 2 * 3 rows of 2 groups of 2 bytes: 24, padded 64; 64 codes in 32 bytes, 36 in 18
        ({"kind": 1, "bits": 4, "group_size": 64}, 64 + 6 * 50),
        ({"kind": 1, "bits": 4, "group_size": 64, "asymmetric": True}, 64 + 6 * 50),
        ({"kind": 1, "bits": 2, "group_size": 1, "asymmetric": True}, 2432 + 6 * 25),
        ({"kind": 1, "bits": 8, "group_size": 100}, 64 + 6 * 100),
        # 2 heads of 2 groups of 100 channels: 800, padded 832; 3 tokens of 4 bits are one word
        ({"kind": 1, "bits": 4, "group_size": 2, "channel": True}, 832 + 2 * 400),
        ({"kind": 1, "bits": 8, "group_size": 3, "channel": True, "token_count": 9}, 1216 + 2400),
        ({"kind": 0, "bits": 16}, 1200),
        ({"kind": 0, "bits": 8, "dtype": 4}, 600),
        ({"kind": 5, "bits": 8}, 600),
        ({"kind": 1, "bits": 4, "group_size": 2, "channel": True, "transform": 1}, 832 + 2 * 400),
        ({"kind": 1, "bits": 8, "group_size": 64, "transform": 2, "head_size": 64}, 64 + 6 * 64),
    ],
)
def test_section_bytes_follow_the_format(fields: dict[str, int], size: int):
    assert native.section_bytes(**(SIZE | fields)) == size


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": 1, "bits": 4, "group_size": 0},
        {"kind": 1, "bits": 4, "group_size": 101},
        {"kind": 1, "bits": 4, "group_size": 4, "channel": True},
        {"kind": 1, "bits": 3, "group_size": 4},
        {"kind": 1, "bits": 4, "group_size": 4, "dtype": 4},
        {"kind": 1, "bits": 4, "group_size": 4, "dtype": 6},
        {"kind": 0, "bits": 8},
        {"kind": 0, "bits": 16, "group_size": 1},
        {"kind": 0, "bits": 16, "channel": True},
        {"kind": 2, "bits": 4, "group_size": 4},
        {"kind": 1, "bits": 4, "group_size": 4, "transform": 1},
        {"kind": 1, "bits": 4, "group_size": 2, "transform": 2},
        {"kind": 1, "bits": 4, "group_size": 2, "transform": 2, "channel": True, "head_size": 64},
        {"kind": 1, "bits": 4, "group_size": 2, "transform": 3, "channel": True, "head_size": 64},
        {"kind": 1, "bits": 4, "group_size": 2, "transform": 1, "channel": True, "head_size": 257},
        {"kind": 1, "bits": 4, "group_size": 4, "transform": 2, "head_size": 8192},
        {"kind": 5, "bits": 16},
        {"kind": 5, "bits": 8, "group_size": 4},
        {"kind": 5, "bits": 8, "asymmetric": True},
        {"kind": 5, "bits": 8, "dtype": 4},
        {"kind": 6, "bits": 8},
        {"kind": 0, "bits": 0, "dtype": 0},
        {"kind": 0, "bits": 16, "head_count": 0},
        {"kind": 0, "bits": 16, "token_count": 65537},
        {"kind": 0, "bits": 16, "head_size": 1 << 30},
        {"kind": 0, "bits": 16, "head_size": 1 << 32},
        {"kind": 0, "bits": 16, "head_size": -1},
    ],
)
def test_section_bytes_is_zero_for_an_invalid_combination(fields: dict[str, int]):
    assert native.section_bytes(**(SIZE | fields)) == 0


# --- what becomes of a page


@pytest.fixture
def rows() -> np.ndarray:
    values = np.random.default_rng(5).standard_normal(SMALL.rows)
    return from_float32(values.astype(np.float32), DType.BF16).astype(np.uint16)


def test_checksums_are_xxh3(pool: native.Pool, rows: np.ndarray):
    plan = make_plan(SMALL, rows)
    page = pages.encoded(pool, plan, rows).tobytes()
    header_bytes = plan.structure.header_bytes
    places = [pages.TABLE_OFFSET + pages.ENTRY_BYTES * index + 16 for index in range(3)]
    for index, place in enumerate(places):
        section = pages.section_of(plan, SMALL, np.frombuffer(page, np.uint8), index)
        assert int.from_bytes(page[place : place + 8], "little") == xxhash.xxh3_64_intdigest(
            section
        )
    stored = int.from_bytes(page[header_bytes - 8 : header_bytes], "little")
    assert stored == xxhash.xxh3_64_intdigest(page[: header_bytes - 8])
    assert KEY in page[:header_bytes]


@pytest.mark.parametrize("size", [0, 1, 240, 241, 5000])
def test_checksum_of_a_buffer(isa: str, size: int):
    data = bytes(i * 7 % 256 for i in range(size))
    assert native.checksum(data) == xxhash.xxh3_64_intdigest(data)
    assert native.checksum(memoryview(data)) == xxhash.xxh3_64_intdigest(data)


def damaged(page: np.ndarray, *places: int) -> np.ndarray:
    page = page.copy()
    for place in places:
        page[place] ^= 0x10
    return page


@pytest.mark.parametrize("operation", [native.DECODE, native.VERIFY])
def test_damage_has_a_name_and_a_place(pool: native.Pool, rows: np.ndarray, operation: int):
    plan = make_plan(SMALL, rows)
    page = pages.encoded(pool, plan, rows)
    header_bytes = plan.structure.header_bytes
    last = len(page) - 1
    cases = [
        (page, native.OK, 0),
        (damaged(page, 3), native.HEADER_DIFFERS, 0),
        (damaged(page, plan.structure.key_offset), native.HEADER_DIFFERS, 0),
        (damaged(page, header_bytes - 1), native.BAD_HEADER_CHECKSUM, 0),
        (damaged(page, pages.TABLE_OFFSET + 16), native.BAD_HEADER_CHECKSUM, 0),
        (damaged(page, header_bytes), native.BAD_SECTION_CHECKSUM, 0),
        (damaged(page, last), native.BAD_SECTION_CHECKSUM, 2),
        (damaged(page, last, last - 1000), native.BAD_SECTION_CHECKSUM, 1),
        (page[:-1], native.BAD_LENGTH, 0),
        (np.append(page, np.uint8(0)), native.BAD_LENGTH, 0),
    ]
    outs = [np.full_like(rows, 0x1234) for _ in cases]
    batch = pages.start(pool, operation, plan, [case[0] for case in cases], outs)
    assert batch.wait()
    assert batch.status.tolist() == [case[1] for case in cases]
    assert batch.section.tolist() == [case[2] for case in cases]
    for out, (_, status, _) in zip(outs, cases, strict=True):
        if operation == native.VERIFY or status in (
            native.HEADER_DIFFERS,
            native.BAD_HEADER_CHECKSUM,
            native.BAD_LENGTH,
        ):
            assert (out == 0x1234).all()


def test_another_key_is_another_page(pool: native.Pool, rows: np.ndarray):
    plan = make_plan(SMALL, rows)
    page = pages.encoded(pool, plan, rows)
    batch = run(pool, native.DECODE, plan, page, rows.copy(), b"key of a PAGE")
    assert batch.status.tolist() == [native.HEADER_DIFFERS]


def test_padding_that_is_not_zero_is_found_under_a_right_checksum(pool: native.Pool):
    shape = Shape(dtype=DType.U8, codecs=(RAW,), head_count=1, token_count=1, head_size=65)
    rows = np.arange(65, dtype=np.uint8).reshape(shape.rows)
    plan = make_plan(shape, rows)
    page = pages.encoded(pool, plan, rows)
    page[-1] = 1
    header_bytes = plan.structure.header_bytes
    pages.store_checksum(page, pages.TABLE_OFFSET + 16, page[header_bytes:].tobytes())
    pages.store_checksum(page, header_bytes - 8, page[: header_bytes - 8].tobytes())
    batch = run(pool, native.DECODE, plan, page, rows.copy())
    assert batch.status.tolist() == [native.BAD_PADDING]


def test_capacity_that_is_too_small_is_left_alone(pool: native.Pool, rows: np.ndarray):
    plan = make_plan(SMALL, rows)
    page = np.full(plan.page_bytes - 1, 0xAA, np.uint8)
    assert run(pool, native.ENCODE, plan, page, rows).status.tolist() == [native.BAD_LENGTH]
    assert (page == 0xAA).all()


# --- arguments


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": 9},
        {"token_count": 6},
        {"layer_count": 2},
        {"streams": []},
        {"sections": []},
        {"header": b"\0" * 65},
        {"key_offset": 1 << 20},
        {"page_bytes": 64},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_plan_that_contradicts_itself_is_refused(
    pool: native.Pool, rows: np.ndarray, changes: dict[str, object]
):
    plan = make_plan(SMALL, rows, **changes)
    page = np.zeros(1 << 16, np.uint8)
    bases = np.full((1, plan.stream_count), pages.address_of(rows), np.uint64)
    with pytest.raises(NativeError, match="contradicts"):
        pool.submit(
            native.ENCODE,
            plan,
            np.array([pages.address_of(page)], np.uint64),
            np.array([len(page)], np.uint64),
            [KEY],
            bases,
        )


def test_numbers_beyond_32_bits_are_refused(rows: np.ndarray):
    with pytest.raises(NativeError, match="token_count is 4294967301"):
        make_plan(SMALL, rows, token_count=(1 << 32) + 5)


def test_arrays_of_different_lengths_are_refused(pool: native.Pool, rows: np.ndarray):
    plan = make_plan(SMALL, rows)
    one, two = np.ones(1, np.uint64), np.ones(2, np.uint64)
    base = np.ones((1, 1), np.uint64)
    with pytest.raises(NativeError, match="1 keys"):
        pool.submit(native.DECODE, plan, two, one, [KEY], base)
    with pytest.raises(NativeError, match="bases"):
        pool.submit(native.DECODE, plan, one, one, [KEY], np.ones((1, 2), np.uint64))
    with pytest.raises(NativeError, match="13 bytes"):
        pool.submit(native.DECODE, plan, one, one, [b"short"], base)
    with pytest.raises(NativeError, match="address is zero"):
        pool.submit(native.DECODE, plan, np.zeros(1, np.uint64), one, [KEY], base)


@pytest.mark.parametrize("threads", [0, 65])
def test_pool_size_has_limits(threads: int):
    with pytest.raises(NativeError, match="1 to 64"):
        native.Pool(threads)


# --- the library


def isa_under(forced: str) -> subprocess.CompletedProcess[str]:
    code = "from kvcodec import native; print(native.isa()); native.Pool(1)"
    env = os.environ | {"KVCODEC_FORCE_ISA": forced}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, check=False, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", native.available_isas())
def test_environment_forces_an_instruction_set(name: str):
    assert isa_under(name).stdout.strip() == name


def test_unknown_instruction_set_raises_with_the_choices():
    error = isa_under("sse9").stderr
    assert "NativeError" in error
    assert "'sse9'" in error
    assert "scalar" in error
    with pytest.raises(NativeError, match="'sse9'"):
        native.set_isa("sse9")


def test_missing_library_says_how_to_build_it(tmp_path: Path):
    """In a new process: a loader that has the library already finds it by its bare name."""
    code = (
        "from kvcodec.native import _library, isa\n"
        f"_library.__file__ = {str(tmp_path / '_library.py')!r}\n"
        "isa()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert "NativeError" in result.stderr
    assert "make setup" in result.stderr


def test_library_of_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_library, "ABI_VERSION", 99)
    with pytest.raises(NativeError, match="this package needs 99"):
        _library.Library(_library.library().path)
