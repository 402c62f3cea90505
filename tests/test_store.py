"""PageStore: what a batch becomes when store, pages or time are not as they should be."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from fake_backend import FakeBackend
from store_pages import (
    LAYOUT,
    NAMESPACE,
    OPTIONS,
    empty_pages,
    keys_of,
    numbers,
    random_pages,
    timed,
)
from waiting import SLACK_SECONDS, wait_until

from kvcodec.backend import open_backend
from kvcodec.errors import BackendFull, ConfigError
from kvcodec.format import EncodedPage
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout
from kvcodec.spec import CodecSpec
from kvcodec.store import PageStore, Pipeline, StoreOptions, open_store

#: For a store that hangs: what else it answers has to come within these deadlines, too.
HURRIED = replace(
    OPTIONS,
    exists_timeout_seconds=0.3,
    prefetch_timeout_seconds=0.5,
    backup_timeout_seconds=0.5,
)


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def pipeline(backend: FakeBackend) -> Iterator[Pipeline]:
    pipeline = Pipeline(backend, OPTIONS)
    yield pipeline
    backend.hook = lambda operation, names: None
    pipeline.close()


@pytest.fixture
def hurried_store(backend: FakeBackend) -> Iterator[PageStore]:
    pipeline = Pipeline(backend, HURRIED)
    yield PageStore(pipeline, NAMESPACE, CodecSpec())
    backend.hook = lambda operation, names: None
    pipeline.close()


@pytest.fixture
def raw_store(pipeline: Pipeline) -> PageStore:
    return PageStore(pipeline, NAMESPACE, CodecSpec())


def test_raw_pages_come_back_bit_exact(raw_store: PageStore) -> None:
    """What was backed up raw is prefetched bit for bit, whatever the bits are."""
    source, views = random_pages(7)
    source[0][3, 1, 0, 5, :4] = [0x7FC0, 0x7F80, 0x8000, 0x0001]
    target, target_views = empty_pages(7)
    assert raw_store.backup(keys_of(7), views) == [True] * 7
    assert raw_store.exists_prefix(keys_of(9)) == 7
    assert raw_store.prefetch(keys_of(7), target_views) == [True] * 7
    for before, after in zip(source, target, strict=True):
        np.testing.assert_array_equal(before, after)


def test_quantized_pages_come_back_within_their_step(pipeline: Pipeline) -> None:
    """kv8 keeps every element within half a step, which is the group's largest magnitude over
    127.499.
    """
    store = PageStore(pipeline, NAMESPACE, CodecSpec.parse("kv8"))
    source, views = random_pages(5)
    target, target_views = empty_pages(5)
    assert all(store.backup(keys_of(5), views))
    assert all(store.prefetch(keys_of(5), target_views))
    for before, after in zip(source, target, strict=True):
        before, after = numbers(before), numbers(after)
        step = np.abs(before).max(axis=-1, keepdims=True) / 127.499 * (1 + 2**-7)
        assert (np.abs(before - after) <= step / 2 + np.abs(before) * 2**-8).all()
        assert not np.array_equal(before, after)


def test_a_missing_page_leaves_the_others_alone(raw_store: PageStore) -> None:
    """Only the page that is not there is False, and its memory is untouched."""
    source, views = random_pages(6)
    raw_store.backup(keys_of(6), views)
    keys = keys_of(6)
    keys[2] = "f" * 64
    target, target_views = empty_pages(6)
    assert raw_store.prefetch(keys, target_views) == [True, True, False, True, True, True]
    assert (target[0][2] == 0x7F7F).all()
    assert (target[1][2] == 0x7F7F).all()
    np.testing.assert_array_equal(target[0][3], source[0][3])


@pytest.mark.parametrize("spec", ["raw", "kv8", "kv4", "kv4-channel", "kv2"])
def test_any_reader_reads_any_codec(pipeline: Pipeline, spec: str) -> None:
    """The page says how it is encoded: a kv4 reader decodes what a writer of any spec stored."""
    source, views = random_pages(3)
    assert all(PageStore(pipeline, NAMESPACE, CodecSpec.parse(spec)).backup(keys_of(3), views))
    target, target_views = empty_pages(3)
    assert all(
        PageStore(pipeline, NAMESPACE, CodecSpec.parse("kv4")).prefetch(keys_of(3), target_views)
    )
    assert np.abs(numbers(source[0]) - numbers(target[0])).max() < 2.0


def test_a_damaged_page_is_a_miss_and_heals(
    raw_store: PageStore, backend: FakeBackend, pipeline: Pipeline
) -> None:
    """A flipped bit is counted, the page is removed, and the next backup stores it again."""
    _, views = random_pages(3)
    keys = keys_of(3)
    raw_store.backup(keys, views)
    name = NAMESPACE.object_name(keys[1])
    damaged = bytearray(backend.objects[name])
    damaged[-100] ^= 4
    backend.objects[name] = bytes(damaged)
    _, target_views = empty_pages(3)
    assert raw_store.prefetch(keys, target_views) == [True, False, True]
    assert pipeline.counters()["prefetch.corrupt:section_checksum"] == 1
    for _ in range(100):
        if name not in backend.objects:
            break
        time.sleep(0.01)
    assert name not in backend.objects
    assert all(raw_store.backup(keys, views))
    assert raw_store.prefetch(keys, target_views) == [True] * 3


def test_a_page_under_another_key_is_a_miss(
    raw_store: PageStore, backend: FakeBackend, pipeline: Pipeline
) -> None:
    """A sound page that lies under another page's name is refused by the key inside it."""
    _, views = random_pages(2)
    keys = keys_of(2)
    raw_store.backup(keys, views)
    backend.objects[NAMESPACE.object_name(keys[1])] = backend.objects[
        NAMESPACE.object_name(keys[0])
    ]
    _, target_views = empty_pages(2)
    assert raw_store.prefetch(keys, target_views) == [True, False]
    assert pipeline.counters()["prefetch.mismatch:key"] == 1


