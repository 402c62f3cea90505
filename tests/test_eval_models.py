"""The small models that travel with the source: they load, and predict as well as is said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from kvcodec.codec import Codec  # noqa: E402
from kvcodec.eval.model import CachedModel, load_model, tokens_of  # noqa: E402
from kvcodec.eval.pages import SpecCodec  # noqa: E402
from kvcodec.eval.runner import Options, measure, windows_of  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

MODELS = Path(__file__).parent / "models"
NAMES = ("qwen3_small", "qwen2_bias_small")
README = (MODELS / "README.md").read_text(encoding="utf-8")
MAX_MODEL_BYTES = 10_000_000
MAX_TEXT_BYTES = 300_000


def stated(name):
    """Windows and perplexity that the README says."""
    row = re.search(rf"^\| `{name}` .*\| (\d+) \| (\d+\.\d+) \|$", README, re.MULTILINE)
    assert row is not None, f"no row of {name} in the README"
    return int(row[1]), float(row[2])


@pytest.fixture(scope="module", params=NAMES)
def measured(request):
    """A model, and what its README says of it is found again, with two codecs on the way."""
    model, tokenizer = load_model(str(MODELS / request.param), "float32", "cpu")
    options = Options(windows=stated(request.param)[0])
    text = (MODELS / "held_out.txt").read_text(encoding="utf-8")
    codec = Codec(1)
    specs = [SpecCodec(name, codec) for name in ("kv8", "kv4")]
    windows = windows_of(*tokens_of(tokenizer, text), options)
    found = measure(CachedModel(model), windows, specs, options)
    codec.close()
    return request.param, model, found


def test_perplexity_is_what_the_readme_says(measured):
    name, _, found = measured
    assert found.perplexity == pytest.approx(stated(name)[1], rel=0.002)


def test_codecs_are_told_apart(measured):
    rows = {name: tally.as_json() for name, tally in measured[2].rows.items()}
    assert 0 < rows["kv8"]["kl"] < 0.1 * rows["kv4"]["kl"]


def test_geometry_is_that_of_their_families(measured):
    name, model, _ = measured
    attention = model.model.layers[0].self_attn
    assert attention.head_dim == 128 and model.config.num_key_value_heads == 2
    assert hasattr(attention, "k_norm") == (name == "qwen3_small")
    if name == "qwen2_bias_small":
        rest = attention.k_proj.weight.norm(dim=1).mean()  # the norms before make inputs of about 1
        assert attention.k_proj.bias.abs().max() > 5 * rest


@pytest.mark.parametrize("name", NAMES)
def test_models_are_small(name):
    assert sum(file.stat().st_size for file in (MODELS / name).iterdir()) <= MAX_MODEL_BYTES
    assert (MODELS / "held_out.txt").stat().st_size <= MAX_TEXT_BYTES
