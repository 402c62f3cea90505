"""Pages through SGLang's real cache controller: device, host, kvcodec, and back to the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sglang_controller import ControllerSession
from sglang_harness import HAS_SGLANG, HiCacheSession, make_tokens
from sglang_round_trip import (
    PAGES,
    bits_of,
    expected_rows,
    name_of,
    round_trip,
    url_of,
)

from kvcodec.layout import DType, Role

pytestmark = pytest.mark.skipif(not HAS_SGLANG, reason="SGLang is not installed: make sglang")

DYNAMIC = {
    "backend_name": "kvcodec",
    "module_path": "kvcodec.sglang",
    "class_name": "KVCodecStorage",
    "interface_v1": 1,
}
DTYPES = {
    "bf16": DType.BF16,
    "fp16": DType.FP16,
    "fp32": DType.FP32,
    "fp8_e4m3": DType.FP8_E4M3,
    "fp8_e5m2": DType.FP8_E5M2,
}
ROLES = {"k": Role.KEY, "v": Role.VALUE, "swa_k": Role.KEY, "swa_v": Role.VALUE}


RAW_CONFIGURATIONS: list[dict[str, Any]] = [
    {"layout": "layer_first"},
    {"layout": "layer_first", "io_backend": "direct"},
    {"layout": "page_first"},
    {"layout": "page_first_direct"},
    {"layout": "page_head"},
    {"layout": "page_first", "page_size": 1},
    {"layout": "page_first", "page_size": 64, "head_size": 80},
    {"layout": "page_first", "dtype": "fp16"},
    {"layout": "page_head", "dtype": "fp8_e4m3"},
    {"layout": "layer_first", "dtype": "fp8_e5m2"},
    {"kind": "mla", "layout": "layer_first"},
    {"kind": "mla", "layout": "page_first"},
    {"kind": "mla", "layout": "page_first_direct"},
    {"kind": "mla", "layout": "page_first", "dtype": "fp16"},
    {"kind": "mla", "layout": "page_first", "dtype": "fp8_e4m3"},
    {"kind": "swa", "layout": "page_first"},
    {"kind": "swa", "layout": "page_first_direct"},
    {"kind": "swa", "layout": "page_first", "dtype": "fp8_e4m3"},
    {"kind": "asymmetric", "layout": "page_first"},
    {"kind": "asymmetric", "layout": "page_first_direct"},
    {"tp_rank": 1, "tp_size": 2},
]


@pytest.mark.parametrize("configuration", RAW_CONFIGURATIONS, ids=name_of)
def test_raw_pages_come_back_bit_exact(configuration: dict[str, Any], tmp_path: Path):
    _, original, rows, counters = round_trip(tmp_path, {"preset": "raw"}, **configuration)
    assert rows.equals(original)
    swa = configuration.get("kind") == "swa"
    pages = original.token_count // configuration.get("page_size", 16)
    assert counters["prefetch.hit"] == pages + (4 if swa else 0)
    assert not [name for name in counters if name.startswith("sglang.")]


@pytest.mark.parametrize("preset", ["lossless", "lossless-fast"])
def test_lossless_preset_brings_every_bit_back(preset: str, tmp_path: Path):
    _, original, rows, counters = round_trip(
        tmp_path, {"preset": preset}, layout="page_first", page_size=32
    )
    assert rows.equals(original)
    assert counters["backup.encoded_bytes"] < counters["backup.raw_bytes"]


LOSSY = ["kv8", "kv4", "kv2", "k8v4", "kv8-asym", "kv4-asym", "kv8-channel", "kv4-channel"]


@pytest.mark.parametrize("preset", [*LOSSY, "kv2-channel", "ecq-3"])
@pytest.mark.parametrize("layout", ["layer_first", "page_first"])
def test_rows_are_what_the_reference_codec_makes_of_them(preset: str, layout: str, tmp_path: Path):
    """Bit for bit, hence within the error that the reference's own tests bound."""
    _, original, rows, counters = round_trip(
        tmp_path, {"preset": preset}, layout=layout, page_size=32
    )
    for name, before in original.rows.items():
        expected = expected_rows(bits_of(before), ROLES[name], preset, DType.BF16, 32)
        assert np.array_equal(bits_of(rows.rows[name]), expected)
        assert not np.array_equal(bits_of(before), expected)
    assert counters["backup.encoded_bytes"] < 0.7 * counters["backup.raw_bytes"]
    assert counters["backup.raw_bytes"] == sum(rows.nbytes for rows in original.rows.values())


@pytest.mark.parametrize(
    "configuration",
    [
        {"layout": "page_first_direct"},
        {"layout": "page_head"},
        {"layout": "page_first", "dtype": "fp16"},
        {"layout": "page_first", "kind": "asymmetric"},
        {"layout": "page_first", "kind": "swa"},
    ],
    ids=name_of,
)
def test_every_pool_is_encoded_as_the_reference_does(configuration: dict[str, Any], tmp_path: Path):
    session, original, rows, _ = round_trip(tmp_path, {"preset": "k8v4"}, **configuration)
    dtype = DTYPES[session.dtype]
    for name, before in original.rows.items():
        expected = expected_rows(bits_of(before), ROLES[name], "k8v4", dtype, session.page_size)
        assert np.array_equal(bits_of(rows.rows[name]), expected)
    for name, after in rows.swa.items():
        before = original.swa[name][:, -after.shape[1] :]
        expected = expected_rows(bits_of(before), ROLES[name], "k8v4", dtype, session.page_size)
        assert np.array_equal(bits_of(after), expected)