@pytest.mark.parametrize(
    ("field", "identity", "layout"),
    [
        ("model", {"model": "other", "tp_rank": 0}, LAYOUT),
        ("tp_rank", {"model": "tiny", "tp_rank": 1}, LAYOUT),
        ("identity", {"model": "tiny", "tp_rank": 0, "salt": "x"}, LAYOUT),
        (
            "dtype",
            {"model": "tiny", "tp_rank": 0},
            PageLayout.mha(
                dtype=DType.FP16, token_count=16, layer_count=3, head_count=2, head_size=64
            ),
        ),
        (
            "layer_start",
            {"model": "tiny", "tp_rank": 0},
            PageLayout.mha(
                dtype=DType.BF16,
                token_count=16,
                layer_count=3,
                head_count=2,
                head_size=64,
                layer_start=3,
            ),
        ),
        (
            "token_count",
            {"model": "tiny", "tp_rank": 0},
            PageLayout.mha(
                dtype=DType.BF16, token_count=8, layer_count=3, head_count=4, head_size=64
            ),
        ),
    ],
)
def test_a_page_of_another_identity_is_a_miss_that_names_the_field(
    raw_store: PageStore,
    backend: FakeBackend,
    pipeline: Pipeline,
    field: str,
    identity: dict[str, object],
    layout: PageLayout,
) -> None:
    """Model, rank, element type, layer range, page size: each is told apart, even at equal size and
    name.
    """
    other = Namespace(Identity.of(**identity), layout)
    _, views = random_pages(1, layout=layout)
    assert PageStore(pipeline, other, CodecSpec()).backup(keys_of(1), views) == [True]
    _, target_views = empty_pages(1)
    assert raw_store.prefetch(keys_of(1), target_views) == [False], (
        "another namespace is another name"
    )
    backend.objects[NAMESPACE.object_name(keys_of(1)[0])] = backend.objects[
        other.object_name(keys_of(1)[0])
    ]
    assert raw_store.prefetch(keys_of(1), target_views) == [False]
    expected = "identity" if field == "identity" else field
    assert pipeline.counters()[f"prefetch.mismatch:{expected}"] == 1


