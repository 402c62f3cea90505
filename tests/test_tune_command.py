"""``kvcodec tune``: every option counts, it goes on where it was, and its profile is of use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("tokenizers")

from tiny_lm import write_tiny_lm  # noqa: E402

from kvcodec.cli import main  # noqa: E402
from kvcodec.eval.model import CachedModel  # noqa: E402
from kvcodec.spec import CodecSpec  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

BITS = (3.5, 4.5)
PLAIN = ["--bits", "3.5,4.5", "--windows", "2", "--held-out", "3"]
PLAIN += ["--context", "96", "--page-size", "32", "--score", "32"]
LADDERS = {"KVTuner, per token", "KVTuner, KIVI"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_lm(folder)
    (folder / "text.txt").write_text(
        "".join(f"{i * i} bottles of {i} colours; " for i in range(70))
    )
    (folder / "other.txt").write_text("Sphinx of black quartz, judge my vow! " * 50)
    return folder


class Runner:
    """Runs the command with these options over the plain ones, on an output of its own."""

    def __init__(self, folder, place, capsys):
        self.folder, self.output, self._capsys = folder, place / "profile.json", capsys
        self.state = place / "profile.json.state"

    def __call__(self, *words, texts=("text.txt",), model=None):
        plain = ["tune", str(model or self.folder), "--output", str(self.output), "--json", *PLAIN]
        plain += [word for text in texts for word in ("--text", str(self.folder / text))]
        code = main([*plain, *words])
        document = json.loads(self._capsys.readouterr().out)
        assert code == (1 if "error" in document else 0)
        return document


@pytest.fixture
def tune(folder, tmp_path, capsys):
    return Runner(folder, tmp_path, capsys)


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """The document and the file of one run with the plain options."""
    output = tmp_path_factory.mktemp("plain") / "profile.json"
    words = ["tune", str(folder), "--output", str(output), *PLAIN]
    assert main([*words, "--text", str(folder / "text.txt")]) == 0
    return json.loads(output.read_bytes()), output


def results_of(document):
    return [document[name] for name in ("exact", "sections", "points", "others")]


# --- what comes out


def test_profile_has_the_model_what_was_asked_and_every_point(plain, folder):
    document, output = plain
    model = document["model"]
    assert (model["layers"], model["kv_heads"], model["model_type"]) == (2, 1, "qwen3")
    assert (model["key_head_size"], model["value_head_size"]) == (64, 64)
    assert document["asked"]["seed"] == 0 and document["asked"]["bits"] == list(BITS)
    assert [text["name"] for text in document["texts"]] == ["text.txt"]
    assert [point["bits"] for point in document["points"]] == list(BITS)
    assert len(document["probed_windows"]) == 2 and len(document["held_out_windows"]) == 3
    assert not {*document["probed_windows"]} & {*document["held_out_windows"]}
    assert str(folder.parent) not in output.read_text()
    assert not output.with_name("profile.json.state").exists()


def test_points_take_the_bits_that_they_say(plain):
    """All metadata included, the reference to the profile too; and more bits cost less."""
    points = plain[0]["points"]
    for point in points:
        assert point["bits"] - 0.1 < point["bits_per_value"] < point["bits"] + 0.1
        assert point["predicted_kl"] == pytest.approx(point["kl"], rel=0.5)
    assert points[0]["kl"] > points[1]["kl"] > 0


def test_bits_of_a_point_are_those_of_pages_that_name_the_profile(plain, folder, capsys):
    """Measured again by ``kvcodec eval`` on the same kind of pages."""
    document, output = plain
    words = ["eval", str(folder), f"profile:{output}@4.5", "--text", str(folder / "text.txt")]
    words += ["--context", "96", "--page-size", "32", "--score", "32", "--json"]
    assert main(words) == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["bits_per_value"] == pytest.approx(document["points"][1]["bits_per_value"], abs=0.05)
    assert row["kl"] == pytest.approx(document["points"][1]["kl"], rel=0.5)


def test_layers_differ_by_what_their_errors_cost(plain):
    """The most sensitive section gets the most bits, the least sensitive the fewest."""
    document, output = plain
    spec = CodecSpec.load(f"profile:{output}@4.5")
    own = {layer: pair for layer, *pair in spec.layers}
    pairs = [own.get(layer, (spec.key, spec.value)) for layer in range(2)]
    bits = [codec.nominal_bits for pair in pairs for codec in pair]
    losses = []
    for section in document["sections"]:
        axis = "-channel" if section["stream"] == "key" else ""
        losses.append(section["codecs"]["ecq-3" + axis]["kl"])
    assert losses.index(max(losses)) == bits.index(max(bits))
    assert losses.index(min(losses)) == bits.index(min(bits))
    assert len(set(bits)) > 1


def test_everything_is_compared_on_the_same_windows(plain):
    others = plain[0]["others"]
    assert {row["family"] for row in others} == LADDERS | {"uniform ecq"}
    for row in others:
        spec = CodecSpec.parse(row["spec"])
        codecs = {spec.key, spec.value, *(codec for _, *pair in spec.layers for codec in pair)}
        if row["family"] in LADDERS:
            assert {codec.nominal_bits for codec in codecs} <= {2, 4, 8}
        else:
            assert not spec.layers and spec.key.bits == spec.value.bits
        assert row["kl"] > 0 and row["kl_se"] > 0
    for name in ("saved_against_uniform", "saved_against_ladder"):
        saved = [point[name] for point in plain[0]["points"]]
        assert any(each is not None and each["bits"] > 0 for each in saved)


def test_document_of_json_is_the_profile(tune):
    document = tune()
    assert json.loads(tune.output.read_bytes()) == document


# --- options


@pytest.mark.parametrize(
    "words",
    [
        ("--mode", "prefix-reuse"),
        ("--context", "128"),
        ("--score", "16"),
        ("--page-size", "64"),
        ("--sink-tokens", "3"),
        ("--windows", "3"),
        ("--held-out", "4"),
        ("--seed", "1"),
        ("--bits", "4,4.5"),
        ("--imprint", "keys=8,values=0.5"),
        ("--compute", "bfloat16"),
        ("--cache", "float16"),
    ],
    ids=lambda words: words[0],
)
def test_every_option_changes_what_is_found(tune, plain, words):
    found = tune(*words)
    assert "points" in found, found
    assert found["points"] != plain[0]["points"]
    assert found["asked"] != plain[0]["asked"]


def test_texts_are_what_is_predicted(tune, plain):
    found = tune(texts=("other.txt", "text.txt"))
    assert found["exact"] != plain[0]["exact"]
    assert [text["name"] for text in found["texts"]] == ["other.txt", "text.txt"]


def test_without_the_ladder_nothing_else_changes(tune, plain):
    found = tune("--no-ladder")
    assert {row["family"] for row in found["others"]} == {"uniform ecq"}
    for point, other in zip(found["points"], plain[0]["points"], strict=True):
        assert point == other | {"saved_against_ladder": None}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--bits", "2,x"), "2,x"),
        (("--bits", "3,2"), "rising"),
        (("--bits", "1"), "1.5 to 6"),
        (("--bits", "7"), "1.5 to 6"),
        (("--bits", "1.5"), "the smallest pages take"),
        (("--windows", "0"), "--windows is 0"),
        (("--held-out", "0"), "--held-out is 0"),
        (("--seed", "-1"), "--seed is -1"),
        (("--windows", "900"), "900 + 3 are wanted"),
        (("--mode", "prefix"), "prefix-reuse"),
        (("--compute", "int8"), "float32"),
        (("--cache", "float64"), "bfloat16"),
        (("--device", "no-such"), "no-such"),
        (("--imprint", "keys"), "keys=8"),
        (("--context", "300"), "made for 256"),
        (("--page-size", "4"), "use pages of more tokens"),
        (("--text", "/no/such/text"), "/no/such/text"),
        (("--output", "/proc/no/profile.json"), "/proc/no"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else each,
)
def test_what_cannot_be_used_is_named(tune, words, named):
    assert named in tune(*words)["error"]["message"]
    assert not tune.output.exists()


# --- going on


@pytest.fixture
def runs(monkeypatch):
    """How often the model ran with keys and values that were given to it."""
    counted = []
    logits = CachedModel.logits

    def counting(self, *arguments):
        counted.append(1)
        return logits(self, *arguments)

    monkeypatch.setattr(CachedModel, "logits", counting)
    return counted


@pytest.mark.parametrize("kept", [0, 1, 10, 50, 80, 95])
def test_run_that_was_killed_goes_on_where_it_was(tune, runs, kept):
    """The state file is cut to what it was after some results, as if the process had ended then."""
    from kvcodec.eval.journal import Journal

    states = []
    put = Journal.put

    def watched(journal, name, result):
        put(journal, name, result)
        states.append(tune.state.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "put", watched)
        whole = tune()
    first = len(runs)
    assert len(states) > 95
    tune.output.unlink()
    tune.state.write_bytes(states[kept] + b'["torn')
    runs.clear()
    assert tune() == whole
    assert len(runs) <= first - 0.7 * kept
    assert not tune.state.exists()


def test_interrupt_keeps_what_was_found(tune, runs, monkeypatch, folder):
    monkeypatch.setattr(CachedModel, "logits", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    words = ["tune", str(folder), "--output", str(tune.output), *PLAIN]
    assert main([*words, "--text", str(folder / "text.txt")]) == 130
    assert tune.state.exists() and not tune.output.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"words": ("--seed", "1")}, "'seed': 0"),
        ({"words": ("--bits", "4,4.5")}, "'bits': [3.5, 4.5]"),
        ({"texts": ("other.txt",)}, "other.txt"),
        ({"model": "deeper"}, "'layers': 2"),
    ],
    ids=["option", "bits", "text", "model"],
)
def test_state_of_other_inputs_is_refused_and_kept(tune, tmp_path, monkeypatch, change, named):
    from kvcodec.eval.journal import Journal

    monkeypatch.setattr(Journal, "remove", lambda self: None)
    tune()
    before = tune.state.read_bytes()
    if "model" in change:
        write_tiny_lm(tmp_path / "deeper", layers=3)
        change = {"model": tmp_path / "deeper"}
    message = tune(*change.pop("words", ()), **change)["error"]["message"]
    assert "begun with other inputs" in message and named in message
    assert tune.state.read_bytes() == before


def test_other_weights_are_other_inputs(tune, folder, tmp_path, monkeypatch):
    """The same config, and not the same model."""
    from safetensors.torch import load_file, save_file

    from kvcodec.eval.journal import Journal

    monkeypatch.setattr(Journal, "remove", lambda self: None)
    tune()
    other = tmp_path / folder.name
    shutil.copytree(folder, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"] *= 1.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert "weights_sample_sha256" in tune(model=other)["error"]["message"]


# --- for people


def test_table_and_plot_show_the_front(folder, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    words = ["tune", str(folder), "--output", str(tmp_path / "p.json"), *PLAIN]
    plot = tmp_path / "new" / "front.svg"
    assert main([*words, "--text", str(folder / "text.txt"), "--plot", str(plot)]) == 0
    table = capsys.readouterr().out
    for name in ("@3.5", "@4.5", "saves: ladder", "uniform ecq", *LADDERS):
        assert name in table
    for name in ("tuned ecq", "uniform ecq", *LADDERS):
        assert name in plot.read_text()


def test_help_of_the_command_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from kvcodec.cli import main; main(['tune', '--help'])\n"
        "print(set(sys.modules) & {'torch', 'transformers', 'matplotlib'}, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stderr.strip() == "set()"


def test_missing_extra_is_named(monkeypatch, capsys, folder, tmp_path):
    monkeypatch.setitem(sys.modules, "kvcodec.eval.tuning", None)
    words = ["tune", str(folder), "--text", "x", "--output", str(tmp_path / "p.json")]
    assert main(words) == 1
    assert "kvcodec[eval]" in capsys.readouterr().err
