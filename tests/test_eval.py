"""What a codec costs a model: measured through real pages, and nothing else in between."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

from kvcodec.errors import ConfigError  # noqa: E402
from kvcodec.eval.imprint import Imprint, check_same, imprint  # noqa: E402
from kvcodec.eval.metrics import Estimate  # noqa: E402
from kvcodec.eval.model import CachedModel  # noqa: E402
from kvcodec.eval.pages import SpecCodec  # noqa: E402
from kvcodec.eval.protocol import CacheCodec, PageCodec, RoundTrip, round_trip  # noqa: E402
from kvcodec.eval.runner import Mode, Options, Window, measure, windows_of  # noqa: E402
from kvcodec.identity import Identity, Namespace  # noqa: E402
from kvcodec.layout import DType, PageLayout  # noqa: E402
from kvcodec.plan import PagePlan  # noqa: E402
from kvcodec.rotary import rotary_of_config  # noqa: E402
from kvcodec.spec import CodecSpec  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

VOCABULARY, LAYERS, KV_HEADS, HEAD = 96, 2, 2, 64
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
OPTIONS = Options(context=96, score=40, page_size=32)


def tiny(family="Qwen3", **more):
    """A model that nobody trained: its predictions are noise, and change with its cache."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **more)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, 0.0, 1.0)
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, VOCABULARY, (400,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def model():
    return CachedModel(tiny())


def run(model, tokens, codecs, options=OPTIONS, bos=None):
    return measure(model, windows_of(tokens, bos, options), codecs, options)


def rows(result):
    return {name: tally.as_json() for name, tally in result.rows.items()}


@pytest.fixture(scope="module")
def found(model, tokens, codec):
    """Rows of a few presets, for each mode."""
    names = ("raw", "kv8", "kv4", "kv2")
    return {
        mode: run(
            model,
            tokens,
            [SpecCodec(name, codec) for name in names],
            Options(context=96, score=40, page_size=32, mode=mode),
        )
        for mode in Mode
    }


# --- what is measured


@pytest.mark.parametrize("mode", Mode)
def test_raw_pages_change_not_one_bit_of_the_predictions(found, mode):
    row = rows(found[mode])["raw"]
    assert (row["kl"], row["loss_increase"], row["top1_agreement"]) == (0.0, 0.0, 1.0)
    assert (row["key_mse"], row["value_mse"], row["output_error"]) == (0.0, 0.0, 0.0)
    assert row["perplexity"] == found[mode].perplexity


@pytest.mark.parametrize("mode", Mode)
def test_fewer_bits_cost_more(found, mode):
    one = rows(found[mode])
    for name in ("kl", "key_mse", "value_mse", "output_error", "attention_kl"):
        assert one["raw"][name] < one["kv8"][name] < one["kv4"][name] < one["kv2"][name], name
    assert one["kv8"]["top1_agreement"] > one["kv4"]["top1_agreement"]
    assert one["raw"]["bits_per_value"] > one["kv8"]["bits_per_value"] > 8


def test_a_stored_prefix_costs_less_than_a_stored_context(found):
    context, prefix = (rows(found[mode])["kv2"]["kl"] for mode in (Mode.CONTEXT, Mode.PREFIX_REUSE))
    assert prefix < context


@pytest.mark.parametrize("mode", Mode)
def test_modes_agree_on_the_model_itself(found, mode):
    assert found[mode].loss == pytest.approx(found[Mode.CONTEXT].loss, abs=1e-6)
    assert found[mode].tokens == 8 * 40


def test_loss_is_that_of_the_tokens_at_the_end_of_each_window(tokens):
    plain, result = tiny(), run(CachedModel(tiny(), None), tokens, [])
    losses = []
    for ids in windows_of(tokens, None, OPTIONS).ids:
        with torch.no_grad():
            logs = torch.log_softmax(plain(ids[None]).logits[0], -1)
        losses.append(-logs[55:95].gather(1, ids[56:, None]).mean().item())
    assert result.loss == pytest.approx(float(np.mean(losses)), abs=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: tiny("Qwen3"), id="qwen3"),
        pytest.param(lambda: tiny("Qwen2"), id="qwen2"),
        pytest.param(lambda: tiny("Llama"), id="llama"),
        pytest.param(
            lambda: tiny("Qwen3", use_sliding_window=True, sliding_window=24, max_window_layers=1),
            id="sliding-window",
        ),
    ],
)
def test_attention_is_that_of_transformers(model, tokens):
    ids = torch.tensor(tokens[:96])
    with torch.no_grad():
        wanted = torch.log_softmax(model()(ids[None]).logits[0, -41:-1], -1)
    found = CachedModel(model(), None).logits(ids, 40)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama"])
