"""Profiles: read strictly, refused for another model, named by every page, needed by no reader."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_pages import make_page
from store_pages import NAMESPACE, OPTIONS, empty_pages, keys_of, random_pages

from kvcodec.backend import open_backend
from kvcodec.cli import main
from kvcodec.errors import ConfigError
from kvcodec.extension import Extension
from kvcodec.format import EncodedPage
from kvcodec.layout import DType, PageLayout
from kvcodec.plan import PagePlan, check_spec
from kvcodec.profile import PROFILE_EXTENSION, Profile
from kvcodec.rotary import Rotary
from kvcodec.spec import CodecSpec
from kvcodec.store import PageStore, Pipeline

POINTS = {
    3.5: "key=ecq-3.5-channel value=ecq-3.25",
    2.5: "key=ecq-2.5-channel value=ecq-2.25 layer.1=ecq-3-channel,ecq-2",
    3.0: "key=ecq-3-channel value=ecq-2.75",
}
MODEL = {"layers": 3, "kv_heads": 2, "key_head_size": 64, "value_head_size": 64}
DOCUMENT: dict[str, Any] = {
    "kvcodec_profile": 1,
    "model": MODEL,
    "points": [{"bits": bits, "spec": text} for bits, text in POINTS.items()],
}
ROTARY = Rotary(64, 0, tuple(2.0**-i for i in range(32)))


def written(folder: Path, **changes: object) -> Path:
    path = folder / "profile.json"
    path.write_text(json.dumps(DOCUMENT | changes))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return written(tmp_path)


# --- which point


@pytest.mark.parametrize(
    ("bits", "point"), [("2.5", 2.5), ("2.99", 2.5), ("3", 3.0), ("3.0", 3.0), ("9", 3.5)]
)
def test_largest_point_that_fits_is_taken(path: Path, bits: str, point: float):
    assert CodecSpec.load(f"profile:{path}@{bits}").text == POINTS[point]


def test_bits_below_the_smallest_point_are_refused_with_what_there_is(path: Path):
    with pytest.raises(ConfigError, match=r"at most 2\.4 bits; it has 2\.5, 3, 3\.5"):
        CodecSpec.load(f"profile:{path}@2.4")


@pytest.mark.parametrize("bits", ["", "@", "@x", "@-3", "@1e1", "@nan", "@333"])
def test_point_has_to_be_named(path: Path, bits: str):
    with pytest.raises(ConfigError, match=r"profile:PATH@BITS"):
        CodecSpec.load(f"profile:{path}{bits}")


def test_other_texts_are_what_they_were():
    assert CodecSpec.load("kv4") == CodecSpec.parse("kv4")


def test_spec_from_elsewhere_reads_no_file(path: Path):
    """Texts of messages go through `parse`; a profile is named by a user's own configuration."""
    with pytest.raises(ConfigError, match="codec spec"):
        CodecSpec.parse(f"profile:{path}@3")


def test_option_spec_names_a_profile(path: Path):
    spec = CodecSpec.from_options({"spec": f"profile:{path}@3"})
    assert spec == CodecSpec.load(f"profile:{path}@3")
    assert spec.profile is not None and spec.can_derotate


@pytest.mark.parametrize(("name", "value"), [("nbits_key", 4), ("rope", "raw"), ("asym", True)])
def test_profile_with_another_codec_option_is_refused(path: Path, name: str, value: object):
    with pytest.raises(ConfigError, match=f"leave out '{name}'"):
        CodecSpec.from_options({"spec": f"profile:{path}@3", name: value})


# --- what is no profile


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in MODEL.items() if key != name}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kvcodec_profile": 2}, "version 2; this kvcodec reads 1"),
        ({"model": None}, "no model"),
        ({"points": []}, "no points"),
        ({"points": [{"bits": 3}]}, "lacks its bits or its spec"),
        ({"points": [{"bits": "3", "spec": "kv4"}]}, "lacks its bits or its spec"),
        ({"points": [7]}, "lacks its bits or its spec"),
        ({"points": [{"bits": 3, "spec": "kv5"}]}, "codec spec 'kv5'"),
        *(({"model": without(name)}, f"{name} is None") for name in MODEL),
        ({"model": MODEL | {"layers": True}}, "layers is True"),
        ({"model": MODEL | {"layers": 0}}, "layers is 0"),
    ],
)
def test_what_is_no_profile_is_named(tmp_path: Path, changes: dict[str, object], named: str):
    with pytest.raises(ConfigError, match=named):
        CodecSpec.load(f"profile:{written(tmp_path, **changes)}@3")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"x"', "\xff", "[" * 100_000])
