"""The rotation of keys: its record, its table, and the config fields that it comes from."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcodec.errors import ConfigError
from kvcodec.rotary import INTERLEAVED, SPLIT, Rotary, rotary_of_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LINEAR = {"rope_type": "linear", "factor": 2.5}


def config(**fields: Any) -> dict[str, Any]:
    base = {"hidden_size": 512, "num_attention_heads": 4, "rope_theta": 1e6}
    return {**base, "max_position_embeddings": 32768, **fields}


def found(**fields: Any) -> Rotary:
    rotary, reason = rotary_of_config(config(**fields))
    assert rotary is not None, reason
    assert reason == ""
    return rotary


# --- the record


@st.composite
def rotaries(draw: st.DrawFn) -> Rotary:
    half = draw(st.integers(1, 70))
    frequency = st.floats(0, 8, width=32)
    frequencies = draw(st.lists(frequency, min_size=half, max_size=half))
    return Rotary(2 * half, draw(st.sampled_from([SPLIT, INTERLEAVED])), tuple(frequencies))


@settings(max_examples=100, deadline=None)
@given(rotaries())
def test_record_round_trip(rotary: Rotary):
    assert Rotary.from_record(rotary.record) == rotary
    assert len(rotary.record) == 8 + 2 * rotary.size


def test_record_is_as_documented():
    record = Rotary(4, INTERLEAVED, (1.0, 0.25)).record
    assert record == struct.pack("<HBBIff", 4, 1, 0, 0, 1.0, 0.25)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<HBBI", 0, 0, 0, 0),
        struct.pack("<HBBIf", 3, 0, 0, 0, 1),
        struct.pack("<HBBIf", 2, 2, 0, 0, 1),
        struct.pack("<HBBIf", 2, 0, 1, 0, 1),
        struct.pack("<HBBIf", 2, 0, 0, 1, 1),
        struct.pack("<HBBIff", 2, 0, 0, 0, 1, 1),
        struct.pack("<HBBIf", 2, 0, 0, 0, math.nan),
        struct.pack("<HBBIf", 2, 0, 0, 0, math.inf),
        struct.pack("<HBBIf", 2, 0, 0, 0, -0.5),
        struct.pack("<HBBIf", 2, 0, 0, 0, 8.5),
    ],
)
def test_damaged_record_is_refused(data: bytes):
    with pytest.raises(ConfigError):
        Rotary.from_record(data)


def test_frequencies_are_numbers_of_binary32():
    with pytest.raises(ConfigError, match="binary32"):
        Rotary(2, SPLIT, (0.1,))
    with pytest.raises(ConfigError, match="2 are needed"):
        Rotary(4, SPLIT, (0.5,))


@pytest.mark.parametrize(("style", "pairs"), [(SPLIT, [[0, 2], [1, 3]]), (1, [[0, 1], [2, 3]])])
def test_pairs(style: int, pairs: list[list[int]]):
    assert Rotary(4, style, (1.0, 0.5)).pairs.tolist() == pairs


# --- the table


@pytest.mark.parametrize("tokens", [1, 64, 65536])
def test_table_is_the_nearest_cosine_and_sine(tokens: int):
    """Within one unit in the last place of binary32, at angles up to half a million radians."""
    frequencies = (0.0, 1.0, 8.0, float(np.float32(0.8659643)), 2.0**-20, float(np.float32(1e-4)))
    rotary = Rotary(12, SPLIT, frequencies)
    table = rotary.table(tokens)
    assert table.shape == (tokens, 6, 2) and table.dtype == np.float32
    for token in {0, tokens // 3, tokens - 1}:
        for pair, frequency in enumerate(frequencies):
            angle = frequency * token
            for value, exact in zip(
                table[token, pair].tolist(), (math.cos(angle), math.sin(angle)), strict=True
            ):
                assert abs(value - exact) <= 2.0**-24 * max(abs(exact), 2.0**-20)


def test_table_has_these_bits():
    """A golden value: every machine has to compute the same."""
    frequencies = tuple((64 - pair) / 64 for pair in range(64))
    words = Rotary(128, SPLIT, frequencies).table(1024).view(np.uint32).astype(np.uint64)
    weights = np.arange(1, words.size + 1, dtype=np.uint64).reshape(words.shape)
    assert int((words * weights).sum()) == 18291124997903716595


# --- configs


def inverse_frequencies(fields: dict[str, Any]) -> list[float]:
    """What transformers computes. Its default is its linear scaling by one."""
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    loaded = pytest.importorskip("transformers").LlamaConfig(**fields)
    loaded.standardize_rope_params()
    kind = loaded.rope_parameters["rope_type"]
    if kind == "default":
        kind = "linear"
        loaded.rope_parameters["factor"] = 1.0
    frequencies: list[float] = rope.ROPE_INIT_FUNCTIONS[kind](loaded, device="cpu")[0].tolist()
    return frequencies


@pytest.mark.parametrize(
    "fields",
    [
        config(),
        config(head_dim=96),
        config(rope_scaling=LINEAR),
        config(rope_scaling=LLAMA3, rope_theta=5e5),
        config(rope_scaling={**LLAMA3, "factor": 32.0, "low_freq_factor": 2.0}),
        config(rope_scaling=YARN),
        config(rope_scaling={**YARN, "beta_fast": 16, "beta_slow": 2, "factor": 40}),
        config(rope_parameters={**YARN, "rope_theta": 1e4, "truncate": False}),
        config(rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    ],
    ids=lambda fields: json.dumps({k: v for k, v in fields.items() if k.startswith("rope")})[:60],
)
def test_frequencies_are_those_of_transformers(fields: dict[str, Any]):
    exact = inverse_frequencies(dict(fields))
    rotary, reason = rotary_of_config(fields)
    assert rotary is not None, reason
    assert np.allclose(rotary.frequencies, exact, rtol=3e-6, atol=0)
    loaded = pytest.importorskip("transformers").LlamaConfig(**fields).to_dict()
    assert rotary_of_config(loaded) == (rotary, "")


def test_partial_rotation_and_head_sizes():
    assert found().size == 128
    assert found(head_dim=80).size == 80
    assert found(partial_rotary_factor=0.5).size == 64
    assert found(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.25}).size == 32
    assert found(rotary_pct=0.25).size == 32
    assert found(rotary_dim=48).size == 48
    assert found(qk_rope_head_dim=64, head_dim=192).size == 64


def test_style_follows_the_model_unless_given():
    assert found().style == SPLIT
    assert found(model_type="qwen3").style == SPLIT
    assert found(model_type="deepseek_v3", qk_rope_head_dim=64).style == INTERLEAVED
    rotary, _ = rotary_of_config(config(model_type="deepseek_v3"), style=SPLIT)
    assert rotary is not None and rotary.style == SPLIT


def test_theta_and_text_config():
    without = config()
    del without["rope_theta"]
    assert rotary_of_config(without)[0] == found(rope_theta=10000)
    assert rotary_of_config({"text_config": config()})[0] == found()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "mrope"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope"),
        ({"rope_parameters": {"full": {"rope_theta": 1.0}, "sliding": {}}}, "different ways"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ({"head_dim": 7}, "7 rotated channels"),
        ({"head_dim": "x"}, "make no sense"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"num_attention_heads": 0}, "make no sense"),
    ],
)
def test_without_a_fixed_rotation_there_is_a_reason(fields: dict[str, Any], reason: str):
    rotary, why = rotary_of_config(config(**fields))
    assert rotary is None
    assert reason in why