@pytest.mark.parametrize(
    ("preset", "bits"), [("kv4", 0x7FC1), ("fp8", 0x43FA), ("kv4-hadamard", 0x7FC1)]
)
def test_a_page_with_nan_is_stored_raw(
    pipeline: Pipeline, backend: FakeBackend, preset: str, bits: int
) -> None:
    """A page with values a codec cannot hold, such as 500 in fp8, is kept as is, its neighbours are
    quantized.
    """
    store = PageStore(pipeline, NAMESPACE, CodecSpec.parse(preset))
    source, views = random_pages(4)
    source[1][2, 0, 1, 3, 7] = bits
    assert all(store.backup(keys_of(4), views))
    sizes = [len(backend.objects[NAMESPACE.object_name(key)]) for key in keys_of(4)]
    assert sizes[2] > 1.5 * sizes[0]
    assert sizes[0] == sizes[1] == sizes[3] == store.plan().page_bytes
    assert pipeline.counters()["backup.nonfinite"] == 1
    target, target_views = empty_pages(4)
    assert all(store.prefetch(keys_of(4), target_views))
    np.testing.assert_array_equal(target[1][2], source[1][2])


def test_protected_pages_use_the_protected_spec(pipeline: Pipeline, backend: FakeBackend) -> None:
    """Pages marked as protected are stored with more bits than the rest."""
    store = PageStore(
        pipeline, NAMESPACE, CodecSpec.parse("kv2"), protected_spec=CodecSpec.parse("kv8")
    )
    _, views = random_pages(4)
    assert all(store.backup(keys_of(4), views, protected=[True, False, False, True]))
    bits = [
        EncodedPage.parse(backend.objects[NAMESPACE.object_name(key)]).header.minimum_bits
        for key in keys_of(4)
    ]
    assert bits == [8, 2, 2, 8]


def test_a_page_below_the_minimum_quality_is_a_miss_and_is_written_again(
    backend: FakeBackend,
) -> None:
    """A reader that demands 8 bits refuses a 2-bit page, and its next backup replaces it."""
    _, views = random_pages(2)
    writer = Pipeline(backend, OPTIONS)
    assert all(PageStore(writer, NAMESPACE, CodecSpec.parse("kv2")).backup(keys_of(2), views))
    options = StoreOptions(buffer_bytes=8 << 20, minimum_bits=8)
    reader = Pipeline(backend, options)
    store = PageStore(reader, NAMESPACE, CodecSpec.parse("kv8"))
    _, target_views = empty_pages(2)
    assert store.prefetch(keys_of(2), target_views) == [False, False]
    assert reader.counters()["prefetch.quality:bits"] == 2
    assert all(store.backup(keys_of(2), views))
    assert store.prefetch(keys_of(2), target_views) == [True, True]
    writer.close()
    reader.close()


def test_stored_pages_are_not_written_again(
    raw_store: PageStore, backend: FakeBackend, pipeline: Pipeline
) -> None:
    """A second backup of the same keys answers True without a put."""
    _, views = random_pages(5)
    raw_store.backup(keys_of(5), views)
    backend.calls.clear()
    assert raw_store.backup(keys_of(5), views) == [True] * 5
    assert [operation for operation, _ in backend.calls] == ["exists"]
    assert pipeline.counters()["backup.present"] == 5


@pytest.mark.parametrize("operation", ["exists", "get", "put"])
def test_a_hanging_store_costs_one_deadline(
    raw_store: PageStore, hurried_store: PageStore, backend: FakeBackend, operation: str
) -> None:
    """A call into a store that never answers ends at its deadline with misses; the next calls do
    too.
    """
    _, views = random_pages(6)
    if operation == "get":
        raw_store.backup(keys_of(6), views)
    release = threading.Event()

    def hook(called: str, names: Sequence[str]) -> None:
        if called == operation:
            release.wait(20)

    backend.hook = hook
    bound = HURRIED.exists_timeout_seconds + HURRIED.backup_timeout_seconds + SLACK_SECONDS
    for _ in range(3):
        if operation == "get":
            result, seconds = timed(hurried_store.prefetch, keys_of(6), empty_pages(6)[1])
        elif operation == "put":
            result, seconds = timed(hurried_store.backup, keys_of(6, start=100), views)
        else:
            result, seconds = timed(hurried_store.exists, keys_of(6))
        assert result == [False] * 6
        assert seconds < bound
    release.set()


