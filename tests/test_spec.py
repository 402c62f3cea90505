"""Codec specs: options, KVTuner's tables, the canonical text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import mha, mla

from kvcodec.errors import ConfigError
from kvcodec.format import section_stored_bytes
from kvcodec.layout import MAX_HEAD_SIZE, DType, PageLayout, Role
from kvcodec.spec import SPEC_OPTIONS, Axis, CodecSpec, Kind, SectionCodec
from kvcodec.testing.strategies import codec_specs, section_codecs

TABLES = Path(__file__).parent / "data" / "kvtuner"


def spec_of(**options: object) -> CodecSpec:
    return CodecSpec.from_options(options)


# --- options, each with a test that fails when it is ignored


def test_default_is_kv4():
    assert spec_of() == CodecSpec.parse("kv4")


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "preset": ({"preset": "kv8"}, "key=int8-g64 value=int8-g64"),
    "spec": ({"spec": "key=raw value=int2-g8"}, "key=raw value=int2-g8"),
    "rope": ({"rope": "raw"}, "key=int4-g64 value=int4-g64 rope=raw"),
    "nbits_key": ({"nbits_key": 8}, "key=int8-g64 value=int4-g64"),
    "nbits_value": ({"nbits_value": 8}, "key=int4-g64 value=int8-g64"),
    "asym": ({"asym": True}, "key=int4-asym-g64 value=int4-asym-g64"),
    "axis_key": ({"axis_key": 1}, "key=int4-channel-g64 value=int4-g64"),
    "axis_value": ({"axis_value": 1}, "key=int4-g64 value=int4-channel-g64"),
    "q_group_size": ({"q_group_size": 32}, "key=int4-g32 value=int4-g32"),
    "per_layer_config": (
        {"per_layer_config": {3: {"nbits_key": 8, "nbits_value": 16}}},
        "key=int4-g64 value=int4-g64 layer.3=int8-g64,raw",
    ),
    "per_layer_config_path": (
        {"per_layer_config_path": str(TABLES / "block_kivi_4_0.yaml")},
        (
            "key=int4-g64 value=int4-g64 layer.0=int8-g64,int4-g64 "
            "layer.1=int2-asym-g64,int4-g64 layer.5=int4-g64,int8-g64"
        ),
    ),
}


def test_every_option_is_tested():
    assert OPTIONS.keys() == SPEC_OPTIONS


@pytest.mark.parametrize("name", OPTIONS)
def test_option_changes_the_spec(name: str):
    """Each option alone changes what the default would be, and only what it names."""
    options, text = OPTIONS[name]
    assert CodecSpec.from_options(options).text == text
    assert CodecSpec.from_options(options) != spec_of()


COMBINATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "both axes at once": (
        {"axis_key": 1, "axis_value": 0, "q_group_size": -1, "asym": True},
        "key=int4-channel-asym value=int4-asym",
    ),
    "options lie over a preset": (
        {"preset": "kv2-channel", "asym": False, "q_group_size": 16, "nbits_value": 4},
        "key=int2-channel-g16 value=int4-g16",
    ),
    "two bits are asymmetric by themselves": (
        {"nbits_key": 2},
        "key=int2-asym-g64 value=int4-g64",
    ),
    "unless somebody insists": ({"nbits_key": 2, "asym": False}, "key=int2-g64 value=int4-g64"),
    "sixteen bits are raw": ({"nbits_key": 16}, "key=raw value=int4-g64"),
    "bits bring a raw preset back to KVTuner's defaults": (
        {"preset": "raw", "nbits_value": 4},
        "key=raw value=int4-g64",
    ),
    "options apply to layers of a raw preset": (
        {
            "preset": "raw",
            "asym": True,
            "axis_key": 1,
            "q_group_size": 32,
            "per_layer_config": {0: {"nbits_key": 4, "nbits_value": 4}},
        },
        "key=raw value=raw layer.0=int4-channel-asym-g32,int4-asym-g32",
    ),
    "options apply to layers of a text": (
        {
            "spec": "key=int4-g64 value=int4-g64 layer.7=int8-g64,raw",
            "q_group_size": 32,
            "asym": True,
        },
        "key=int4-asym-g32 value=int4-asym-g32 layer.7=int8-asym-g32,raw",
    ),
    "two-bit keys make no eight-bit layer asymmetric": (
        {"nbits_key": 2, "per_layer_config": {1: {"nbits_key": 8}}},
        "key=int2-asym-g64 value=int4-g64 layer.1=int8-g64,int4-g64",
    ),
    "a table entry overrides the text": (
        {
            "spec": "key=int4-g64 value=int4-g64 layer.1=raw,raw layer.2=raw,raw",
            "per_layer_config": {"1": {"nbits_key": 8, "nbits_value": 2}},
        },
        "key=int4-g64 value=int4-g64 layer.1=int8-g64,int2-asym-g64 layer.2=raw,raw",
    ),
    "a table from JSON has text for keys": (
        {"per_layer_config": {"10": {"nbits_key": 8, "nbits_value": 8}, "9": {"nbits_key": 8}}},
        "key=int4-g64 value=int4-g64 layer.9=int8-g64,int4-g64 layer.10=int8-g64,int8-g64",
    ),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_options_combine(name: str):
    options, text = COMBINATIONS[name]
    assert CodecSpec.from_options(options).text == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nbits": 4}, "unknown codec option 'nbits'"),
        ({"residual_length": 128}, "unknown codec option"),
        ({"preset": "kv3"}, "codec spec 'kv3'"),
        ({"preset": ""}, "codec spec ''"),
        ({"preset": 4}, "preset is 4, wanted a text"),
        ({"preset": None}, "preset is None"),
        ({"preset": "kv4", "spec": "key=raw value=raw"}, "either 'preset' or 'spec'"),
        ({"spec": "key=raw"}, "codec spec"),
        ({"rope": "int3"}, "codec 'int3'"),
        ({"nbits_key": 3}, "nbits_key is 3, allowed is 2, 4, 8 or 16"),
        ({"nbits_key": 0}, "nbits_key is 0"),
        ({"nbits_key": "4"}, "nbits_key is '4'"),
        ({"nbits_key": 4.0}, "nbits_key is 4.0"),
        ({"nbits_key": True}, "nbits_key is True"),
        ({"nbits_value": None}, "nbits_value is None"),
        ({"asym": 1}, "asym is 1, allowed is true or false"),
        ({"asym": "false"}, "asym is 'false'"),
        ({"preset": "raw", "nbits_key": 8, "asym": "yes"}, "asym is 'yes'"),
        ({"axis_key": 2}, "axis_key is 2, allowed is 0 .per token. or 1"),
        ({"axis_value": True}, "axis_value is True"),
        ({"q_group_size": 0}, "q_group_size is 0"),
        ({"q_group_size": -2}, "q_group_size is -2"),
        ({"q_group_size": MAX_HEAD_SIZE + 1}, "q_group_size is"),
        ({"q_group_size": 64.0}, "q_group_size is 64.0"),
        ({"preset": "raw", "asym": True}, "asym has no effect"),
        ({"preset": "raw", "q_group_size": 32}, "q_group_size has no effect"),
        ({"nbits_key": 16, "axis_key": 1}, "axis_key has no effect: keys are stored raw"),
        ({"nbits_value": 16, "axis_value": 0}, "axis_value has no effect: values are stored raw"),
        ({"per_layer_config": []}, "the layer table is a list"),
        ({"per_layer_config": None}, "the layer table is a NoneType"),
        ({"per_layer_config": {0: {}}}, "layer 0 of the layer table is {}"),
        ({"per_layer_config": {0: 4}}, "layer 0 of the layer table is 4"),
        ({"per_layer_config": {0: {"bits": 4}}}, "layer 0 of the layer table"),
        ({"per_layer_config": {0: {"nbits_key": 5}}}, "layer 0: nbits_key is 5"),
        ({"per_layer_config": {0: {"nbits_key": None}}}, "layer 0: nbits_key is None"),
        ({"per_layer_config": {-1: {"nbits_key": 4}}}, "layer index in the layer table is -1"),
        ({"per_layer_config": {"x": {"nbits_key": 4}}}, "layer index in the layer table is 'x'"),
        ({"per_layer_config": {True: {"nbits_key": 4}}}, "layer index in the layer table is True"),
        ({"per_layer_config": {"9" * 5000: {"nbits_key": 4}}}, "layer index in the layer table"),
        (
            {"per_layer_config": {0: {"nbits_key": 4}, "0": {"nbits_key": 8}}},
            "layer 0 appears twice",
        ),
        (
            {"per_layer_config": {}, "per_layer_config_path": "x"},
            "either 'per_layer_config' or 'per_layer_config_path'",
        ),
        ({"per_layer_config_path": "/does/not/exist.yaml"}, "cannot be read"),
        ({"per_layer_config_path": str(TABLES)}, "cannot be read"),
        ({"per_layer_config_path": str(TABLES / "twice.yaml")}, "'0' appears twice"),
        ({"per_layer_config_path": 5}, "per_layer_config_path is 5"),
    ],
)
def test_option_that_cannot_be_honoured_is_refused(options: dict[str, Any], message: str):
    """An unknown, contradicting or ineffective option is an error at start-up, never ignored."""
    with pytest.raises(ConfigError, match=message.replace("{", r"\{").replace("}", r"\}")):
        CodecSpec.from_options(options)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "0: [", "\0", "0: {nbits_key: 8", "é: 1"])
def test_file_that_is_no_layer_table_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "table.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        spec_of(per_layer_config_path=str(path))


def test_table_is_never_code(tmp_path: Path):
    """A tag of a YAML file that would call Python is refused."""
    path = tmp_path / "table.yaml"
    path.write_text("0: !!python/object/apply:os.system ['false']\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        spec_of(per_layer_config_path=str(path))


def test_kvtuner_table_in_flow_style_is_loaded():
    """A published table gives each layer its bits; 16 are raw; 2 are asymmetric."""
    spec = spec_of(
        nbits_key=8, nbits_value=8, per_layer_config_path=str(TABLES / "flow_pertoken_4_0.yaml")
    )
    codecs = spec.section_codecs(mha(layers=5, size=128))
    bits = [(codec.bits, codec.asymmetric) for codec in codecs]
    assert bits[:6] == [(8, False), (4, False), (4, False), (2, True), (4, False), (4, False)]
    assert bits[6:] == [(0, False), (8, False), (8, False), (8, False)]


def test_table_names_layers_of_the_model_not_of_the_rank():
    """A pipeline rank that starts at layer 1 uses the entries from 1 on."""
    spec = spec_of(per_layer_config_path=str(TABLES / "flow_pertoken_4_0.yaml"))
    codecs = spec.section_codecs(mha(layers=2, layer_start=1, size=128))
    assert [codec.bits for codec in codecs] == [4, 2, 4, 4]


# --- what a spec means for a layout


def test_mla_latent_takes_the_better_of_both():
    """The latent serves as key and as value; RoPE follows the key but never below 8 bits."""
    for text, latent, rope in (
        ("key=int2-asym-g64 value=int8-g64", 8, 8),
        ("key=int8-g64 value=int4-g64", 8, 8),
        ("key=raw value=int4-g64", 0, 0),
        ("key=int4-g64 value=raw", 0, 8),
        ("key=int4-g64 value=int4-g64 rope=int2-asym-g8", 4, 2),
    ):
        codecs = CodecSpec.parse(text).section_codecs(mla())
        assert [codec.bits for codec in codecs] == [latent, rope], text


@pytest.mark.parametrize("dtype", [dtype for dtype in DType if not dtype.is_quantizable])
def test_elements_that_cannot_be_quantized_stay_raw(dtype: DType):
    codecs = CodecSpec.parse("kv4").section_codecs(mha(dtype=dtype))
    assert {codec.kind for codec in codecs} == {Kind.RAW}


def test_opaque_rows_stay_raw():
    layout = PageLayout.opaque(page_bytes=64, dtype=DType.BF16)
    assert layout.streams[0].role is Role.OPAQUE
    assert CodecSpec.parse("kv4").section_codecs(layout) == (SectionCodec(),)


@pytest.mark.parametrize(
    ("group_size", "axis", "resolved"),
    [(-1, Axis.TOKEN, 96), (64, Axis.TOKEN, 64), (4096, Axis.TOKEN, 96), (-1, Axis.CHANNEL, 5)],
)
def test_group_never_leaves_its_row_or_its_page(group_size: int, axis: Axis, resolved: int):
    codec = SectionCodec.integer(4, axis=axis, group_size=group_size)
    assert codec.resolved(96, 5).group_size == resolved


def test_longest_row_can_be_one_group():
    """The largest head size there is, is a group size."""
    assert SectionCodec.integer(8).resolved(MAX_HEAD_SIZE, 1).group_size == MAX_HEAD_SIZE
    assert SectionCodec.parse(f"int8-g{MAX_HEAD_SIZE}").group_size == MAX_HEAD_SIZE


def test_smaller_groups_take_more_bytes():
    """The group size reaches the bytes."""
    stream = mha(size=128).streams[0]
    sizes = [
        section_stored_bytes(DType.BF16, stream, 64, SectionCodec.integer(4, group_size=size))
        for size in (8, 16, 32, 64, 128)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 5


# --- text


@given(codec_specs())
def test_text_of_a_spec_is_read_back(spec: CodecSpec):
    """parse is the inverse of text, for every spec there is."""
    assert CodecSpec.parse(spec.text) == spec


@given(section_codecs())
def test_text_of_a_codec_is_read_back(codec: SectionCodec):
    assert SectionCodec.parse(codec.text) == codec


@given(st.text(alphabet="intraw248-channelasymg019=key value.rope,layer ٣\n", max_size=40))
def test_any_other_text_is_refused(text: str):
    """Whatever a user types is a spec, or a ConfigError."""
    for parse in (CodecSpec.parse, SectionCodec.parse):
        try:
            parse(text)
        except ConfigError:
            continue


@pytest.mark.parametrize(
    "text",
    ["int4-g", "int4-g0", "int4-g064", "int4-asym-channel", "int16", "INT4", "int4-g64 ", "int4\n"]
    + ["int4-g٣", f"int4-g{MAX_HEAD_SIZE + 1}", "int4-g-1", "fp8-g64", ""],
)
def test_text_of_no_codec_is_refused(text: str):
    with pytest.raises(ConfigError):
        SectionCodec.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "key=raw",
        "key=raw value=raw key=raw",
        "key=raw value=raw more=raw",
        "key=raw value=raw layer.1=raw",
        "key=raw value=raw layer.=raw,raw",
        "key=raw value=raw layer.-1=raw,raw",
        "key=raw value=raw layer.٣=raw,raw",
        "key=raw value=raw layer.1=raw,raw layer.01=raw,raw",
        "key=raw value=raw layer." + "9" * 5000 + "=raw,raw",
        "kv4 kv8",
    ],
)
def test_text_of_no_spec_is_refused(text: str):
    with pytest.raises(ConfigError):
        CodecSpec.parse(text)


@pytest.mark.parametrize(
    "arguments",
    [
        (Kind.RAW, 8, False, Axis.TOKEN, -1),
        (Kind.RAW, 0, True, Axis.TOKEN, -1),
        (Kind.RAW, 0, False, Axis.CHANNEL, -1),
        (Kind.RAW, 0, False, Axis.TOKEN, 64),
        (Kind.INT, 1, False, Axis.TOKEN, 64),
        (Kind.INT, 4, False, Axis.TOKEN, 0),
        (Kind.INT, 4, False, Axis.TOKEN, -2),
    ],
)
def test_codec_that_means_nothing_is_refused(arguments: tuple[Any, ...]):
    with pytest.raises(ConfigError):
        SectionCodec(*arguments)


def test_layers_are_ascending_and_unique():
    raw = SectionCodec()
    for layers in ((1, 0), (1, 1), (-1,)):
        with pytest.raises(ConfigError):
            CodecSpec(layers=tuple((layer, raw, raw) for layer in layers))
