"""``kvcodec bench codec``."""

from __future__ import annotations

import os

import numpy as np
import pytest
from cli_pages import run_json, run_text

from kvcodec import native
from kvcodec.cli import bench_memory, bench_text
from kvcodec.cli.bench_codec import _Case, _rotary_of
from kvcodec.cli.bench_memory import Memory, fill, layout_of
from kvcodec.cli.bench_traffic import MEMCPY, RANGE, STREAM, Sample, run_traffic, stream_isa
from kvcodec.errors import NativeError
from kvcodec.spec import CodecSpec

ISA = native.available_isas()[0]
SMALL = ["--working-set-mb", "8", "--rounds", "2", "--page-tokens", "16", "--threads", "1"]
ROW = {
    "codec": str,
    "isa": str,
    "threads": int,
    "op": str,
    "layout": str,
    "raw_to_encoded": float,
    "gb_per_s": float,
    "gb_per_s_wall": float,
    "memcpy_gb_per_s": float,
    "stream_gb_per_s": float,
    "ratio_memcpy": float,
    "ratio_memcpy_p25": float,
    "ratio_memcpy_p75": float,
    "ratio_stream": float,
    "ratio_stream_p25": float,
    "ratio_stream_p75": float,
    "samples": int,
    "undisturbed_samples": int,
}


def bench(capsys, *words: str):
    return run_json(capsys, "bench", "codec", *SMALL, *words)


def test_document_has_the_promised_shape(capsys):
    code, document, err = bench(capsys, "--codecs", "int4-g64", "--isas", ISA)
    assert (code, err) == (0, "")
    assert set(document) == {"rows", "machine", "method"}
    assert [row["op"] for row in document["rows"]] == ["encode", "decode"]
    for row in document["rows"]:
        assert {name: type(value) for name, value in row.items()} == ROW
        assert row["gb_per_s"] > 0
        assert row["ratio_memcpy_p25"] <= row["ratio_memcpy"] <= row["ratio_memcpy_p75"]
        assert row["ratio_stream_p25"] <= row["ratio_stream"] <= row["ratio_stream_p75"]
        assert row["raw_to_encoded"] == pytest.approx(16 / 4.25, rel=0.02)
    assert {"cpu", "cpus", "date", "load_before", "load_after"} <= set(document["machine"])
    method = document["method"]
    assert method["working_set_bytes"] >= 8 << 20
    assert method["page_raw_bytes"] == 28 * 2 * 4 * 128 * 2 * 16
    assert {"clock", "ratio", "stream_isa", "geometry", "rounds", "beyond_cache"} <= set(method)


def test_codecs_may_be_codecs_presets_and_specs(capsys):
    words = "raw,kv4-channel,key=int8-g64 value=int4-g64,lossless-fast"
    _, document, _ = bench(capsys, "--codecs", words, "--isas", ISA)
    found = [row["codec"] for row in document["rows"]]
    assert found[::2] == words.split(",")
    assert found[::2] == found[1::2]
    raw, mixed, lossless = (document["rows"][i] for i in (0, 4, 6))
    assert 1.2 < lossless["raw_to_encoded"] < 1.45
    assert raw["raw_to_encoded"] == pytest.approx(1, abs=0.01)
    assert mixed["raw_to_encoded"] == pytest.approx(32 / 12.5, rel=0.01)


def test_codecs_that_derotate_are_measured_with_a_rotation():
    """Without one they would leave out what they do for almost every model."""
    for text in ("kv4-derotated", "ecq-3"):
        rotary = _rotary_of(CodecSpec.parse(text), 128)
        assert rotary is not None
        assert rotary.size == 128
    assert _rotary_of(CodecSpec.parse("kv4-channel"), 128) is None


def test_isas_are_those_asked_for_and_all_by_default(capsys):
    before = native.isa()
    _, document, _ = bench(capsys, "--codecs", "raw", "--isas", "scalar")
    assert {row["isa"] for row in document["rows"]} == {"scalar"}
    _, document, _ = bench(capsys, "--codecs", "raw")
    assert {row["isa"] for row in document["rows"]} == set(native.available_isas())
    assert native.isa() == before


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_threads_are_those_asked_for(capsys):
    _, document, _ = bench(capsys, "--codecs", "raw", "--isas", ISA, "--threads", "2")
    assert {row["threads"] for row in document["rows"]} == {2}
    _, document, _ = bench(capsys, "--codecs", "raw", "--isas", ISA, "--threads", "")
    assert {row["threads"] for row in document["rows"]} == {1, 2}