def test_nothing_is_written_to_the_engine_after_a_late_read(
    raw_store: PageStore, hurried_store: PageStore, backend: FakeBackend
) -> None:
    """Pages whose bytes arrive after the deadline never reach the engine's memory, and buffers are
    not lost.
    """
    _, views = random_pages(4)
    raw_store.backup(keys_of(4), views)
    backend.hook = lambda operation, names: time.sleep(HURRIED.prefetch_timeout_seconds + 0.3)
    target, target_views = empty_pages(4)
    assert hurried_store.prefetch(keys_of(4), target_views) == [False] * 4
    backend.hook = lambda operation, names: None
    time.sleep(0.6)
    assert all((array == 0x7F7F).all() for array in target)
    wait_until(lambda: hurried_store.prefetch(keys_of(4), target_views) == [True] * 4)


def test_a_raising_backend_is_a_miss(
    raw_store: PageStore, backend: FakeBackend, pipeline: Pipeline
) -> None:
    """A third party's exception ends in a False and a counter, in every operation, and costs no
    thread.
    """
    _, views = random_pages(3)
    raw_store.backup(keys_of(3), views)

    def hook(operation: str, names: Sequence[str]) -> None:
        raise ZeroDivisionError(operation)

    backend.hook = hook
    for _ in range(20):
        assert raw_store.prefetch(keys_of(3), empty_pages(3)[1]) == [False] * 3
        assert raw_store.backup(keys_of(3, start=50), views) == [False] * 3
        assert raw_store.exists(keys_of(3)) == [False] * 3
        assert raw_store.clear() == 0
    counters = pipeline.counters()
    assert counters["prefetch.raised"]
    assert counters["backup.raised"]
    assert counters["exists.raised"] == 40
    backend.hook = lambda operation, names: None
    assert raw_store.prefetch(keys_of(3), empty_pages(3)[1]) == [True] * 3


def test_a_full_store_is_counted_apart(
    raw_store: PageStore, backend: FakeBackend, pipeline: Pipeline
) -> None:
    """An answer such as 'no space' is a False of its own kind."""
    _, views = random_pages(2)
    backend.put = lambda names, objects, *, timeout_seconds: [BackendFull("no space")] * len(names)  # type: ignore[method-assign]
    assert raw_store.backup(keys_of(2), views) == [False, False]
    assert pipeline.counters()["backup.full"] == 2


def test_an_oversized_object_is_a_miss_and_is_written_again(
    raw_store: PageStore, backend: FakeBackend, pipeline: Pipeline
) -> None:
    """An object larger than any page of this layout is not read; the next backup replaces it."""
    name = NAMESPACE.object_name(keys_of(1)[0])
    backend.objects[name] = bytes(5 << 20)
    assert raw_store.prefetch(keys_of(1), empty_pages(1)[1]) == [False]
    assert pipeline.counters()["prefetch.unsupported:length"] == 1
    assert name in backend.objects, "it may be a newer writer's"
    _, views = random_pages(1)
    assert raw_store.backup(keys_of(1), views) == [True]
    assert raw_store.prefetch(keys_of(1), empty_pages(1)[1]) == [True]


def test_staging_memory_is_bounded(backend: FakeBackend) -> None:
    """A batch many times larger than the buffers passes through them."""
    layout = PageLayout.mha(
        dtype=DType.BF16, token_count=64, layer_count=4, head_count=2, head_size=64
    )
    namespace = Namespace(Identity.of(model="m"), layout)
    pipeline = Pipeline(backend, StoreOptions(buffer_bytes=2 << 20))
    store = PageStore(pipeline, namespace, CodecSpec())
    _, views = random_pages(64, layout=layout)
    assert all(store.backup(keys_of(64), views))
    _, target_views = empty_pages(64, layout=layout)
    assert all(store.prefetch(keys_of(64), target_views))
    assert pipeline.buffers.allocated_bytes <= 2 << 20
    pipeline.close()


def test_clear_deletes_its_own_namespace_only(pipeline: Pipeline, backend: FakeBackend) -> None:
    """Another model's pages in the same store stay."""
    other = Namespace(Identity.of(model="other", tp_rank=0), LAYOUT)
    _, views = random_pages(3)
    mine, theirs = (
        PageStore(pipeline, NAMESPACE, CodecSpec()),
        PageStore(pipeline, other, CodecSpec()),
    )
    mine.backup(keys_of(3), views)
    theirs.backup(keys_of(3), views)
    assert mine.clear() == 3
    assert mine.exists_prefix(keys_of(3)) == 0
    assert theirs.exists_prefix(keys_of(3)) == 3