def test_layers_before_the_first_difference_need_not_run(family, mode, tokens, codec, monkeypatch):
    """Predictions are the same to the last bit, and fewer layers attend."""
    model = CachedModel(tiny(family))
    options = Options(context=96, score=30, page_size=32, mode=mode)
    [ids] = windows_of(tokens[:96], None, options).ids
    window = Window(model, ids, options, replays=True)
    coded = window.code(SpecCodec("kv2", codec))
    keys = [window.cache.keys[0], coded.keys[1]]
    runs = []
    whole = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: (runs.append(1), whole(*a, **k))[1],
    )
    found = window.predict(keys, window.cache.values, 1)
    assert len(runs) == LAYERS - 1
    assert torch.equal(found, window.predict(keys, window.cache.values))
    assert not torch.equal(found, window.exact)
    assert torch.equal(Window(model, ids, options).predict(keys, window.cache.values, 1), found)


def test_layers_that_cannot_be_told_apart_all_run(tokens):
    """The count of layers in the config is not that of any list of modules."""
    model = CachedModel(tiny())
    [ids] = windows_of(tokens[:96], None, OPTIONS).ids
    model.model.model.layers = torch.nn.ModuleList([*model.model.model.layers, torch.nn.Identity()])
    window = Window(model, ids, OPTIONS, replays=True)
    assert torch.equal(window.predict(window.cache.keys, window.cache.values, 1), window.exact)


def test_model_with_a_compressed_cache_is_refused():
    model = tiny()
    model.config.kv_lora_rank = 16
    with pytest.raises(ConfigError, match="MLA"):
        CachedModel(model)


def test_attention_with_a_soft_cap_is_refused(tokens):
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**SMALL, attn_logit_softcapping=50.0)
    model = CachedModel(transformers.Gemma2ForCausalLM(config))
    with pytest.raises(ConfigError, match="softcap"):
        model.record(torch.tensor(tokens[:32]))


def test_prefix_reuse_is_what_transformers_predicts_from_a_decoded_prefix(model, tokens, codec):
    """The same by another way: transformers' own cache, filled with what the pages held."""
    options = Options(context=96, score=30, page_size=32, mode=Mode.PREFIX_REUSE)
    ids, end = torch.tensor(tokens[:96]), options.coded_tokens
    assert end == 64
    cache = model.record(ids)
    pages = [
        [t[:, :end].unflatten(1, (2, 32)).transpose(0, 1).contiguous() for t in side]
        for side in (cache.keys, cache.values)
    ]
    back = round_trip(SpecCodec("kv4", codec), *pages)
    plain, past = tiny(), transformers.DynamicCache()
    for layer in range(LAYERS):
        k, v = (
            side[:, layer].transpose(0, 1).flatten(1, 2)[None].float()
            for side in (back.keys, back.values)
        )
        past.update(k, v, layer)
    with torch.no_grad():
        logits = plain(ids[None, end:], past_key_values=past).logits[0, -31:-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[-30:]).item()
    result = run(model, tokens[:96], [SpecCodec("kv4", codec)], options)
    assert rows(result)["kv4"]["loss"] == pytest.approx(loss, abs=2e-3)
    assert rows(result)["kv4"]["loss_increase"] != 0
    assert rows(result)["kv4"]["layers"][1]["key_mse"] > 0


