"""The static tables: generated, consistent, and close to what they are meant for."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from kvcodec import tables
from kvcodec.tables import CodingTable

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import make_tables  # noqa: E402

RESIDUAL = [(family, number) for family in (0, 1) for number in range(17)]
LOSSLESS = [(family, fraction) for family in (0, 1) for fraction in range(4)]
ALL = [tables.residual_table(*key) for key in RESIDUAL]
ALL += [tables.lossless_table(*key) for key in LOSSLESS]


def test_generated_files_are_what_the_tool_writes():
    """The document, the library and the kernels hold the same numbers, and long lines nowhere."""
    for path, text in make_tables.outputs().items():
        assert path.read_text(encoding="utf-8") == text, f"run tools/make_tables.py: {path.name}"
        if path.suffix != ".md":
            assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("table", ALL)
def test_table_is_consistent(table: CodingTable):
    """Every slot belongs to one symbol, in order, and every symbol has one."""
    assert sum(table.frequencies) == 256 and min(table.frequencies) >= 1
    assert len(table.frequencies) <= 64
    assert table.first >= -128 and table.first + table.escape <= 128
    for slot, symbol in enumerate(table.symbols.tolist()):
        start = int(table.before[symbol])
        assert start <= slot < start + table.frequencies[symbol]


def test_class_parts():
    """Tables 0 to 16 without raw bits; above, four tables and one more bit every four classes."""
    assert [tables.class_parts(index) for index in (0, 16, 17, 20, 21, 32)] == [
        (0, 0), (16, 0), (13, 1), (16, 1), (13, 2), (16, 4),
    ]  # fmt: skip
    for index in (-1, 33):
        with pytest.raises(ValueError, match="allowed is 0 to 32"):
            tables.class_parts(index)


@pytest.mark.parametrize("index", range(33))
@pytest.mark.parametrize("family", [0, 1])
def test_code_lengths_are_a_prefix_code(family: int, index: int):
    """Rounded lengths, escapes and raw bits included, satisfy Kraft's inequality within rounding;
    a number out of reach is marked.
    """
    lengths = tables.code_lengths(family, index)
    possible = lengths[lengths < 1 << 20]
    assert np.exp2(-possible / 256).sum() < 1.003
    reach = 128 << tables.class_parts(index)[1]
    assert len(possible) == min(2 * reach, 4096)


@pytest.mark.parametrize("index", range(12, 33))
def test_class_fits_its_deviation(index: int):
    """Normal numbers of the class's deviation on half steps cost at most 0.05 bit over entropy."""
    sigma = 2.0 ** ((index - 10) / 4)
    k = np.arange(-2048, 2048)

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / sigma / math.sqrt(2))

    share = np.array([(normal(x + 0.5) - normal(x - 0.5)) / 2 for x in k.tolist()])
    share += np.array([(normal(x + 1) - normal(x)) / 2 for x in k.tolist()])
    share = np.maximum(share, 1e-300)
    entropy = -(share * np.log2(share)).sum()
    cost = (share * tables.code_lengths(0, index)).sum() / 256
    assert entropy <= cost <= entropy + 0.05


def test_path_costs_of_the_kernels_are_those_of_the_library():
    """Two ways to compute them; classes with raw bits cost nothing."""
    generated = dict(make_tables.all_tables())
    for number in range(17):
        assert tables.path_costs(number).tolist() == make_tables.path_cost(generated, number)
    assert not tables.path_costs(17).any()
