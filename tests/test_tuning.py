"""The parts of ``kvcodec tune``: allocations are the best there are, results outlive a process."""

from __future__ import annotations

import fcntl
import itertools
import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.0")

from kvcodec.errors import ConfigError  # noqa: E402
from kvcodec.eval.allocation import Curve, Frontier  # noqa: E402
from kvcodec.eval.comparison import bits_at, bits_saved  # noqa: E402
from kvcodec.eval.families import (  # noqa: E402
    ECQ,
    LADDERS,
    Allocation,
    spec_of_sections,
)
from kvcodec.eval.journal import Journal  # noqa: E402
from kvcodec.eval.probing import Measured, Probed, split_windows  # noqa: E402
from kvcodec.eval.runner import Options  # noqa: E402
from kvcodec.section import SectionCodec  # noqa: E402
from kvcodec.spec import CodecSpec  # noqa: E402

SECTIONS = 4


# --- allocation


def problem(seed, options=5):
    """Losses that fall and sizes that rise, in no other order."""
    rng = np.random.default_rng(seed)
    losses = [np.sort(rng.exponential(1.0, options))[::-1] for _ in range(SECTIONS)]
    sizes = [np.sort(rng.integers(1, 100, options)) / (64 * SECTIONS) for _ in range(SECTIONS)]
    return losses, sizes


def every_choice(losses, sizes):
    """(loss, size, options) of all there are."""
    for options in itertools.product(*(range(len(loss)) for loss in losses)):
        yield (
            sum(loss[o] for loss, o in zip(losses, options, strict=True)),
            sum(size[o] for size, o in zip(sizes, options, strict=True)),
            list(options),
        )


@pytest.mark.parametrize("seed", range(8))
def test_allocation_of_a_size_is_the_best_of_all(seed):
    losses, sizes = problem(seed)
    choices = list(every_choice(losses, sizes))
    frontier = Frontier(losses, sizes, 1.7)
    for budget in np.linspace(min(size for _, size, _ in choices), 1.7, 7):
        best = min(loss for loss, size, _ in choices if size <= budget + 1e-9)
        found = frontier.of_size(budget)
        assert frontier.loss(found) == pytest.approx(best)
        assert sum(s[o] for s, o in zip(sizes, found, strict=True)) <= budget + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_allocation_of_a_loss_is_the_smallest_of_all(seed):
    losses, sizes = problem(seed)
    choices = list(every_choice(losses, sizes))
    frontier = Frontier(losses, sizes, 1.7)
    for wanted in np.quantile([loss for loss, _, _ in choices], (0.01, 0.2, 0.7)):
        smallest = min(size for loss, size, _ in choices if loss <= wanted)
        found = frontier.of_loss(wanted)
        assert sum(s[o] for s, o in zip(sizes, found, strict=True)) == pytest.approx(smallest)
        assert frontier.loss(found) <= wanted
    assert frontier.of_loss(0.0) is None


def test_size_below_the_smallest_options_has_no_allocation():
    losses, sizes = problem(0)
    least = sum(size.min() for size in sizes)
    frontier = Frontier(losses, sizes, 1.7)
    assert frontier.of_size(least) is not None
    assert frontier.of_size(least - 0.01) is None and frontier.of_size(-1.0) is None


SENSITIVITIES = (1.0, 0.25, 4.0, 1.0, 16.0, 2.0)


def probed(sensitivities, bits, law=2.0):
    """Sections whose losses follow s * 2^-(law * bits)."""
    count = len(sensitivities)
    losses = tuple(s * 2.0 ** (-law * bits) for s in sensitivities)
    return Probed(losses, (bits / count,) * count, 0.25)


def allocation_of(sensitivities, family=ECQ, law=2.0):
    levels = [family.keys[index].nominal_bits for index in family.probed]
    return Allocation(family, [probed(sensitivities, bits, law) for bits in levels], 8.25)


def bits_of(spec, layers):
    """Nominal bits of every section, keys before values, layer by layer."""
    own = {layer: pair for layer, *pair in spec.layers}
    pairs = [own.get(layer, (spec.key, spec.value)) for layer in range(layers)]
    return np.array([codec.nominal_bits for pair in pairs for codec in pair])


def test_steps_are_inverse_to_the_root_of_the_sensitivity():
    """The closed form of equal slopes, where losses follow 2^-2R: half a bit per factor of two."""
    spec, loss = allocation_of(SENSITIVITIES).of_size(3.25)
    found = bits_of(spec, 3)
    wanted = 0.5 * np.log2(SENSITIVITIES)
    assert np.abs(found - found.mean() - (wanted - wanted.mean())).max() <= 1 / 16
    assert 3 - 1 / 64 <= found.mean() <= 3
    geometric_mean = math.exp(np.mean(np.log(SENSITIVITIES)))
    assert loss == pytest.approx(6 * geometric_mean * 2.0**-6, rel=0.03)