def test_errors_are_those_of_the_coded_tokens_only(model, tokens):
    """A codec that adds 1 to every value: the squared error is 1 against the variance."""

    class Shift:
        name = "shift"

        def roundtrip(self, layer, keys, values):
            return keys, values.float() + 1, 16.0

    row = rows(run(model, tokens[:96], [Shift()]))["shift"]
    values = model.record(torch.tensor(tokens[:96])).values
    for layer, exact in zip(row["layers"], values, strict=True):
        wanted = 1 / exact.double().var(1, correction=0).mean().item()
        assert layer["value_mse"] == pytest.approx(wanted, rel=0.02)  # the cache rounds the sum
        assert layer["key_mse"] == layer["attention_kl"] == 0.0
        assert layer["output_error"] > 0


def test_standard_error_is_that_of_windows():
    assert Estimate.of([1.0, 3.0]) == Estimate(2.0, 1.0)
    assert Estimate.of([5.0]) == Estimate(5.0, None)


def test_standard_errors_are_paired(found):
    """The loss differs between windows by far more than what the codec adds to it."""
    row, tally = rows(found[Mode.CONTEXT])["kv8"], found[Mode.CONTEXT].rows["kv8"]
    assert row["loss_increase_se"] < Estimate.of(tally.loss).error / 10


# --- sizes


@pytest.mark.parametrize("text", ["raw", "kv4-channel", "key=int8-g64 value=int2-asym-g64"])
def test_bits_are_those_of_the_real_pages(text, codec):
    layout = PageLayout.mha(
        dtype=DType.BF16, token_count=32, layer_count=3, head_count=KV_HEADS, head_size=HEAD
    )
    namespace = Namespace(Identity.of(model="eval"), layout)
    plan = PagePlan.build(namespace, CodecSpec.parse(text).section_codecs(layout), 64)
    pages = torch.randn(5, 3, KV_HEADS, 32, HEAD).bfloat16()
    assert SpecCodec(text, codec).roundtrip_pages(pages, pages).stored_bits == 40 * plan.page_bytes


def test_bits_of_a_window_are_those_of_its_pages_and_its_raw_sinks(model, tokens, codec):
    for sinks in (0, 4):
        options = Options(context=96, score=40, page_size=32, sink_tokens=sinks)
        row = rows(run(model, tokens, [SpecCodec("raw", codec)], options))["raw"]
        layout = PageLayout.mha(
            dtype=DType.BF16, token_count=32, layer_count=2, head_count=KV_HEADS, head_size=HEAD
        )
        namespace = Namespace(Identity.of(model="eval"), layout)
        plan = PagePlan.build(namespace, CodecSpec.parse("raw").section_codecs(layout), 64)
        pages = 8 * plan.page_bytes / (layout.raw_bytes / 2)
        assert row["bits_per_value"] == pytest.approx(pages + 16 * sinks / 96)


def test_rotation_of_the_models_keys_reaches_the_codec(tokens, codec):
    """Keys with a large bias in fast pairs: turned back within the page, they are narrow again."""
    biased = tiny("Qwen2")
    for layer in biased.model.layers:
        layer.self_attn.k_proj.bias.data.view(KV_HEADS, HEAD)[:, :4] = 100.0
    rotary, _ = rotary_of_config(biased.config.to_dict())
    assert rotary is not None
    specs = [
        SpecCodec("ecq-3", codec, "plain"),
        SpecCodec("ecq-3", codec, "turned back", rotary=rotary),
    ]
    row = rows(run(CachedModel(biased), tokens[:176], specs, Options(context=128, page_size=64)))
    assert row["turned back"]["attention_kl"] < 0.5 * row["plain"]["attention_kl"]
    assert row["turned back"]["value_mse"] == row["plain"]["value_mse"]


