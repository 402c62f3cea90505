"""What was measured, as Markdown, and put between marks in the pages of docs/."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers.statement import equal_bits, is_ecq

Document = Mapping[str, Any]
Row = Mapping[str, Any]

_DAGGER = " †"
_BLOCK = re.compile(r"<!-- peers: (?P<name>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def caches_of(document: Document) -> dict[str, list[Row]]:
    """Rows of every cache: a model, natural or imprinted."""
    found: dict[str, list[Row]] = {}
    for model, quality in document["quality"].items():
        for row in quality["rows"]:
            found.setdefault(f"{model} {row['variant']}", []).append(row)
    return found


def means(caches: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, float]]:
    """Of every codec, the mean over all caches of bits and errors."""
    names = ("bits_per_value", "key_mse", "value_mse", "attention_kl", "output_error", "kl")
    found = {}
    for codec in dict.fromkeys(row["codec"] for rows in caches.values() for row in rows):
        mine = [row for rows in caches.values() for row in rows if row["codec"] == codec]
        found[codec] = {name: math.fsum(row[name] for row in mine) / len(mine) for name in names}
    return found


def label(document: Document, codec: str) -> str:
    """How a table names a codec: ours as code, a re-implementation with a dagger."""
    peer = document["peers"].get(codec)
    if peer is None:
        return f"`{codec}`"
    return codec if peer["package"] else codec + _DAGGER


def _sorted(document: Document, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    return sorted(found, key=lambda codec: -_bits(document, codec, found[codec]["bits_per_value"]))


def _bits(document: Document, codec: str, stored: float) -> float:
    packed = document["peers"].get(codec, {}).get("packed_bits")
    return stored if packed is None else packed


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}"


def _percent(row: Row) -> str:
    return f"{100 * math.expm1(row['loss_increase']):+.2f}"


def _speed(document: Document, codec: str) -> list[str]:
    speed = document["speed"].get(codec)
    if speed is None:
        return ["–", "–"]
    return [f"{speed[name]:.2g}" for name in ("encode_ratio", "decode_ratio")]


def _stored(document: Document, codec: str, stored: float) -> str:
    packed = document["peers"].get(codec, {}).get("packed_bits")
    if packed is None or packed == stored:
        return f"{stored:.2f}"
    return f"{stored:.2f} ({packed:.2f})"


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    marks = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *rows)) + "\n"


def main_table(document: Document) -> str:
    """A line for every codec: errors are means over all caches."""
    caches = caches_of(document)
    found = means(caches)
    head = ["codec", "bits", "ratio", "K rMSE", "V rMSE", "attn KL", "attn out", "ecq bits"]
    head += [f"ppl % {_short(name)}" for name in caches] + ["encode", "decode"]
    lines = []
    for codec in _sorted(document, found):
        mean = found[codec]
        errors = ("key_mse", "value_mse", "attention_kl", "output_error")
        ratio = f"{16 / mean['bits_per_value']:.2f}x"
        line = [label(document, codec), _stored(document, codec, mean["bits_per_value"]), ratio]
        line += [_number(mean[name]) for name in errors]
        line.append("" if is_ecq(codec) else _equal(caches, codec))
        rows = [next(r for r in rows if r["codec"] == codec) for rows in caches.values()]
        lines.append([*line, *map(_percent, rows), *_speed(document, codec)])
    return _lines(head, lines)


def _short(cache: str) -> str:
    """``qwen3_small natural`` -> ``qwen3 nat``."""
    model, variant = cache.split()
    return f"{model.split('_')[0]} {variant[:3]}"


def _equal(caches: Mapping[str, Sequence[Row]], codec: str) -> str:
    bits = [equal_bits(rows, codec, "output_error") for rows in caches.values()]
    known = [value for value in bits if value is not None]
    return f"{math.fsum(known) / len(known):.2f}" if len(known) == len(bits) else "–"


def variant_tables(document: Document) -> str:
    """A table for every cache, with standard errors over windows."""
    parts = []
    head = ["codec", "bits", "loss increase", "KL", "top-1", "K rMSE", "V rMSE", "attn KL"]
    head += ["attn out", "ecq bits"]
    for name, rows in caches_of(document).items():
        by_name = {row["codec"]: row for row in rows}
        lines = []
        for codec in _sorted(document, by_name):
            row = by_name[codec]
            line = [label(document, codec), _stored(document, codec, row["bits_per_value"])]
            line.append(f"{row['loss_increase']:+.4f} ± {row['loss_increase_se']:.4f}")
            line.append(f"{_number(row['kl'])} ± {row['kl_se']:.1g}")
            line.append(f"{100 * row['top1_agreement']:.1f} %")
            errors = ("key_mse", "value_mse", "attention_kl", "output_error")
            line += [_number(row[error]) for error in errors]
            bits = None if is_ecq(codec) else equal_bits(rows, codec, "output_error")
            lines.append([*line, "" if bits is None else f"{bits:.2f}"])
        parts.append(f"### `{name.replace(' ', '`, ')}\n\n{_lines(head, lines)}")
    return "\n".join(parts)


def speed_table(document: Document) -> str:
    """A line for every codec that was timed."""
    head = ["codec", "encode", "quartiles", "GB/s", "decode", "quartiles", "GB/s", "rounds"]
    lines = []
    for codec, row in sorted(document["speed"].items(), key=lambda at: -at[1]["decode_ratio"]):
        line = [label(document, codec)]
        for name in ("encode", "decode"):
            quartiles = " to ".join(f"{row[f'{name}_{part}']:.2g}" for part in ("p25", "p75"))
            line += [f"{row[f'{name}_ratio']:.2g}", quartiles, f"{row[f'{name}_gb_per_s']:.2g}"]
        lines.append([*line, str(int(row["rounds"]))])
    return _lines(head, lines)


def peer_table(document: Document) -> str:
    """Where every peer comes from."""
    lines = []
    for name, peer in document["peers"].items():
        origin = peer["package"] or "re-implemented"
        remarks = "; ".join(filter(None, (peer["remark"], peer["untimed"])))
        lines.append([label(document, name), origin, peer["source"], remarks])
    table = _lines(["peer", "package", "how, or from where", "remark"], lines)
    return table.replace("---:", "---")


def left_out_list(document: Document) -> str:
    """What is not measured, and why."""
    reasons = {**document["left_out"], **document["missing"]}
    return "".join(f"* {name}: {reason}.\n" for name, reason in reasons.items())


def _at_equal_error(found: Mapping[str, float | None], goal: float) -> str:
    caches = ", ".join(
        f"{name} {'not between the measured points' if bits is None else f'{bits:.2f}'}"
        for name, bits in found.items()
    )
    known = [bits for bits in found.values() if bits is not None]
    reached = sum(bits <= goal for bits in known)
    mean = f", mean {math.fsum(known) / len(known):.2f}" if known else ""
    return f"{caches} ({goal} or less on {reached} of {len(found)}{mean})"


def statement_text(document: Document) -> str:
    """The goal, and what was found."""
    found = document["statement"]
    even, above = (
        _at_equal_error(found[curve], found["goal_bits"])
        for curve in ("ecq_bits", "values_above_bits")
    )
    return (
        f"Bits at which `ecq` has the attention-output error of {found['reference']} "
        f"({found['reference_bits']:.2f} bits), between measured points. "
        f"Keys and values at one rate: {even}. Values 3/8 bit above keys: {above}. "
        f"The goal is {'' if found['is_reached'] else 'not '}reached.\n"
    )


def conditions(document: Document) -> str:
    """Under which circumstances."""
    asked = document["asked"]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    return (
        f"`make peers`, {document['date']}, {document['processor']}, one thread, kernels "
        f"{document['isa']}, {versions}. {asked['windows']} windows of {asked['context']} tokens, "
        f"{asked['scored_tokens']} of them scored, pages of {asked['page_size']} tokens, no sinks, "
        f"every page coded.\n"
    )


BLOCKS = {
    "table": main_table,
    "statement": statement_text,
    "conditions": conditions,
    "variants": variant_tables,
    "speed": speed_table,
    "list": peer_table,
    "left-out": left_out_list,
}


def written(text: str, document: Document) -> str:
    """`text` with every marked block made anew. Raises `ValueError` for a mark of another name."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"no block is called {name!r}; known are {', '.join(BLOCKS)}")
        return f"<!-- peers: {name} -->\n\n{BLOCKS[name](document)}\n<!-- end -->"

    return _BLOCK.sub(block, text)


def write(path: Path, document: Document) -> None:
    """Make the blocks of a page anew."""
    path.write_text(written(path.read_text(encoding="utf-8"), document), encoding="utf-8")
