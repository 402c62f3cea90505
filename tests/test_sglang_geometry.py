"""Where pages lie in SGLang's host pools: every row at the address SGLang means."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
from sglang_fakes import (
    HEADS,
    HOST_INDEX,
    LAYERS,
    PAGE_COUNT,
    PAGE_SIZE,
    SIZE,
    SLOTS,
    Memory,
    dtype_of,
    fake_pool,
    head_count,
    head_sizes,
    slots_of,
    tensors_of,
)

from kvcodec.errors import ConfigError
from kvcodec.layout import DType, PageViews, Role
from kvcodec.sglang.geometry import (
    PoolGeometry,
    describe_pool,
    logical_dtype,
    merged,
    note_logical_dtype,
    page_numbers,
)

EVERY_POOL = sorted(HOST_INDEX)


def geometry_of(pool: object) -> PoolGeometry:
    geometry = describe_pool(pool)
    assert geometry is not None
    return geometry


def addresses(views: PageViews, stream: int) -> npt.NDArray[np.int64]:
    """Address of every row, (pages, layers, heads, tokens)."""
    layout, strides = views.layout, views.strides[stream]
    heads = np.arange(layout.streams[stream].head_count)
    per_head = (
        heads // strides.group_heads * strides.group_bytes
        + heads % strides.group_heads * strides.head_bytes
    )
    return (
        views.bases[:, stream].astype(np.int64)[:, None, None, None]
        + np.arange(layout.layer_count)[:, None, None] * strides.layer_bytes
        + per_head[:, None]
        + np.arange(layout.token_count) * strides.token_bytes
    )


def expected_addresses(
    pool: SimpleNamespace, kind: str, layout: str, stream: int, pages: list[int]
) -> npt.NDArray[np.int64]:
    """The same by SGLang's own indexing."""
    tensors = tensors_of(pool)
    tensor = tensors[stream if len(tensors) > 1 else 0].array
    base = tensor.__array_interface__["data"][0]
    index = HOST_INDEX[kind, layout]
    shape = (len(pages), LAYERS, head_count(kind), PAGE_SIZE)
    result = np.empty(shape, np.int64)
    for page, layer, head, token in itertools.product(*map(range, shape)):
        slot = pages[page] * PAGE_SIZE + token
        at = index(stream, layer, slot, head, 0)
        result[page, layer, head, token] = base + int(np.dot(at, tensor.strides))
    return result


@pytest.mark.parametrize(("kind", "layout"), EVERY_POOL)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "uint8"])
def test_every_row_is_where_sglang_keeps_it(kind: str, layout: str, dtype: str):
    pool = fake_pool(kind, layout, dtype)
    geometry = geometry_of(pool)
    pages = [4, 0, 2]
    views = geometry.views(np.array(pages))
    assert [stream.head_size for stream in geometry.layout.streams] == head_sizes(kind)
    assert geometry.layout.raw_bytes == PAGE_SIZE * pool.size_per_token
    for stream in range(len(geometry.layout.streams)):
        found = addresses(views, stream)
        assert np.array_equal(found, expected_addresses(pool, kind, layout, stream, pages))


@pytest.mark.parametrize(("kind", "layout"), EVERY_POOL)
def test_the_pages_of_a_pool_cover_its_memory_once(kind: str, layout: str):
    pool = fake_pool(kind, layout)
    geometry = geometry_of(pool)
    pieces = [piece for page in range(PAGE_COUNT) for piece in geometry.pieces(page)]
    whole = merged(*(np.array(ends, np.int64) for ends in zip(*pieces, strict=True)))
    tensors = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors_of(pool))
    starts, ends = (np.array(side, np.int64) for side in zip(*tensors, strict=True))
    assert whole == merged(starts, ends)


def test_streams_have_the_roles_of_their_pool():
    roles = {
        kind: tuple(s.role for s in geometry_of(fake_pool(kind, "page_first")).layout.streams)
        for kind in ("mha", "mla", "keys", "asymmetric")
    }
    assert roles["mha"] == roles["asymmetric"] == (Role.KEY, Role.VALUE)
    assert roles["mla"] == (Role.LATENT, Role.ROPE)
    assert roles["keys"] == (Role.KEY,)


