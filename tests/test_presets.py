"""The presets of `kvcodec.spec`: what they are and how large they make a page."""

from __future__ import annotations

import pytest
from pages import IDENTITY

from kvcodec.format import parameter_bytes
from kvcodec.identity import Namespace
from kvcodec.layout import DType, PageLayout
from kvcodec.plan import PagePlan
from kvcodec.section import Transform
from kvcodec.spec import PRESETS, Axis, CodecSpec


def qwen25_7b(token_count: int) -> PageLayout:
    """28 layers, 4 KV heads of 128, bf16."""
    return PageLayout.mha(
        dtype=DType.BF16, token_count=token_count, layer_count=28, head_count=4, head_size=128
    )


# Sections of one 64-token page with their padding. Raw, the page is 3,670,016 bytes.
PRESET_BYTES = {
    "raw": 3_670_016,
    "fp8": 1_835_008,
    "kv8": 1_892_352,
    "kv4": 974_848,
    "kv2": 573_440,
    "k8v4": 1_433_600,
    "k8v2": 1_232_896,
    "k4v2": 774_144,
    "kv8-asym": 1_949_696,
    "kv4-asym": 1_032_192,
    "kv8-channel": 1_949_696,
    "kv4-channel": 1_032_192,
    "kv2-channel": 688_128,
    "kv4-derotated": 1_032_192,
    "kv2-derotated": 688_128,
    "kv4-hadamard": 974_848,
    "high_performance": 3_670_016,
    "balanced": 1_433_600,
    "memory_optimized": 974_848,
    "ultra_low_memory": 573_440,
}
# The size of a page depends on what is in it; it never takes more than raw.
CODED_PRESETS = {"ecq-4", "ecq-3", "ecq-2.5", "lossless", "lossless-fast"}


def test_every_preset_has_a_known_size():
    assert PRESET_BYTES.keys() | CODED_PRESETS == PRESETS.keys()


@pytest.mark.parametrize("name", PRESET_BYTES)
def test_preset_has_exactly_this_size(name: str):
    """The sections of a Qwen2.5-7B page of 64 tokens take exactly so many bytes."""
    layout = qwen25_7b(64)
    codecs = CodecSpec.parse(name).section_codecs(layout)
    plan = PagePlan.build(Namespace(IDENTITY, layout), codecs, 64)
    assert layout.raw_bytes == 3_670_016
    assert plan.page_bytes - len(plan.header) == PRESET_BYTES[name]
    assert len(plan.header) == 1600


@pytest.mark.parametrize("name", PRESET_BYTES)
@pytest.mark.parametrize(("token_count", "share"), [(64, 0.01), (16, 0.03)])
def test_metadata_is_a_small_share_of_a_page(name: str, token_count: int, share: float):
    """Header, tables, checksums and padding are at most 1 % of a page, at 16 tokens 3 %."""
    layout = qwen25_7b(token_count)
    codecs = CodecSpec.parse(name).section_codecs(layout)
    plan = PagePlan.build(Namespace(IDENTITY, layout), codecs, 64)
    content = 0
    for codec, stream in zip(codecs, layout.streams * layout.layer_count, strict=True):
        elements = stream.head_count * token_count * stream.head_size
        content += elements * (codec.bits or 16) // 8 + parameter_bytes(stream, token_count, codec)
    assert content <= plan.page_bytes <= content * (1 + share)


@pytest.mark.parametrize("name", sorted(CODED_PRESETS))
def test_coded_preset_is_bounded_by_raw(name: str):
    """Where sizes depend on the data the plan gives the most, which is raw."""
    layout = qwen25_7b(64)
    codecs = CodecSpec.parse(name).section_codecs(layout)
    plan = PagePlan.build(Namespace(IDENTITY, layout), codecs, 64)
    assert not plan.is_fixed
    assert plan.page_bytes - len(plan.header) == layout.raw_bytes


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_its_canonical_text(name: str):
    assert CodecSpec.parse(name).text == PRESETS[name]


def test_presets_are_what_their_names_say():
    """The bits of keys and values are those in the name, and a channel preset groups tokens."""
    for name in PRESETS:
        if not name.startswith("k"):
            continue
        spec = CodecSpec.parse(name)
        digits = [int(digit) for digit in name.partition("-")[0] if digit.isdigit()]
        assert [spec.key.bits, spec.value.bits] == [digits[0], digits[-1]]
        assert (spec.key.axis is Axis.CHANNEL) == name.endswith(("-channel", "-derotated"))
        transform = name.rpartition("-")[2].upper()
        assert spec.key.transform.name == (
            transform if transform in Transform.__members__ else "NONE"
        )
        assert spec.value.axis is Axis.TOKEN
        assert not name.endswith("-asym") or (spec.key.asymmetric and spec.value.asymmetric)
