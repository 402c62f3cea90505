"""How the SGLang adapter learns how a model rotates its keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvcodec.errors import ConfigError
from kvcodec.sglang.options import AdapterOptions
from kvcodec.sglang.rotation import find_rotary

CONFIG = {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 4, "rope_theta": 5e5}
URL = "memory://"


def options_of(**extra: object) -> AdapterOptions:
    return AdapterOptions.parse({"url": URL, "preset": "ecq-3", **extra})


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_config_in_the_model_s_folder_is_found(model: Path):
    rotary = find_rotary(options_of(), str(model))
    assert rotary is not None
    assert (rotary.size, rotary.frequencies[0]) == (128, 1.0)


@pytest.mark.parametrize("name", ["", "config.json"])
def test_option_names_the_config_or_its_folder(model: Path, name: str):
    rotary = find_rotary(options_of(rotary=str(model / name)), "served/under-another-name")
    assert rotary == find_rotary(options_of(), str(model))


def test_off_leaves_the_rotation_in(model: Path):
    assert find_rotary(options_of(rotary="off"), str(model)) is None


def test_codec_that_cannot_use_it_is_not_told(model: Path):
    options = AdapterOptions.parse({"url": URL, "preset": "kv4"})
    assert find_rotary(options, str(model)) is None


@pytest.mark.parametrize("name", ["", "nobody/has-this-model", "not a name!"])
def test_unknown_model_is_a_warning_with_the_way_out(name: str, caplog):
    assert find_rotary(options_of(), name) is None
    [record] = caplog.records
    assert "'rotary' may name a config.json" in record.getMessage()


def test_config_without_a_rotation_for_all_tokens_is_a_warning(model: Path, caplog):
    (model / "config.json").write_text(
        json.dumps({**CONFIG, "rope_scaling": {"mrope_section": [16, 24, 24]}})
    )
    assert find_rotary(options_of(), str(model)) is None
    assert "mrope" in caplog.text


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_option_that_names_no_config_is_refused(tmp_path: Path, content: str | None):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"rotary: .*config\.json"):
        find_rotary(options_of(rotary=str(path)), "")


def test_option_without_effect_is_refused():
    with pytest.raises(ConfigError, match="rotary has no effect"):
        AdapterOptions.parse({"url": URL, "preset": "kv4-channel", "rotary": "off"})


def test_rotation_reaches_the_pages_of_the_model_s_pool(model: Path, monkeypatch):
    """The store of the pool is told; that of a draft model's pool is not: its config is another."""
    from types import SimpleNamespace

    from sglang_fakes import fake_pool

    from kvcodec.sglang import registration
    from kvcodec.sglang.topology import Topology

    told: list[object] = []

    class Stop(Exception):
        pass

    def store(*_: object, rotary: object, **__: object) -> None:
        told.append(rotary)
        raise Stop

    monkeypatch.setattr(registration, "PageStore", store)
    options = options_of()
    topology = Topology.of_config(SimpleNamespace(model_name=str(model)), options)
    for name in ("kv", "draft"):
        with pytest.raises(Stop):
            registration.open_pool(
                name, fake_pool("mha", "page_first"), SimpleNamespace(), topology, options
            )
    assert told == [find_rotary(options, str(model)), None]