# --- options


@pytest.mark.parametrize(
    "change",
    [
        {"mode": Mode.PREFIX_REUSE},
        {"context": 128},
        {"score": 50},
        {"page_size": 16},
        {"sink_tokens": 4},
        {"windows": 3},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_option_changes_what_is_found(model, tokens, codec, change):
    plain = {"mode": Mode.CONTEXT, "context": 96, "score": 40, "page_size": 32}
    before, after = (
        rows(run(model, tokens, [SpecCodec("kv4-channel", codec)], Options(**options)))
        for options in (plain, plain | change)
    )
    assert before != after


def test_windows_cover_every_token_once_behind_the_first_one():
    windows = windows_of(range(100), None, Options(context=20, score=10, page_size=4))
    scored = [token for ids in windows.ids.tolist() for token in ids[-10:]]
    assert scored == list(range(10, 100))


def test_windows_begin_with_the_models_first_token():
    options = Options(context=20, score=10, page_size=4)
    assert {ids[0] for ids in windows_of(range(1, 100), 0, options).ids.tolist()} == {0}


def test_few_windows_are_spread_over_the_text():
    windows = windows_of(range(1000), None, Options(context=20, score=10, page_size=4, windows=3))
    assert [ids[0] for ids in windows.ids.tolist()] == [0, 490, 980]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"context": 1}, "context"),
        ({"score": 96}, "score"),
        ({"page_size": 0}, "page_size"),
        ({"page_size": 97}, "page_size"),
        ({"sink_tokens": 96}, "no token is coded"),
        ({"windows": -1}, "windows"),
        ({"mode": Mode.PREFIX_REUSE, "score": 80}, "no token is coded"),
    ],
)
def test_options_out_of_range_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        Options(**({"context": 96, "page_size": 32} | change))


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(ConfigError, match="longer text"):
        windows_of(range(50), None, OPTIONS)


def test_context_beyond_the_model_is_refused(model, tokens):
    with pytest.raises(ConfigError, match="made for 256"):
        run(model, tokens, [], Options(context=300, page_size=32))


def test_last_token_of_a_stored_prefix_runs_again():
    """It predicts the first scored one, so its page cannot come from the store."""
    options = Options(context=96, score=32, page_size=32, mode=Mode.PREFIX_REUSE)
    assert options.coded_tokens == 32


# --- peers


class Identical:
    """A peer that loses nothing, and says what it was shown."""

    name = "identical"

    def __init__(self):
        self.seen = []

    def roundtrip(self, layer, keys, values):
        self.seen.append((layer, tuple(keys.shape), keys.dtype))
        return keys.float(), values.float(), 12.5


def test_peer_is_measured_as_the_codec_is(model, tokens):
    peer = Identical()
    assert isinstance(peer, CacheCodec) and not isinstance(peer, PageCodec)
    row = rows(run(model, tokens[:96], [peer]))["identical"]
    assert (row["kl"], row["bits_per_value"]) == (0.0, 12.5)
    shape = (3, KV_HEADS, 32, HEAD)
    assert peer.seen == [(layer, shape, torch.bfloat16) for layer in range(LAYERS)]


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (lambda k, v: (k[:, :1], v, 4.0), "returns keys of"),
        (lambda k, v: (k, v * math.nan, 4.0), "values that are not finite"),
    ],
)
def test_peer_that_returns_something_else_is_named(model, tokens, answer, named):
    class Broken:
        name = "broken"

        def roundtrip(self, layer, keys, values):
            return answer(keys, values)

    with pytest.raises(ConfigError, match=f"broken returns.*{named.split()[-1]}"):
        run(model, tokens[:96], [Broken()])


def test_codec_of_whole_pages_sees_all_layers(model, tokens):
    class Whole:
        name = "whole"

        def roundtrip_pages(self, keys, values):
            assert keys.shape == (3, LAYERS, KV_HEADS, 32, HEAD)
            return RoundTrip(keys, values, 4.0 * (keys.numel() + values.numel()))

    assert rows(run(model, tokens[:96], [Whole()]))["whole"]["bits_per_value"] == 4.0