def test_layouts_geometry_page_size_and_rounds_are_those_asked_for(capsys):
    _, document, _ = bench(
        capsys,
        *["--codecs", "raw", "--isas", ISA, "--rounds", "3"],
        *["--layouts", "canonical,layer_first,page_first"],
        *["--geometry", "llama3.1-8b", "--page-tokens", "8"],
    )
    layouts = [row["layout"] for row in document["rows"]]
    assert layouts[::2] == ["canonical", "layer_first", "page_first"]
    method = document["method"]
    assert method["geometry"] == "llama3.1-8b"
    assert method["page_raw_bytes"] == 32 * 2 * 8 * 128 * 2 * 8
    assert method["rounds"] == 3
    assert {row["samples"] for row in document["rows"]} == {3}


def options(**changes: object) -> bench_text.BenchOptions:
    values: dict[str, object] = {
        "codecs": "raw",
        "isas": "",
        "threads": "1",
        "layouts": "page_first",
        "geometry": "qwen2.5-7b",
        "page_tokens": 64,
        "working_set_mb": 0,
        "rounds": 0,
        "quick": False,
    }
    return bench_text.BenchOptions(**(values | changes))


def test_quick_means_few_rounds_of_little_memory():
    assert options(quick=True).working_set_bytes() == 64 << 20
    assert options(quick=True).blocks()[0].rounds == 5
    assert options(quick=True, rounds=7).blocks()[0].rounds == 7
    assert options(quick=True, working_set_mb=9).working_set_bytes() == 9 << 20
    assert options().blocks()[0].rounds == 24


def test_working_set_is_larger_than_the_caches(monkeypatch):
    monkeypatch.setattr(bench_text, "available_bytes", lambda: 1 << 50)
    monkeypatch.setattr(bench_text, "cache_bytes", lambda: 1 << 20)
    assert options().working_set_bytes() == 512 << 20
    monkeypatch.setattr(bench_text, "cache_bytes", lambda: 1 << 30)
    assert options().working_set_bytes() == 2 << 30


def test_working_set_beyond_memory_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(bench_memory, "available_bytes", lambda: 1 << 20)
    code, out, err = run_text(capsys, "bench", "codec", *SMALL)
    assert (code, out) == (1, "")
    assert "--working-set-mb" in err


@pytest.mark.parametrize(
    "words",
    [
        ["--codecs", "int3-g64"],
        ["--codecs", ""],
        ["--codecs", "raw,raw"],
        ["--isas", "mmx"],
        ["--threads", "0"],
        ["--threads", "9999"],
        ["--threads", "two"],
        ["--layouts", "sideways"],
        ["--geometry", "gpt-2"],
        ["--page-tokens", "0"],
        ["--rounds", "-1"],
        ["--working-set-mb", "x"],
    ],
)
def test_wrong_option_is_one_line_and_exit_code_1(capsys, words):
    code, out, err = run_text(capsys, "bench", "codec", *words)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1


def test_text_warns_where_the_cache_is_measured(capsys):
    code, out, _ = run_text(capsys, "bench", "codec", *SMALL, "--codecs", "raw", "--isas", ISA)
    assert code == 0
    assert "may fit the cache" in out
    assert "x memcpy" in out
    assert len([line for line in out.splitlines() if line.startswith("raw")]) == 2


# --- what it compares with


def ranges_of(source, target, read_bytes, write_bytes):
    pages = len(source) // read_bytes
    ranges = np.zeros(pages, RANGE)
    ranges["source"] = source.ctypes.data + np.arange(pages) * read_bytes
    ranges["target"] = target.ctypes.data + np.arange(pages) * write_bytes
    ranges["read_bytes"], ranges["write_bytes"] = read_bytes, write_bytes
    return ranges