def test_files_of_other_kinds_are_refused_by_name(tmp_path: Path, text: str):
    (tmp_path / "other.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"other\.json"):
        Profile.read(tmp_path / "other.json")


def test_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.json"):
        Profile.read(tmp_path / "none.json")


# --- whose it is


def layout_with(**changes: Any) -> PageLayout:
    plain = {"token_count": 16, "layer_count": 3, "head_count": 2, "head_size": 64}
    return PageLayout.mha(dtype=DType.BF16, **(plain | changes))


def test_profile_fits_its_model_and_shares_of_it(path: Path):
    spec = CodecSpec.load(f"profile:{path}@3")
    assert spec.profile is not None
    spec.profile.check(layout_with(), is_whole=True)
    for share in ({"head_count": 1}, {"layer_count": 1, "layer_start": 2}, {"layer_count": 2}):
        check_spec(spec, layout_with(**share), 0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_count": 4}, "layers 3, this one has 4"),
        ({"layer_count": 2, "layer_start": 2}, "layers 3, this one has 4"),
        ({"head_count": 4}, "kv_heads 2, this one has 4"),
        ({"head_size": 128}, "key_head_size 64, this one has 128"),
        ({"value_head_size": 32}, "value_head_size 64, this one has 32"),
    ],
)
def test_profile_of_another_model_is_refused(path: Path, changes: dict[str, int], named: str):
    with pytest.raises(ConfigError, match=named):
        check_spec(CodecSpec.load(f"profile:{path}@3"), layout_with(**changes), 0)


def test_model_with_fewer_layers_is_refused_where_all_are_there(path: Path):
    profile = CodecSpec.load(f"profile:{path}@3").profile
    assert profile is not None
    with pytest.raises(ConfigError, match="layers 3, this one has 2"):
        profile.check(layout_with(layer_count=2), is_whole=True)


def test_compressed_caches_are_refused(path: Path):
    layout = PageLayout.mla(
        dtype=DType.BF16, token_count=16, layer_count=3, latent_size=64, rope_size=64
    )
    with pytest.raises(ConfigError, match="latent and rope"):
        check_spec(CodecSpec.load(f"profile:{path}@3"), layout, 0)


# --- what pages say


def test_pages_name_the_profile_and_decode_without_it(path: Path):
    """The reader has another spec, and the file is gone."""
    _, views = random_pages(3)
    pipeline = Pipeline(open_backend("memory://"), OPTIONS)
    spec = CodecSpec.load(f"profile:{path}@3")
    digest = hashlib.sha256(path.read_bytes()).digest()
    writer = PageStore(pipeline, NAMESPACE, spec, rotary=ROTARY)
    assert writer.backup(keys_of(3), views) == [True] * 3
    own, own_views = empty_pages(3)
    assert writer.prefetch(keys_of(3), own_views) == [True] * 3
    path.unlink()
    other, other_views = empty_pages(3)
    reader = PageStore(pipeline, NAMESPACE, CodecSpec.parse("kv4"))
    assert reader.prefetch(keys_of(3), other_views) == [True] * 3
    for mine, theirs in zip(own, other, strict=True):
        assert (mine == theirs).all()
    name = NAMESPACE.object_name(keys_of(1)[0])
    row = memoryview(bytearray(1 << 20))
    [size] = pipeline.backend.get_into([name], [row], timeout_seconds=5)
    assert isinstance(size, int)
    header = EncodedPage.parse(row[:size]).header
    assert [(e.type, e.critical) for e in header.extensions] == [(1, False), (2, False)]
    assert header.extensions[0].data == digest
    pipeline.close()


def test_only_the_reference_tells_a_profiles_pages_from_those_of_its_text(path: Path):
    spec = CodecSpec.load(f"profile:{path}@3")
    specs = (spec, replace(spec, profile=None))
    named, plain = (PagePlan.for_spec(NAMESPACE, each, 64, ROTARY) for each in specs)
    assert named.codecs == plain.codecs and named.rotary == plain.rotary
    assert plain.header == PagePlan.build(NAMESPACE, plain.codecs, 64, rotary=ROTARY).header
    assert 0 < len(named.header) - len(plain.header) <= 64


def test_inspect_shows_what_sha256sum_says_of_the_profile(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    reference = Extension(PROFILE_EXTENSION, bytes.fromhex(digest))
    (tmp_path / "page").write_bytes(make_page(extensions=[reference]))
    assert main(["inspect", str(tmp_path / "page")]) == 0
    assert f"type 1 (profile), 32 B: {digest}\n" in capsys.readouterr().out


def test_benchmark_refuses_the_profile_of_another_model(
    path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["bench", "codec", "--quick", "--codecs", f"profile:{path}@3"]) == 1
    assert "this one has 128" in capsys.readouterr().err


# --- the ones that are committed


MEASURED = sorted((Path(__file__).parents[1] / "docs" / "measurements").glob("tune-*.json"))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_measured_profiles_are_profiles_of_the_small_models(path: Path):
    document = json.loads(path.read_bytes())
    config = Path(__file__).parent / "models" / document["model"]["name"] / "config.json"
    model = json.loads(config.read_bytes())
    layout = layout_with(
        token_count=64,
        layer_count=model["num_hidden_layers"],
        head_count=model["num_key_value_heads"],
        head_size=model["head_dim"],
    )
    for bits, text in Profile.read(path).points:
        spec = CodecSpec.load(f"profile:{path}@{bits:g}")
        assert spec.text == text and spec.profile is not None
        spec.profile.check(layout, is_whole=True)


def test_small_models_were_tuned():
    assert len(MEASURED) == 4