def test_reading_overlaps_decoding(backend: FakeBackend) -> None:
    """With four I/O threads a slow store is read four chunks at a time, not one."""
    pipeline = Pipeline(backend, StoreOptions(buffer_bytes=64 << 20, io_threads=4))
    store = PageStore(pipeline, NAMESPACE, CodecSpec())
    _, views = random_pages(64)
    store.backup(keys_of(64), views)
    running, most = 0, 0
    lock = threading.Lock()

    def hook(operation: str, names: Sequence[str]) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1

    backend.hook = hook
    backend.batch_size = 2
    store = PageStore(pipeline, NAMESPACE, CodecSpec())
    assert all(store.prefetch(keys_of(64), empty_pages(64)[1]))
    assert most == min(4, -(-64 // store.chunk_pages))
    pipeline.close()


def test_options_out_of_range_are_refused() -> None:
    """The message names the value and the limit."""
    with pytest.raises(
        ConfigError, match="codec_threads is 0, allowed is a whole number from 1 to 64"
    ):
        StoreOptions(codec_threads=0)
    with pytest.raises(ConfigError, match="prefetch_timeout_seconds is 'soon'"):
        StoreOptions(prefetch_timeout_seconds="soon")  # type: ignore[arg-type]


def test_a_spec_that_does_not_shrink_a_page_is_refused(pipeline: Pipeline) -> None:
    """Per-channel groups of a one-token page would be longer than the page itself."""
    layout = PageLayout.mha(
        dtype=DType.BF16, token_count=1, layer_count=1, head_count=1, head_size=64
    )
    with pytest.raises(ConfigError, match="int4-channel-asym"):
        PageStore(pipeline, Namespace(Identity(), layout), CodecSpec.parse("kv4-channel"))


def test_a_layer_table_of_another_model_is_refused(pipeline: Pipeline) -> None:
    """A table that names none of this rank's layers is a mistake, not a default."""
    spec = CodecSpec.from_options({"per_layer_config": {40: {"nbits_key": 8}}})
    with pytest.raises(ConfigError, match="layer table names layers 40 to 40"):
        PageStore(pipeline, NAMESPACE, spec)


def test_a_page_larger_than_the_buffers_is_refused(backend: FakeBackend) -> None:
    """buffer_bytes too small for two pages is a start-up error."""
    pipeline = Pipeline(backend, StoreOptions(buffer_bytes=65536))
    layout = PageLayout.opaque(page_bytes=40000)
    with pytest.raises(ConfigError, match="buffer_bytes is 65536"):
        PageStore(pipeline, Namespace(Identity(), layout), CodecSpec())


def test_open_store_opens_the_backend_of_a_url() -> None:
    """A URL is enough for a store."""
    pipeline, store = open_store("memory://", NAMESPACE, CodecSpec.parse("kv4"))
    _, views = random_pages(2)
    assert all(store.backup(keys_of(2), views))
    assert store.exists(keys_of(3)) == [True, True, False]
    pipeline.close()


def test_a_malformed_url_is_a_config_error() -> None:
    """What urllib cannot split is told apart from what no backend serves."""
    with pytest.raises(ConfigError, match="is not a URL"):
        open_backend("file://[x")
    with pytest.raises(ConfigError, match="no backend for the URL 'nowhere://x'"):
        open_backend("nowhere://x")


def test_a_leading_run_is_asked_for_as_such(backend: FakeBackend, raw_store: PageStore) -> None:
    """A store that counts by itself is not asked about each page, and is not believed blindly."""
    asked: list[int] = []
    answers = [3, 0, 99]

    def count(names: Sequence[str], *, timeout_seconds: float) -> int:
        asked.append(len(names))
        return answers.pop(0)

    backend.exists_prefix = count  # type: ignore[method-assign]
    assert [raw_store.exists_prefix(keys_of(5)) for _ in range(3)] == [3, 0, 5]
    assert asked == [5, 5, 5]
    assert ("exists", 5) not in backend.calls