@pytest.mark.parametrize("layout", ["layer_first", "page_first", "page_first_direct"])
def test_latent_and_rope_are_encoded_apart(layout: str, tmp_path: Path):
    spec = "key=int4-g64 value=int4-g64 rope=int8-g32"
    session, original, rows, _ = round_trip(tmp_path, {"spec": spec}, kind="mla", layout=layout)
    before, after = bits_of(original.rows["latent"]), bits_of(rows.rows["latent"])
    rank = session.kv_lora_rank
    for part, role in ((slice(rank), Role.LATENT), (slice(rank, None), Role.ROPE)):
        expected = expected_rows(before[..., part], role, spec, DType.BF16, session.page_size)
        assert np.array_equal(after[..., part], expected)


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_pools_are_stored_raw_whatever_the_preset(dtype: str, tmp_path: Path):
    _, original, rows, _ = round_trip(tmp_path, {"preset": "kv4"}, dtype=dtype)
    assert rows.equals(original)


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_bare_controller_brings_rows_back(kind: str, tmp_path: Path):
    _, original, rows, _ = round_trip(tmp_path, {"preset": "raw"}, ControllerSession, kind=kind)
    assert rows.equals(original)


@pytest.mark.parametrize("interface", [0, 1])
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_dynamic_backend_needs_no_host_pool_at_first(kind: str, interface: int, tmp_path: Path):
    """With interface_v1 0 SGLang moves pages as flat tensors."""
    extra = {"url": url_of(tmp_path), "preset": "raw", **DYNAMIC, "interface_v1": interface}
    _, original, rows, counters = round_trip(
        tmp_path, {}, backend="dynamic", kind=kind, extra=extra
    )
    assert rows.equals(original)
    assert counters["prefetch.hit"] == PAGES


@pytest.mark.parametrize(
    "configuration",
    [
        {"layout": "layer_first"},
        {"layout": "page_first"},
        {"layout": "page_first_direct"},
        {"layout": "page_head"},
        {"kind": "mla", "layout": "layer_first"},
        {"kind": "mla", "layout": "page_first"},
        {"kind": "mla", "layout": "page_first_direct"},
    ],
    ids=name_of,
)
def test_flat_tensors_and_pages_in_place_are_the_same_pages(
    configuration: dict[str, Any], tmp_path: Path
):
    settings = {"extra": {"url": url_of(tmp_path), "preset": "kv4"}, **configuration}
    with HiCacheSession(backend="kvcodec", **settings) as session:
        tokens = make_tokens(PAGES * 16, seed=1)
        session.controller.page_set_func = session.controller._generic_page_set
        session.backup(tokens, seed=1)
        session.evict()
        in_place = session.prefetch(tokens)
        session.evict()
        session.controller.page_get_func = session.controller._generic_page_get
        flat = session.prefetch(tokens)
        assert in_place.rows is not None
        assert flat.rows is not None
        assert flat.storage_hit_tokens == in_place.storage_hit_tokens == len(tokens)
        assert flat.rows.equals(in_place.rows)


@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_pages_are_the_same_whatever_the_host_layout(kind: str, tmp_path: Path):
    layouts = ["layer_first", "page_first", "page_first_direct"]
    original, _ = None, None
    for writer, reader in zip(layouts, layouts[1:] + layouts[:1], strict=True):
        extra = {"url": url_of(tmp_path / writer), "preset": "raw"}
        tokens = make_tokens(64, seed=3)
        with HiCacheSession(kind=kind, layout=writer, backend="kvcodec", extra=extra) as session:
            original = session.backup(tokens, seed=3)
        with HiCacheSession(kind=kind, layout=reader, backend="kvcodec", extra=extra) as session:
            result = session.prefetch(tokens)
        assert result.rows is not None
        assert result.rows.equals(original)


WRITER: dict[str, Any] = {"dtype": "bf16", "served_model_name": "one", "layer_count": 3}


@pytest.mark.parametrize(
    "reader",
    [
        {"dtype": "fp16"},
        {"served_model_name": "another"},
        {"layer_count": 4},
        {"head_count": 4},
        {"head_size": 128},
        {"page_size": 32},
        {"tp_rank": 1, "tp_size": 2},
        {"tp_rank": 0, "tp_size": 2},
        {"kind": "mla"},
    ],
    ids=name_of,
)
def test_pages_of_something_else_are_misses(reader: dict[str, Any], tmp_path: Path):
    extra = {"url": url_of(tmp_path)}
    tokens = make_tokens(64, seed=4)
    with HiCacheSession(backend="kvcodec", extra=extra, **WRITER) as session:
        session.backup(tokens, seed=4)
        session.evict()
        assert session.prefetch(tokens).storage_hit_tokens == 64
    with HiCacheSession(backend="kvcodec", extra=extra, **(WRITER | reader)) as session:
        assert session.prefetch(tokens).storage_hit_tokens == 0


def test_fp8_kinds_of_equal_size_are_not_mistaken(tmp_path: Path):
    """Both lie in the host pool as plain bytes; only the plugin knows which is which."""
    extra = {"url": url_of(tmp_path)}
    tokens = make_tokens(64, seed=4)
    with HiCacheSession(backend="kvcodec", extra=extra, dtype="fp8_e4m3") as session:
        session.backup(tokens, seed=4)
    with HiCacheSession(backend="kvcodec", extra=extra, dtype="fp8_e5m2") as session:
        assert session.storage._pools["kv"].store.layout.dtype is DType.FP8_E5M2
        assert session.prefetch(tokens).storage_hit_tokens == 0