def aligned(size: int, fill_byte: int) -> np.ndarray:
    memory = np.full(size + 64, fill_byte, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_memcpy_copies_every_page(threads):
    source = np.random.default_rng(0).integers(0, 256, 30_000, np.uint8)
    target = np.zeros_like(source)
    sample = run_traffic(MEMCPY, ranges_of(source, target, 1000, 1000), threads)
    assert np.array_equal(source, target)
    assert sample.wall_seconds > 0
    assert sample.cpu_seconds > 0


@pytest.mark.parametrize(("read", "write"), [(64, 64), (8192, 2304), (2304, 8192), (64, 8192)])
@pytest.mark.parametrize("threads", [1, 3])
def test_stream_reads_and_writes_everything(read, write, threads):
    """The xor of what was read is what is written: one line of ones changes all of the target."""
    pages = 5
    source, target = aligned(pages * read, 0), aligned(pages * write, 7)
    source.reshape(pages, read)[:, :64] = 255
    run_traffic(STREAM, ranges_of(source, target, read, write), threads)
    assert not (target == 7).any()
    assert stream_isa() in ("avx512", "avx2", "portable")


def test_stream_stays_inside_its_target():
    source, target = aligned(4096, 1), aligned(4096, 7)
    run_traffic(STREAM, ranges_of(source, target[:2048], 4096, 2048), 1)
    assert (target[2048:] == 7).all()


@pytest.mark.parametrize(
    ("kind", "read", "write", "threads"),
    [
        (STREAM, 100, 64, 1),
        (STREAM, 64, 100, 1),
        (MEMCPY, 64, 128, 1),
        (MEMCPY, 64, 64, 0),
        (9, 64, 64, 1),
    ],
)
def test_impossible_traffic_is_refused(kind, read, write, threads):
    source, target = aligned(256, 0), aligned(256, 7)
    with pytest.raises(NativeError):
        run_traffic(kind, ranges_of(source, target, read, write)[:1], threads)
    assert (target == 7).all()


# --- how it counts


def test_one_threads_samples_are_all_used():
    case = _Case(lambda chunk: Sample(1, 1), {at: Sample(1.0 + at, 0.1) for at in range(8)})
    assert set(case.chosen(1)) == set(range(8))


def test_samples_off_the_processor_are_left_out():
    good = {at: Sample(1.0, 1.98) for at in range(6)}
    bad = {at: Sample(2.0, 2.0) for at in range(6, 9)}
    case = _Case(lambda chunk: Sample(1, 1), good | bad)
    assert case.undisturbed(2) == set(range(6))
    assert set(case.chosen(2)) == set(range(6))


def test_least_disturbed_samples_make_up_for_too_few():
    samples = {at: Sample(1.0, 1.0 + at / 10) for at in range(8)}
    case = _Case(lambda chunk: Sample(1, 1), samples)
    assert case.undisturbed(2) == set()
    assert set(case.chosen(2)) == {3, 4, 5, 6, 7}


def test_no_traffic_leaves_its_memory():
    layout = layout_of("qwen2.5-7b", 1)
    memory = Memory.allocate(layout, 4 * layout.raw_bytes, 2 * layout.raw_bytes)
    last, page_bytes = memory.chunk_count - 1, layout.raw_bytes + 1600
    with pytest.raises(AssertionError):
        memory.ranges(last, memory.source, layout.raw_bytes, memory.decoded, page_bytes)
    ranges = memory.ranges(last, memory.source, layout.raw_bytes, memory.streamed, page_bytes)
    end = int(ranges["target"][-1]) + page_bytes
    assert end <= memory.streamed.ctypes.data + len(memory.streamed)


def test_codec_that_makes_pages_far_larger_is_refused(capsys):
    words = ["--codecs", "int8-channel-asym-g1", "--page-tokens", "1", "--isas", "scalar"]
    code, _, err = run_text(capsys, "bench", "codec", *SMALL, *words)
    assert code == 1
    assert "--page-tokens" in err


@pytest.mark.parametrize("axes", list(bench_memory.AXES))
def test_views_show_the_same_memory_in_another_order(axes):
    layout = layout_of("qwen2.5-7b", 1)
    memory = Memory.allocate(layout, 4 * layout.raw_bytes, 2 * layout.raw_bytes)
    fill(memory)
    views = memory.views(memory.source, axes)
    assert len(views) == memory.page_count
    strides = views.strides[0]
    row = 128 * 2
    assert (strides.layer_bytes, strides.head_bytes, strides.token_bytes) == {
        "canonical": (4 * row, row, row),
        "page_first": (4 * row, row, 28 * 4 * row),
        "layer_first": (memory.page_count * 4 * row, row, 4 * row),
    }[axes]