@pytest.mark.parametrize("kind", ["mha", "mla", "keys"])
def test_pages_of_all_layouts_have_one_page_layout(kind: str):
    """What makes a page written by one host layout readable by another."""
    layouts = [layout for name, layout in EVERY_POOL if name == kind]
    assert len({geometry_of(fake_pool(kind, layout)).layout for layout in layouts}) == 1


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (kind, layout)
        for kind, layout in EVERY_POOL
        if kind != "asymmetric" and layout not in ("page_unified", "page_first_kv_split")
    ],
)
def test_flat_page_has_the_pools_own_order(kind: str, layout: str):
    """The flat form is SGLang's get_data_page: the page cut out of the tensor, then flattened."""
    pool = fake_pool(kind, layout, "float32")
    geometry = geometry_of(pool)
    (tensor,) = tensors_of(pool)
    axis = tensor.shape.index(SLOTS) if SLOTS in tensor.shape else tensor.shape.index(PAGE_COUNT)
    step = PAGE_SIZE if SLOTS in tensor.shape else 1
    flat = np.ascontiguousarray(np.take(tensor.array, range(3 * step, 4 * step), axis)).ravel()
    views = geometry.flat_views([Memory(flat).data_ptr()], flat)
    assert views is not None
    in_place = geometry.views(np.array([3]))
    for stream in range(len(geometry.layout.streams)):
        offsets = (addresses(views, stream) - Memory(flat).data_ptr()) // 4
        where = (addresses(in_place, stream) - tensor.data_ptr()) // 4
        assert np.array_equal(flat[offsets], tensor.array.ravel()[where])


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("asymmetric", "page_first"), ("mha", "page_unified"), ("mla", "page_first_kv_split")],
)
def test_pools_without_a_flat_form_have_no_flat_views(kind: str, layout: str):
    assert geometry_of(fake_pool(kind, layout)).flat_views([0], None) is None


@pytest.mark.parametrize(
    ("storage", "logical", "expected"),
    [
        ("bfloat16", None, DType.BF16),
        ("float16", None, DType.FP16),
        ("float32", None, DType.FP32),
        ("uint8", None, DType.U8),
        ("uint8", "float8_e4m3fn", DType.FP8_E4M3),
        ("uint8", "float8_e5m2", DType.FP8_E5M2),
        ("uint8", "float4_e2m1fn_x2", DType.U8),
        ("uint8", "bfloat16", DType.U8),
    ],
)
def test_element_type_is_the_device_pools(storage: str, logical: str | None, expected: DType):
    pool = fake_pool("mha", "page_first", storage)
    if logical is not None:
        note_logical_dtype(pool, SimpleNamespace(dtype=dtype_of(logical)))
        assert logical_dtype(pool) == f"torch.{logical}"
    assert geometry_of(pool).layout.dtype is expected


def test_older_host_pools_know_their_device_pool():
    pool = fake_pool("mha", "page_first", "uint8")
    pool.device_pool = SimpleNamespace(dtype=dtype_of("float8_e5m2"))
    assert geometry_of(pool).layout.dtype is DType.FP8_E5M2


def test_layers_are_numbered_as_in_the_model():
    pool = fake_pool("mha", "page_first")
    pool.start_layer = 20
    assert geometry_of(pool).layout.layer_start == 20


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dsa_kv_cache_store_fp8": True}, "packed fp8 rows"),
        ({"kv_cache_dim": 48}, "wider rows"),
        ({"layout": "page_of_tomorrow"}, "an unknown layout"),
    ],
)
def test_rows_of_unknown_structure_have_no_geometry(change: dict[str, object], what: str):
    pool = fake_pool("mla", "page_first")
    vars(pool).update(change)
    assert describe_pool(pool) is None, what


def test_unknown_class_has_no_geometry():
    assert describe_pool(SimpleNamespace(layout="page_first")) is None


@pytest.mark.parametrize(
    "change",
    [
        {"layer_num": LAYERS + 1},
        {"head_num": HEADS // 2},
        {"size": SLOTS * 2},
        {"size_per_token": 1},
    ],
)
def test_pool_that_is_not_what_it_says_is_refused(change: dict[str, object]):
    pool = fake_pool("mha", "page_first")
    vars(pool).update(change)
    with pytest.raises(ConfigError):
        describe_pool(pool)


@pytest.mark.parametrize("shift", [0, 2])
def test_pools_own_page_addresses_are_compared(shift: int):
    pool = fake_pool("mha", "page_first")
    half = SLOTS * LAYERS * HEADS * SIZE * 2
    page = PAGE_SIZE * LAYERS * HEADS * SIZE * 2

    def meta(indices: npt.NDArray[np.int64]) -> tuple[list[int], list[int]]:
        base = pool.kv_buffer.data_ptr() + int(indices[0]) // PAGE_SIZE * page + shift
        return [base, base + half], [page, page]

    pool.get_page_buffer_meta = meta
    if shift:
        with pytest.raises(ConfigError, match="other addresses"):
            describe_pool(pool)
    else:
        assert describe_pool(pool) is not None


def test_host_indices_are_whole_pages_in_any_order():
    assert page_numbers(slots_of(3, 0, 1), PAGE_SIZE, PAGE_COUNT).tolist() == [3, 0, 1]
    assert page_numbers(slots_of(0)[:0], PAGE_SIZE, PAGE_COUNT).tolist() == []


@pytest.mark.parametrize(
    "indices",
    [
        slots_of(1) + 1,
        slots_of(1)[:-1],
        slots_of(1)[::-1],
        slots_of(1).astype(np.int32),
        slots_of(PAGE_COUNT),
        slots_of(0) - PAGE_SIZE,
        slots_of(0, 1).reshape(2, -1),
        np.array([0, 1, 2, 5]),
    ],
)
def test_host_indices_that_are_no_pages_are_refused(indices: npt.NDArray[np.int64]):
    with pytest.raises(ConfigError, match="host indices"):
        page_numbers(indices, PAGE_SIZE, PAGE_COUNT)
