"""``kvcodec eval``: every option counts, what cannot be used is named, and the output is whole."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("tokenizers")

from tiny_lm import write_tiny_lm  # noqa: E402

from kvcodec.cli import main  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SPECS = ("raw", "kv4")


class Halves:
    """A peer: keys and values of half precision in their mantissa."""

    name = "halves"

    def roundtrip(self, layer, keys, values):
        return keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn), 8.0


def two_peers():
    """A function that gives several."""
    other = Halves()
    other.name = "other halves"
    return [Halves(), other]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that nobody trained, a tokenizer of bytes, and a text."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_lm(folder)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 9)
    return folder


@pytest.fixture
def evaluate(folder, capsys):
    """The document of a run with these options over the plain ones."""

    def run(*words, specs=SPECS):
        plain = [str(folder), *specs, "--text", str(folder / "text.txt"), "--json"]
        plain += ["--context", "128", "--page-size", "32", "--score", "64"]
        code = main(["eval", *plain, *words])
        document = json.loads(capsys.readouterr().out)
        assert code == (1 if "error" in document else 0)
        return document

    return run


@pytest.fixture
def plain(evaluate):
    return evaluate()


def test_document_has_the_model_and_every_spec(plain):
    (variant,) = plain["variants"]
    assert variant["name"] == "natural" and variant["tokens"] == 5 * 64
    assert [row["codec"] for row in plain["rows"]] == list(SPECS)
    raw, kv4 = plain["rows"]
    assert raw["kl"] == 0.0 and raw["perplexity"] == variant["perplexity"]
    assert kv4["kl"] > 0 and kv4["ratio"] == 16 / kv4["bits_per_value"] > 3
    assert [layer["layer"] for layer in kv4["layers"]] == [0, 1]
    assert plain["asked"]["text"] == "text.txt" and plain["asked"]["window_count"] == 5
    assert set(plain["versions"]) == {"kvcodec", "torch", "transformers"}


@pytest.mark.parametrize(
    "words",
    [
        ("--mode", "prefix-reuse"),
        ("--context", "96"),
        ("--score", "32"),
        ("--page-size", "16"),
        ("--sink-tokens", "3"),
        ("--windows", "2"),
        ("--compute", "bfloat16"),
        ("--cache", "float16"),
    ],
    ids=lambda words: words[0],
)
def test_every_option_changes_what_is_found(evaluate, plain, words):
    assert evaluate(*words)["rows"][1] != plain["rows"][1]


def test_text_is_what_is_predicted(evaluate, plain, tmp_path):
    (tmp_path / "other.txt").write_text("Sphinx of black quartz, judge my vow! " * 12)
    other = evaluate("--text", str(tmp_path / "other.txt"))
    assert other["variants"][0]["loss"] != plain["variants"][0]["loss"]


def test_imprinted_model_is_measured_beside_the_natural_one(evaluate, plain):
    found = evaluate("--imprint", "keys=8,values=0.5")
    natural, imprinted = found["variants"]
    assert (natural["name"], imprinted["name"]) == ("natural", "imprinted")
    assert imprinted["loss"] == pytest.approx(natural["loss"], abs=0.02)
    assert imprinted["largest_change_without_cache"] < 1e-3
    assert found["rows"][:2] == plain["rows"]
    assert found["rows"][2]["kl"] == 0.0
    assert found["rows"][3]["key_mse"] > 2 * found["rows"][1]["key_mse"]


@pytest.mark.parametrize(
    ("name", "found"), [("Halves", ["halves"]), ("two_peers", ["halves", "other halves"])]
)
def test_peers_are_imported_by_name(evaluate, name, found):
    document = evaluate("--peer", f"{__name__}:{name}")
    assert [row["codec"] for row in document["rows"][2:]] == found
    assert document["rows"][2]["bits_per_value"] == 8.0 and document["rows"][2]["kl"] > 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--mode", "prefix"), "prefix-reuse"),
        (("--compute", "int8"), "float32"),
        (("--cache", "float64"), "bfloat16"),
        (("--device", "no-such"), "no-such"),
        (("--peer", "nothing"), "MODULE:NAME"),
        (("--peer", "no.such:thing"), "no.such"),
        (("--peer", "json:dumps"), "json:dumps"),
        (("--peer", "math:pi"), "math:pi"),
        (("--imprint", "keys"), "keys=8"),
        (("--context", "300"), "made for 256"),
        (("--text", "/no/such/text"), "/no/such/text"),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else each,
)
def test_what_cannot_be_used_is_named(evaluate, words, named):
    assert named in evaluate(*words)["error"]["message"]


def test_unknown_spec_is_named(evaluate):
    assert "'kv5'" in evaluate(specs=("kv5",))["error"]["message"]


def test_folder_without_a_model_is_named(capsys, folder, tmp_path):
    words = ["eval", str(tmp_path), "raw", "--text", str(folder / "text.txt"), "--json"]
    assert main(words) == 1
    assert str(tmp_path) in json.loads(capsys.readouterr().out)["error"]["message"]


def test_table_plot_and_layers_are_for_people(folder, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    words = ["eval", str(folder), *SPECS, "--text", str(folder / "text.txt")]
    words += ["--context", "128", "--page-size", "32", "--windows", "1"]
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert "perplexity" in plain and "kv4" in plain and "layer" not in plain
    plot = tmp_path / "new" / "quality.svg"
    assert main([*words, "--layers-table", "--plot", str(plot)]) == 0
    assert "layer" in capsys.readouterr().out
    assert plot.read_text().startswith("<?xml") and "kv4" in plot.read_text()


def test_help_of_the_command_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from kvcodec.cli import main; main(['eval', '--help'])\n"
        "print(set(sys.modules) & {'torch', 'transformers', 'matplotlib'}, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stderr.strip() == "set()"


def test_missing_extra_is_named(monkeypatch, capsys, folder):
    monkeypatch.setitem(sys.modules, "kvcodec.eval.session", None)
    words = ["eval", str(folder), "raw", "--text", "x"]
    assert main(words) == 1
    assert "kvcodec[eval]" in capsys.readouterr().err
