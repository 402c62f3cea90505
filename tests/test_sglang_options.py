"""The options of the SGLang adapter: each one changes what happens, or is refused at start-up."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from fake_backend import FakeBackend
from sglang_fakes import KEYS, PAGE_SIZE, Opener, fake_pool, slots_of, storage_opener
from waiting import wait_until

from kvcodec.errors import ConfigError
from kvcodec.extension import Extension
from kvcodec.format import EncodedPage
from kvcodec.sglang.options import KNOWN_OPTIONS, SGLANG_OPTIONS, AdapterOptions
from kvcodec.spec import PRESETS, SPEC_OPTIONS, CodecSpec
from kvcodec.store import StoreOptions

if TYPE_CHECKING:
    from kvcodec.sglang.storage import KVCodecStorage

needs_sglang = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="SGLang is not installed: make sglang"
)

URL = "memory://"
PASS_PREFIX_KEYS = "hicache_storage_pass_prefix_keys"


# --- what is read


def test_url_alone_is_enough():
    options = AdapterOptions.parse({"url": URL})
    assert options.url == URL
    assert options.spec == CodecSpec.parse("kv4")
    assert options.store == StoreOptions()


@pytest.mark.parametrize("extra", [None, {}, {"preset": "kv4"}, {"url": ""}])
def test_missing_url_is_refused_with_an_example(extra: Mapping[str, object] | None):
    with pytest.raises(ConfigError, match=r"'url'.*file:///"):
        AdapterOptions.parse(extra)


@pytest.mark.parametrize("name", sorted(SGLANG_OPTIONS))
def test_options_of_sglang_are_left_alone(name: str):
    assert AdapterOptions.parse({"url": URL, name: 1}).url == URL


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("presett", "preset"),
        ("nbit_key", "nbits_key"),
        ("residual_lenght", "residual_length"),
        ("prefetch_treshold", "prefetch_threshold"),
        ("sink_token", "sink_tokens"),
    ],
)
def test_unknown_option_names_the_nearest_known_one(name: str, near: str):
    with pytest.raises(ConfigError, match=f"unknown option '{name}'.*did you mean.*{near}"):
        AdapterOptions.parse({"url": URL, name: 1})


def test_option_unlike_any_other_gets_the_whole_list():
    with pytest.raises(ConfigError) as caught:
        AdapterOptions.parse({"url": URL, "zzz": 1})
    for name in KNOWN_OPTIONS:
        assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("url", 5),
        ("namespace", None),
        ("salt", 7),
        ("preset", "kv3"),
        ("preset", 4),
        ("protected_preset", "best"),
        ("residual_length", -1),
        ("residual_length", True),
        ("residual_length", 1.5),
        ("sink_tokens", "4"),
        ("sink_tokens", 1 << 40),
        ("codec_threads", 0),
        ("io_threads", "many"),
        ("buffer_bytes", "lots"),
        ("buffer_bytes", 1),
        ("prefetch_timeout_seconds", 0),
        ("minimum_bits", 64),
        ("max_page_bytes", -1),
        ("max_page_bytes", "small"),
        ("breaker_failures", -1),
        ("breaker_cooldown_seconds", 0),
        ("nbits_key", 3),
    ],
)
def test_value_that_is_not_allowed_is_refused(name: str, value: object):
    with pytest.raises(ConfigError):
        AdapterOptions.parse({"url": URL, "residual_length": 64, name: value})


def test_buffer_bytes_may_have_a_unit():
    assert AdapterOptions.parse({"url": URL, "buffer_bytes": "64MiB"}).store.buffer_bytes == 1 << 26


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_can_be_chosen(preset: str):
    assert AdapterOptions.parse({"url": URL, "preset": preset}).spec == CodecSpec.parse(preset)


def test_sink_tokens_need_the_keys_of_the_prefix():
    extra = {"url": URL, "sink_tokens": 4}
    with pytest.raises(ConfigError, match=PASS_PREFIX_KEYS):
        AdapterOptions.parse({**extra, PASS_PREFIX_KEYS: False})
    assert AdapterOptions.parse({**extra, PASS_PREFIX_KEYS: True}).sink_tokens == 4
    assert AdapterOptions.parse(extra).passes_prefix_keys is None


def test_protected_preset_alone_would_do_nothing_and_is_refused():
    with pytest.raises(ConfigError, match="no effect"):
        AdapterOptions.parse({"url": URL, "protected_preset": "kv8"})


def test_salt_is_kept_nowhere():
    options = AdapterOptions.parse({"url": URL, "salt": "swordfish"})
    assert options.salt_digest
    assert "swordfish" not in repr(options)


# --- what it does


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def open_storage(backend: FakeBackend) -> Iterator[Opener]:
    with storage_opener(backend) as opener:
        yield lambda pool=None, config=None, **options: opener(
            pool or fake_pool("mha", "page_first"), config, **options
        )


def back_up(
    storage: KVCodecStorage, count: int = 4, prefix_keys: Sequence[str] | None = ()
) -> None:
    extra_info = SimpleNamespace(prefix_keys=None if prefix_keys is None else list(prefix_keys))
    stored = storage.batch_set_v1(KEYS[:count], slots_of(*range(count)), extra_info)
    assert stored == [True] * count


def codecs_of(backend: FakeBackend) -> list[str]:
    """The codecs of each stored page, in the order of their keys."""
    pages = [EncodedPage.parse(page).header for page in backend.objects.values()]
    pages.sort(key=lambda header: header.key)
    return [" ".join(codec.text for codec in header.codecs) for header in pages]


LAYER_TABLE = {"1": {"nbits_key": 8, "nbits_value": 2}}
CODEC_OPTIONS: dict[str, tuple[str, dict[str, object], object]] = {
    "preset": ("mha", {}, "kv8"),
    "spec": ("mha", {}, "key=int8-g8 value=raw"),
    "rope": ("mla", {}, "int4-g8"),
    "nbits_key": ("mha", {}, 8),
    "nbits_value": ("mha", {}, 2),
    "asym": ("mha", {}, True),
    "axis_key": ("mha", {}, 1),
    "axis_value": ("mha", {}, 1),
    "q_group_size": ("mha", {}, 8),
    "per_layer_config": ("mha", {}, LAYER_TABLE),
    "per_layer_config_path": ("mha", {}, "layers.yaml"),
    "residual_length": ("mha", {}, 32),
    "sink_tokens": ("mha", {}, 16),
    "protected_preset": ("mha", {"residual_length": 16}, "kv8"),
}


@needs_sglang
@pytest.mark.parametrize("name", sorted(CODEC_OPTIONS))
def test_codec_option_changes_how_pages_are_encoded(
    name: str, backend: FakeBackend, open_storage: Opener, tmp_path: Path
):
    kind, others, value = CODEC_OPTIONS[name]
    if name == "per_layer_config_path":
        value = str(tmp_path / "layers.yaml")
        Path(value).write_text(json.dumps({1: LAYER_TABLE["1"]}))
    back_up(open_storage(fake_pool(kind, "page_first"), **others))
    plain = codecs_of(backend)
    backend.objects.clear()
    back_up(open_storage(fake_pool(kind, "page_first"), **others, **{name: value}))
    assert len(codecs_of(backend)) == len(plain) == 4
    assert codecs_of(backend) != plain


@needs_sglang
def test_layer_table_reaches_its_layer(backend: FakeBackend, open_storage: Opener):
    back_up(open_storage(per_layer_config=LAYER_TABLE))
    codecs = codecs_of(backend)[0].split()
    assert codecs[2:4] == ["int8-g16", "int2-asym-g16"]
    assert set(codecs[:2] + codecs[4:]) == {"int4-g16"}


PROFILE = {
    "kvcodec_profile": 1,
    "model": {"layers": 5, "kv_heads": 4, "key_head_size": 16, "value_head_size": 16},
    "points": [{"bits": 4.5, "spec": "key=int4-g16 value=int4-g16 layer.1=int8-g16,int2-asym-g16"}],
}


@needs_sglang
def test_profile_chooses_the_codecs_and_is_named_by_the_pages(
    backend: FakeBackend, open_storage: Opener, tmp_path: Path
):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE))
    back_up(open_storage(spec=f"profile:{path}@4.5"))
    codecs = codecs_of(backend)[0].split()
    assert codecs[2:4] == ["int8-g16", "int2-asym-g16"]
    digest = hashlib.sha256(path.read_bytes()).digest()
    for page in backend.objects.values():
        assert EncodedPage.parse(page).header.extensions == (Extension(1, digest),)


def test_pool_of_other_layers_does_not_go_by_the_profile(tmp_path: Path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE))
    options = AdapterOptions.parse({"url": URL, "spec": f"profile:{path}@4.5"})
    draft = options.without_layers().spec
    assert (draft.text, draft.profile) == ("key=int4-g16 value=int4-g16", None)


@needs_sglang
def test_profile_of_a_deeper_model_is_refused_but_for_a_rank_with_some_of_its_layers(
    backend: FakeBackend, open_storage: Opener, tmp_path: Path
):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE | {"model": PROFILE["model"] | {"layers": 6}}))
    with pytest.raises(ConfigError, match="layers 6, this one has 5"):
        open_storage(spec=f"profile:{path}@4.5")
    back_up(open_storage(spec=f"profile:{path}@4.5", config={"pp_size": 2}))


@needs_sglang
@pytest.mark.parametrize(
    ("tokens", "pages"), [(0, 0), (1, 1), (PAGE_SIZE, 1), (PAGE_SIZE + 1, 2), (1000, 4)]
)
def test_residual_length_is_rounded_up_to_pages(
    tokens: int, pages: int, backend: FakeBackend, open_storage: Opener
):
    back_up(open_storage(residual_length=tokens))
    raw = [codecs.startswith("raw") for codecs in codecs_of(backend)]
    assert raw == [False] * (4 - pages) + [True] * pages


@needs_sglang
@pytest.mark.parametrize(
    ("prefix_pages", "protected"),
    [(0, [True, True, False, False]), (1, [True, False, False, False]), (2, [False] * 4)],
)
def test_sink_tokens_are_the_first_of_the_sequence_not_of_the_call(
    prefix_pages: int,
    protected: list[bool],
    backend: FakeBackend,
    open_storage: Opener,
):
    back_up(open_storage(sink_tokens=PAGE_SIZE + 1), prefix_keys=["before"] * prefix_pages)
    assert [codecs.startswith("raw") for codecs in codecs_of(backend)] == protected


@needs_sglang
def test_pages_of_unknown_position_are_all_protected(backend: FakeBackend, open_storage: Opener):
    storage = open_storage(sink_tokens=1)
    back_up(storage, prefix_keys=None)
    assert all(codecs.startswith("raw") for codecs in codecs_of(backend))
    assert storage.counters()["sglang.position_unknown"] == 1


@needs_sglang
def test_protected_and_plain_pages_are_read_side_by_side(
    open_storage: Opener,
):
    storage = open_storage(residual_length=PAGE_SIZE, sink_tokens=PAGE_SIZE)
    back_up(storage)
    assert storage.batch_get_v1(KEYS[:4], slots_of(0, 1, 2, 3)) == [True] * 4


@needs_sglang
@pytest.mark.parametrize("name", ["namespace", "revision", "salt"])
def test_identity_option_keeps_pages_apart(name: str, backend: FakeBackend, open_storage: Opener):
    back_up(open_storage(**{name: "first tenant"}))
    assert open_storage(**{name: "first tenant"}).batch_exists(KEYS) == 4
    for others in ({name: "second tenant"}, {}):
        other = open_storage(**others)
        assert other.batch_exists(KEYS) == 0
        assert other.batch_get_v1(KEYS[:4], slots_of(0, 1, 2, 3)) == [False] * 4
    if name == "salt":
        assert not any(b"first tenant" in page for page in backend.objects.values())


@needs_sglang
def test_minimum_bits_makes_coarser_pages_misses(open_storage: Opener):
    back_up(open_storage(preset="kv4"))
    reader = open_storage(preset="kv8", minimum_bits=8)
    assert reader.batch_get_v1(KEYS[:4], slots_of(0, 1, 2, 3)) == [False] * 4
    assert reader.counters()["prefetch.quality:bits"] == 4
    back_up(reader)
    assert reader.batch_get_v1(KEYS[:4], slots_of(0, 1, 2, 3)) == [True] * 4


@needs_sglang
def test_max_page_bytes_takes_bits_from_ecq(backend: FakeBackend, open_storage: Opener):
    spec = "key=ecq-6-channel value=ecq-6 rope=int2"
    back_up(open_storage(fake_pool("mla", "page_first"), spec=spec))
    limit = min(map(len, backend.objects.values())) * 3 // 4
    backend.objects.clear()
    storage = open_storage(fake_pool("mla", "page_first"), spec=spec, max_page_bytes=limit)
    back_up(storage)
    assert [len(page) <= limit for page in backend.objects.values()] == [True] * 4
    assert storage.counters()["backup.reencoded"] >= 1
    assert storage.batch_get_v1(KEYS[:4], slots_of(0, 1, 2, 3)) == [True] * 4


@needs_sglang
def test_max_page_bytes_that_no_page_can_have_stops_the_server(open_storage: Opener):
    """Protected pages are part of it, if there are any."""
    with pytest.raises(ConfigError, match=r"max_page_bytes is 4096, .* takes at least \d+"):
        open_storage(max_page_bytes="4KiB")
    open_storage(max_page_bytes=12000)
    with pytest.raises(ConfigError, match=r"'key=raw value=raw' takes at least"):
        open_storage(max_page_bytes=12000, residual_length=1)


@needs_sglang
@pytest.mark.parametrize(("failures", "calls"), [(0, 6), (1, 1), (4, 4)])
def test_breaker_failures_bound_the_calls_into_a_failing_store(
    failures: int, calls: int, backend: FakeBackend, open_storage: Opener
):
    storage = open_storage(breaker_failures=failures, breaker_cooldown_seconds=60)

    def fail(called: str, _: Sequence[str]) -> None:
        raise OSError(called)

    backend.hook = fail
    backend.calls.clear()
    for _ in range(6):
        assert storage.batch_exists(KEYS) == 0
    assert len(backend.calls) == calls


@needs_sglang
def test_breaker_cooldown_is_how_long_a_store_is_left_alone(
    backend: FakeBackend, open_storage: Opener
):
    def fail(called: str, _: Sequence[str]) -> None:
        if called == "exists":
            raise OSError(called)

    for seconds, back in ((0.05, True), (60, False)):
        storage = open_storage(breaker_failures=1, breaker_cooldown_seconds=seconds)
        back_up(storage)
        backend.hook = fail
        assert storage.batch_exists(KEYS) == 0
        backend.hook = lambda called, _: None
        if back:
            wait_until(lambda asked=storage: asked.batch_exists(KEYS) == 4)  # type: ignore[misc]
        else:
            time.sleep(0.5)
            assert storage.batch_exists(KEYS) == 0


TIMEOUTS: dict[str, tuple[str, Callable[[KVCodecStorage], object]]] = {
    "exists_timeout_seconds": ("exists", lambda storage: storage.batch_exists(KEYS)),
    "prefetch_timeout_seconds": (
        "get",
        lambda storage: any(storage.batch_get_v1(KEYS[:2], slots_of(0, 1))),
    ),
    "backup_timeout_seconds": (
        "put",
        lambda storage: any(storage.batch_set_v1(KEYS[:2], slots_of(0, 1))),
    ),
}


@needs_sglang
@pytest.mark.parametrize("name", sorted(TIMEOUTS))
def test_time_out_bounds_the_call(name: str, backend: FakeBackend, open_storage: Opener):
    operation, call = TIMEOUTS[name]
    release = threading.Event()

    def hang(called: str, _: Sequence[str]) -> None:
        if called == operation:
            release.wait(30)

    backend.hook = hang
    storage = open_storage(**{name: 0.2})
    start = time.monotonic()
    assert not call(storage)
    assert 0.1 < time.monotonic() - start < 15.0  # the store would take 30
    release.set()


@needs_sglang
def test_io_threads_bound_the_calls_under_way(backend: FakeBackend, open_storage: Opener):
    active: list[int] = []
    most: dict[int, int] = {}
    lock = threading.Lock()

    def count(*_: object) -> None:
        with lock:
            active.append(1)
            most[threads] = max(most.get(threads, 0), len(active))
        time.sleep(0.05)
        with lock:
            active.pop()

    backend.hook = count
    for threads in (1, 4):
        storage = open_storage(io_threads=threads)
        readers = [threading.Thread(target=storage.batch_exists, args=(KEYS,)) for _ in range(6)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert most == {1: 1, 4: 4}


def codec_thread_count() -> int:
    """The native library names its threads ``kvcodec-0`` and so on."""
    tasks = Path("/proc/self/task").glob("*/comm")
    return sum(task.read_text().strip()[:-1] == "kvcodec-" for task in tasks)


@needs_sglang
def test_codec_threads_are_that_many(backend: FakeBackend, open_storage: Opener):
    for threads in (1, 3):
        backend.objects.clear()
        storage = open_storage(codec_threads=threads)
        before = codec_thread_count()
        back_up(storage)
        assert codec_thread_count() - before == threads


@needs_sglang
def test_buffer_bytes_too_small_for_two_pages_is_refused(
    open_storage: Opener,
):
    pool = fake_pool("mha", "page_first", "float32")
    assert 2 * pool.size_per_token * PAGE_SIZE > 1 << 16
    with pytest.raises(ConfigError, match="buffer_bytes"):
        open_storage(pool, buffer_bytes=1 << 16)
    open_storage(pool, buffer_bytes="1MiB")


@needs_sglang
def test_url_is_where_pages_go(tmp_path: Path):
    from kvcodec.sglang import KVCodecStorage

    config = SimpleNamespace(model_name="tiny", extra_config={"url": f"file://{tmp_path}/store"})
    storage = KVCodecStorage(config, fake_pool("mha", "page_first"))
    back_up(storage)
    storage.close()
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(data.startswith(b"\x89KVC") for data in files) == 4


TESTED_OPTIONS = (
    set(CODEC_OPTIONS)
    | set(TIMEOUTS)
    | {"namespace", "revision", "salt", "minimum_bits"}
    | {"io_threads", "codec_threads", "buffer_bytes", "url"}
    | {"breaker_failures", "breaker_cooldown_seconds", "max_page_bytes"}
    | {"rotary", "auto_candidates"}  # tests/test_sglang_rotation.py, tests/test_auto.py
)


def test_every_option_has_a_test_of_what_it_does():
    assert TESTED_OPTIONS == KNOWN_OPTIONS
    assert set(CODEC_OPTIONS) >= SPEC_OPTIONS