def test_two_codecs_of_one_name_are_refused(model, tokens):
    with pytest.raises(ConfigError, match="named twice"):
        run(model, tokens, [Identical(), Identical()])


# --- imprinted outliers


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama"])
@pytest.mark.parametrize("text", ["keys=8", "values=0.5", "keys=10,values=1,pairs=2,seed=3"])
def test_imprint_leaves_the_function_and_changes_the_cache(family, text, tokens):
    ids = torch.tensor(tokens[:64])
    model = CachedModel(tiny(family), None)
    before, cache = model.logits(ids, 63), model.record(ids)
    imprint(model.model, Imprint.parse(text))
    check_same(before, model.logits(ids, 63), torch.float32)
    changed = model.record(ids)
    keys, values = (
        not torch.allclose(getattr(cache, side)[0], getattr(changed, side)[0], rtol=0.01)
        for side in ("keys", "values")
    )
    assert (keys, values) == ("keys" in text, "values" in text)


def test_imprinted_pairs_are_slow_ones_and_as_large_as_asked(tokens):
    ids = torch.tensor(tokens[:64])
    model = CachedModel(tiny(), None)
    before = model.record(ids).keys
    imprint(model.model, Imprint(keys=8, pairs=3))
    for old, new in zip(before, model.record(ids).keys, strict=True):
        gain = (new.square().sum((0, 1)) / old.square().sum((0, 1))).sqrt()
        large = (gain > 4).nonzero().flatten().tolist()
        assert len(large) == 6 and torch.allclose(gain[large], torch.tensor(8.0), rtol=1e-3)
        assert all(channel % (HEAD // 2) >= HEAD // 4 for channel in large)


def test_outliers_hurt_groups_of_a_token_and_not_those_of_a_channel(tokens, codec):
    specs = ("key=int4-g64 value=raw", "key=int4-channel-asym-g32 value=raw")
    found = []
    for words in ("", "keys=8"):
        model = CachedModel(tiny())
        if words:
            imprint(model.model, Imprint.parse(words))
        found.append(rows(run(model, tokens[:176], [SpecCodec(s, codec) for s in specs])))
    natural, imprinted = ([row[spec]["kl"] for spec in specs] for row in found)
    assert imprinted[0] > 2 * natural[0]
    assert imprinted[1] == pytest.approx(natural[1], rel=0.05)


@pytest.mark.parametrize(
    "text",
    ["", "keys", "keys=a", "keys=8,keys=8", "colour=3", "keys=1", "keys=0", "keys=8,pairs=0"]
    + ["values=4", "keys=8,seed=-1", "pairs=3"],
)
def test_imprints_without_sense_are_refused(text):
    with pytest.raises(ConfigError, match="imprint"):
        Imprint.parse(text)


def test_change_of_the_function_is_noticed():
    logs = torch.zeros(2, 3)
    assert check_same(logs, logs + 1e-5, torch.float32) == pytest.approx(1e-5)
    with pytest.raises(ConfigError, match="cannot be imprinted"):
        check_same(logs, logs + 0.1, torch.float32)


def test_rows_become_json(found):
    json.dumps(rows(found[Mode.CONTEXT]), allow_nan=False)


def test_memory_of_large_tensors_is_kept():
    """In a process of its own: what was freed is taken again without a page fault."""
    code = (
        "import resource, sys, numpy as np\n"
        "from kvcodec.eval.memory import keep_memory\n"
        "assert sys.argv[1] == 'no' or keep_memory()\n"
        "np.ones(1 << 21); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): np.ones(1 << 21)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, word], check=True, capture_output=True
            ).stdout
        )
        for word in ("yes", "no")
    ]
    assert faults[0] < 100 < faults[1]
