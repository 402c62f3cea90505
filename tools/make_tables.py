"""Write the static tables of coded sections, version 1.

    python tools/make_tables.py

They go into the appendix of proto/FORMAT.md, kvcodec/tables.py and kvcodec/native/tables.h;
tests/test_tables.py runs this module and compares. A page names the
version of its tables, so a change of any number here needs a new version beside the old one.

An element of a residual table is the index k of the trellis of FORMAT.md 3.6: the number it stands
for is k steps or k + 1/2 steps, as the trellis goes. Small classes are narrower than their name and
prefer whole steps, because the encoder weighs bits against errors there; both facts were measured
with that encoder on Gaussian data.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SLOTS = 256
ESCAPE_BITS = 8
RESIDUAL_CLASSES = 17
FAMILIES = 2

# Share of the Laplace distribution beside the normal one, by family.
RESIDUAL_LAPLACE = (0.1, 0.8)
LOSSLESS_LAPLACE = (0.1, 0.8)
# By class, the last number for all further ones: width of the indices by the width of the class,
# and share of elements that the trellis puts on half steps.
WIDTH = (0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.8, 0.8, 0.9, 0.9, 0.95)
HALF_SHARE = (0.0, 0.0, 0.003, 0.03, 0.2, 0.4, 0.46, 0.48, 0.5)

Table = tuple[int, list[int]]


def mixture_cdf(laplace: float) -> Callable[[float], float]:
    """Distribution function of a mixture of unit deviation, 0 < laplace < 1."""

    def cdf(x: float) -> float:
        normal = 0.5 * math.erfc(-x / math.sqrt(2))
        tail = 0.5 * math.exp(-abs(x) * math.sqrt(2))
        return (1 - laplace) * normal + laplace * (tail if x < 0 else 1 - tail)

    return cdf


def slots_of(probabilities: list[float]) -> list[int]:
    """Integer frequencies, at least 1 and SLOTS in all, with the shortest expected code."""
    slots = [max(1, round(p * SLOTS)) for p in probabilities]
    while sum(slots) != SLOTS:
        step = 1 if sum(slots) < SLOTS else -1
        gains = [
            p * math.log2((f + step) / f) if f + step >= 1 else -math.inf
            for p, f in zip(probabilities, slots, strict=True)
        ]
        slots[gains.index(max(gains))] += step
    return slots


def best_table(probability: Callable[[int], float], low: int, high: int) -> Table:
    """The first symbol and the frequencies, the escape last, that make the shortest code.

    Grows the range of symbols outwards from the most likely one as long as that helps.
    """
    first = last = max(range(low, high + 1), key=probability)
    best: tuple[float, Table] | None = None
    while last - first < 62:
        inside = [probability(k) for k in range(first, last + 1)]
        shares = [*inside, max(1 - sum(inside), 1e-12)]
        slots = slots_of(shares)
        cost = ESCAPE_BITS * shares[-1] - sum(
            share * math.log2(count / SLOTS) for share, count in zip(shares, slots, strict=True)
        )
        if best is None or cost < best[0]:
            best = cost, (first, slots)
        elif cost > best[0] + 0.02:
            break
        if probability(first - 1) >= probability(last + 1):
            first -= 1
        else:
            last += 1
    assert best is not None
    return best[1]


def residual_table(family: int, index: int) -> Table:
    """Indices under the trellis whose steps have 2^((index - 10) / 4) to a deviation."""
    cdf = mixture_cdf(RESIDUAL_LAPLACE[family])
    width = 2.0 ** ((index - 10) / 4) * WIDTH[min(index, len(WIDTH) - 1)]
    half = HALF_SHARE[min(index, len(HALF_SHARE) - 1)]

    def cell(middle: float) -> float:
        return cdf((middle + 0.5) / width) - cdf((middle - 0.5) / width)

    known = {k: (1 - half) * cell(k) + half * cell(k + 0.5) for k in range(-66, 67)}
    return best_table(known.__getitem__, -64, 64)


def lossless_table(family: int, fraction: int) -> Table:
    """Symbols k' = 0 - exponent, where the mean of the exponents is near fraction / 4.

    The exponent of x is floor(log2 |x|); the scale of x for a wanted mean is found by bisection,
    for eight means within the quarter that rounds to this fraction.
    """
    cdf = mixture_cdf(LOSSLESS_LAPLACE[family])

    def share(exponent: int, scale: float) -> float:
        low, high = 2.0 ** (exponent - scale), 2.0 ** (exponent + 1 - scale)
        return 2 * (cdf(high) - cdf(low))

    def mean(scale: float) -> float:
        return sum(e * share(e, scale) for e in range(-40, 24))

    scales = []
    for part in range(8):
        low, high = -8.0, 8.0
        wanted = (fraction + (part - 3.5) / 8) / 4
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if mean(middle) < wanted else (low, middle)
        scales.append(low)
    known = {k: sum(share(-k, scale) for scale in scales) / len(scales) for k in range(-66, 67)}
    return best_table(known.__getitem__, -32, 32)


def all_tables() -> Iterator[tuple[str, Table]]:
    """Every table under its name, in the order of the document."""
    for family in range(FAMILIES):
        for index in range(RESIDUAL_CLASSES):
            yield f"residual {family} {index}", residual_table(family, index)
    for family in range(FAMILIES):
        for fraction in range(4):
            yield f"lossless {family} {fraction}", lossless_table(family, fraction)


def wrapped(head: str, words: list[str], indent: str) -> Iterator[str]:
    """Lines of at most 100 characters: the head, then the words."""
    line = head
    for word in words:
        if len(line) + 1 + len(word) > 100:
            yield line
            line = indent + word
        else:
            line += word if line[-1] in " {" else " " + word
    yield line


def text_form(tables: list[tuple[str, Table]]) -> str:
    """One table after the other: name, first symbol, frequencies, the escape's last."""
    lines = [
        line
        for name, (first, slots) in tables
        for line in wrapped(f"{name} first {first}:", [str(count) for count in slots], "    ")
    ]
    return "\n".join(lines) + "\n"