def test_equal_sensitivities_get_equal_bits():
    spec, _ = allocation_of((1.0,) * 6).of_size(3.25)
    assert spec.text == "key=ecq-3-channel value=ecq-3"


def test_what_is_in_no_section_counts():
    spec, _ = allocation_of((1.0,) * 6).of_size(3.0)
    assert spec.text == "key=ecq-2.75-channel value=ecq-2.75"


def test_size_that_cannot_be_reached_is_refused_with_the_least():
    with pytest.raises(ConfigError, match=r"1\.6 bits .* the smallest pages take 1\.750"):
        allocation_of(SENSITIVITIES).of_size(1.6)


def test_uniform_spec_is_the_nearest_in_size():
    spec, loss = allocation_of(SENSITIVITIES).uniform_of_size(3.27)
    assert spec.text == "key=ecq-3-channel value=ecq-3"
    assert loss == pytest.approx(sum(SENSITIVITIES) * 2.0**-6)


@pytest.mark.parametrize("family", LADDERS, ids=lambda family: family.name)
def test_ladder_has_no_other_codecs_than_its_own(family):
    spec, _ = allocation_of(SENSITIVITIES, family).of_size(4.5)
    assert set(bits_of(spec, 3)) <= {2, 4, 8}
    sections = {spec.key, spec.value, *(codec for _, *pair in spec.layers for codec in pair)}
    assert sections <= {*family.keys, *family.values}


def test_more_bits_on_the_ladder_go_to_sensitive_sections():
    spec, _ = allocation_of((1.0, 1.0, 500.0, 1.0, 1.0, 1.0), LADDERS[0]).of_size(3.6)
    found = bits_of(spec, 3)
    assert found[2] == found.max() and (np.delete(found, 2) < found[2]).all()


def test_smallest_of_a_loss_keeps_it():
    allocation = allocation_of(SENSITIVITIES)
    _, loss = allocation.of_size(3.25)
    spec, again = allocation.of_loss(loss)
    assert again <= loss and bits_of(spec, 3).mean() <= 3
    assert allocation.of_loss(1e-9) is None


def test_curve_goes_through_its_points_and_on_as_they_do():
    curve = Curve((2.0, 3.0, 4.5), (1.0, 0.2, 0.02), (0.2, 0.3, 0.45))
    at = np.array([2.0, 3.0, 4.5])
    assert curve.loss(at) == pytest.approx([1.0, 0.2, 0.02])
    assert curve.size(at) == pytest.approx([0.2, 0.3, 0.45])
    assert curve.loss(np.array([1.5, 2.5])) == pytest.approx([5**0.5, 0.2**0.5])
    assert curve.size(np.array([1.5, 6.0])) == pytest.approx([0.15, 0.6])


@pytest.mark.parametrize("losses", [(1.0, 0.001, 0.1), (0.5, 0.5, 0.5), (0.1, 0.2, 0.0)])
def test_noise_makes_no_loss_that_rises_and_no_miracle(losses):
    found = np.log2(Curve((2.0, 3.0, 4.5), losses, (1, 1, 1)).loss(np.linspace(1.5, 6, 73)))
    slopes = np.diff(found) * 16
    assert (slopes <= 1e-9).all()
    assert slopes[-1] >= -3.001


def test_spec_of_sections_names_layers_that_differ():
    codecs = [SectionCodec.parse(t) for t in ("int4", "int8", "int4", "int8", "int8", "int8")]
    assert spec_of_sections(codecs).text == "key=int4 value=int8 layer.2=int8,int8"


# --- windows


OPTIONS = Options(context=20, score=10, page_size=4)


def test_windows_share_no_token_and_are_drawn_by_the_seed():
    first = split_windows(range(1, 401), None, OPTIONS, (5, 9), 0)
    assert [len(each) for each in first] == [5, 9]
    tokens = [token for each in first for ids in each.values() for token in ids.tolist()]
    assert len(tokens) == len(set(tokens)) == 14 * 20
    for start, ids in first[0].items():
        assert ids.tolist() == list(range(start + 1, start + 21))
    assert split_windows(range(1, 401), None, OPTIONS, (5, 9), 0)[0].keys() == first[0].keys()
    assert split_windows(range(1, 401), None, OPTIONS, (5, 9), 1)[0].keys() != first[0].keys()


def test_windows_begin_with_the_models_first_token():
    [windows] = split_windows(range(1, 401), 0, OPTIONS, (21,), 0)
    assert {ids[0].item() for ids in windows.values()} == {0}
    assert {len(ids) for ids in windows.values()} == {20}


def test_text_with_too_few_windows_is_refused():
    with pytest.raises(ConfigError, match=r"20 windows of 20 tokens, 12 \+ 9 are wanted"):
        split_windows(range(400), None, OPTIONS, (12, 9), 0)


# --- bits saved


def test_bits_at_a_divergence_lie_on_the_line_of_its_logarithm():
    rows = [(2.0, 0.4), (3.0, 0.1), (4.0, 0.025)]
    assert bits_at(rows, 0.1) == pytest.approx(3.0)
    assert bits_at(rows, 0.2) == pytest.approx(2.5)
    assert bits_at(rows, 0.5) is None
    assert bits_at(rows, 0.02) is None
    assert bits_at([], 0.1) is None


def test_rows_that_others_beat_are_left_out():
    assert bits_at([(2.0, 0.4), (2.5, 0.9), (3.0, 0.1)], 0.2) == pytest.approx(2.5)


def measured(bits, divergences):
    return Measured(bits, tuple(divergences), (0.0,) * len(divergences))


def test_bits_saved_are_those_at_equal_divergence():
    noise = np.array([0.5, 1.0, 1.5])
    others = [measured(bits, 4.0**-bits * noise) for bits in (2.0, 3.0, 4.0)]
    saved = bits_saved(measured(2.75, 4.0**-3.5 * noise), others)
    assert saved.mean == pytest.approx(0.75)
    assert saved.error == pytest.approx(0.0, abs=1e-9)  # the noise is common to all


def test_error_of_bits_saved_is_that_of_the_windows():
    rng = np.random.default_rng(0)
    others = [measured(bits, np.full(400, 4.0**-bits)) for bits in (2.0, 3.0, 4.0)]
    divergences = 4.0**-3 * (1 + 0.1 * rng.standard_normal(400))
    saved = bits_saved(measured(2.5, divergences), others)
    wanted = divergences.std(ddof=1) / 20 / divergences.mean() / math.log(4)
    assert saved.error == pytest.approx(wanted, rel=0.01)
    assert saved.mean == pytest.approx(0.5, abs=0.02)


def test_nothing_is_said_where_the_others_do_not_reach():
    others = [measured(2.0, [0.4, 0.4]), measured(3.0, [0.1, 0.1])]
    assert bits_saved(measured(2.5, [0.05, 0.05]), others) is None
    assert bits_saved(measured(2.5, [0.2]), [measured(2, [0.4]), measured(3, [0.1])]).error is None


# --- the journal


INPUTS = {"model": "m", "asked": {"bits": [2.5, 3.0], "seed": 0}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "profile.json.state"


def test_results_are_there_again(path):
    values = {"a": 0.1 + 0.2, "b": [1, 2.5, [3, 4]]}
    with Journal(path, INPUTS) as journal:
        for name, value in values.items():
            assert name not in journal
            journal.put(name, value)
    with Journal(path, INPUTS) as journal:
        assert {name: journal[name] for name in values} == values
        assert "c" not in journal


def test_every_result_is_in_the_file_at_once(path):
    with Journal(path, INPUTS) as journal:
        for count in range(1, 4):
            journal.put(str(count), count)
            assert len(path.read_bytes().splitlines()) == 1 + count


@pytest.mark.parametrize("cut", [1, 5, 14])
def test_line_cut_off_by_the_end_of_its_writer_is_forgotten(path, cut):
    with Journal(path, INPUTS) as journal:
        journal.put("a", 1.5)
        journal.put("long name", 2.5)
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path, INPUTS) as journal:
        assert journal["a"] == 1.5 and "long name" not in journal
        journal.put("long name", 3.5)
    with Journal(path, INPUTS) as journal:
        assert journal["long name"] == 3.5


def test_file_begun_with_other_inputs_is_refused_with_what_differs(path):
    Journal(path, INPUTS).__exit__(None, None, None)
    with pytest.raises(ConfigError, match=r"other inputs, model 'm', now 'other'.*remove it"):
        Journal(path, INPUTS | {"model": "other"})


@pytest.mark.parametrize("text", ["{}\n", "[1]\n", "no json\n", '{"inputs": 3}\n[1]\n', "[]\n{}\n"])
def test_other_files_are_refused_and_kept(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match="notes"):
        Journal(path, INPUTS)
    assert path.read_text() == text


def test_two_processes_do_not_write_to_one_file(path):
    path.parent.mkdir()
    with path.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            Journal(path, INPUTS)
    Journal(path, INPUTS).__exit__(None, None, None)


def test_journal_is_gone_when_it_is_done(path):
    with Journal(path, INPUTS) as journal:
        journal.put("a", 1)
        journal.remove()
    assert not path.exists()


def test_journal_is_plain_json(path):
    with Journal(path, INPUTS) as journal:
        journal.put("a", [1, 2])
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {"inputs": INPUTS} and second == ["a", [1, 2]]


def test_families_are_made_of_specs_that_parse():
    for family in (ECQ, *LADDERS):
        assert len(family.keys) == len(family.values)
        for spec in family.specs:
            assert CodecSpec.parse(spec.text) == spec