HEADER = """\
// Generated by tools/make_tables.py: static tables of coded sections, FORMAT.md, appendix A.
#pragma once

#include <cstdint>

namespace kvc {

// One table as the kernels load it. Symbol j < escape stands for first + j; slots hold the symbol
// of each of the 256 states modulo 256. Everything behind the escape is zero.
struct alignas(64) CodingTable {
  uint8_t slots[256];
  uint8_t freq[64];
  uint8_t cum[64];
  uint16_t cost[64];  // round(256 * log2(256 / freq)): length of the symbol's code in 1/256 bit
  int8_t first;
  uint8_t escape;  // index of the escape symbol, which is the last one; its byte is not in cost
};

struct CompactTable {
  int8_t first;
  uint8_t count;  // symbols, the escape included
  uint8_t freq[64];
};

// round(256 * log2(256 / f)) of a frequency f; [0] is not used.
inline constexpr uint16_t kCodeLength[257] = {
@LENGTHS@
};

// What an index k costs a path of the trellis, at [n][k + 32]: 6.5 for each bit of the shorter of
// both families' codes, an escape's byte included. The unit is the square of 1/4 half step.
inline constexpr uint8_t kPathCost[17][64] = {
@PATH@
};

constexpr CodingTable expand(const CompactTable& from) {
  CodingTable to{};
  to.first = from.first;
  to.escape = static_cast<uint8_t>(from.count - 1);
  unsigned slot = 0;
  for (unsigned j = 0; j < from.count; ++j) {
    to.freq[j] = from.freq[j];
    to.cum[j] = static_cast<uint8_t>(slot);
    to.cost[j] = kCodeLength[from.freq[j]];
    for (unsigned i = 0; i < from.freq[j]; ++i) to.slots[slot++] = static_cast<uint8_t>(j);
  }
  return to;
}

// [family * 17 + n]
inline constexpr CodingTable kResidualTables[34] = {
@RESIDUAL@
};

// [family * 4 + e mod 4]
inline constexpr CodingTable kLosslessTables[8] = {
@LOSSLESS@
};

}  // namespace kvc
"""


def path_cost(tables: dict[str, Table], number: int) -> list[int]:
    """One row of kPathCost."""

    def length(family: int, k: int) -> int:
        first, slots = tables[f"residual {family} {number}"]
        j, escape = k - first, len(slots) - 1
        inside = 0 <= j < escape
        bits = math.log2(SLOTS / slots[j if inside else escape])
        return round(256 * bits) + (0 if inside else 256 * ESCAPE_BITS)

    return [13 * min(length(0, k), length(1, k)) + 256 >> 9 for k in range(-32, 32)]


def cpp_form(tables: list[tuple[str, Table]]) -> str:
    """The whole of tables.h."""

    def listed(numbers: list[int], end: str) -> list[str]:
        return [f"{number}," for number in numbers[:-1]] + [f"{numbers[-1]}{end}"]

    def rows(kind: str) -> str:
        return "\n".join(
            line
            for name, (first, slots) in tables
            if name.startswith(kind)
            for line in wrapped(
                f"    expand({{{first}, {len(slots)}, {{", listed(slots, "}}),"), " " * 12
            )
        )

    lengths = [0] + [round(256 * math.log2(SLOTS / count)) for count in range(1, SLOTS + 1)]
    costs = [path_cost(dict(tables), number) for number in range(RESIDUAL_CLASSES)]
    paths = [line for row in costs for line in wrapped("    {", listed(row, "},"), "     ")]
    text = HEADER.replace("@LENGTHS@", "\n".join(wrapped("    ", listed(lengths, ","), "    ")))
    text = text.replace("@PATH@", "\n".join(paths))
    return text.replace("@RESIDUAL@", rows("residual")).replace("@LOSSLESS@", rows("lossless"))


def python_form(module: str, text: str) -> str:
    """The module tables.py with the tables in it."""
    return re.sub(
        r'^_TEXT = """.*?^"""$',
        lambda _: f'_TEXT = """\\\n{text}"""',
        module,
        flags=re.DOTALL | re.MULTILINE,
    )


def document_form(document: str, text: str) -> str:
    """FORMAT.md with the tables in its appendix."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    block = f"```tables\n{text}```\n\nSHA-256 of these lines: `{digest}`."
    return re.sub(
        r"```tables\n.*?```\n\nSHA-256 of these lines: `\w*`\.", block, document, flags=re.DOTALL
    )


def outputs() -> dict[Path, str]:
    """Every generated file and what it has to hold."""
    tables = list(all_tables())
    text = text_form(tables)
    document, module = ROOT / "proto" / "FORMAT.md", ROOT / "kvcodec" / "tables.py"
    return {
        module: python_form(module.read_text(encoding="utf-8"), text),
        ROOT / "kvcodec" / "native" / "tables.h": cpp_form(tables),
        document: document_form(document.read_text(encoding="utf-8"), text),
    }


def main() -> None:
    """Write the files."""
    for path, text in outputs().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
