"""Error against bits, and decoding speed against bits: this project's codecs among the peers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peers.statement import has_values_above, is_ecq
from peers.tables import caches_of, means

Document = Mapping[str, Any]
Points = Mapping[str, tuple[float, float]]

_OURS = "kvcodec"
#: Width of a letter and height of a line of the smallest print, in points.
_LETTER, _LINE = 3.3, 7.0
_COLOURS = {
    _OURS: "#c0392b",
    "KVTuner": "#2471a3",
    "KIVI": "#117a65",
    "HF QuantizedCache": "#b9770e",
    "fp8": "#7d3c98",
    "NVFP4": "#5d6d7e",
    "TurboQuant": "#d35400",
    "ggml": "#1abc9c",
    "bitsandbytes": "#884ea0",
    "CacheGen": "#a04000",
    "lossless": "#34495e",
}


def draw(document: Document, folder: Path) -> None:
    """Two files, ``peers-error.svg`` and ``peers-speed.svg``."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "peers"
    from matplotlib import pyplot

    found = means(caches_of(document))
    bits = {codec: mean["bits_per_value"] for codec, mean in found.items()}
    figure, panels = pyplot.subplots(1, 2, figsize=(15, 8))
    named = []
    for panel, (name, text) in zip(
        panels,
        (("output_error", "error of attention outputs"), ("kl", "KL of predictions, nats")),
        strict=True,
    ):
        points = {c: (bits[c], mean[name]) for c, mean in found.items() if mean[name] > 0}
        _scatter(panel, document, points)
        named.append((panel, points))
        panel.set_ylabel(f"{text}, mean of {len(caches_of(document))} caches")
    _save(figure, document, named, folder / "peers-error.svg")
    figure, panel = pyplot.subplots(figsize=(11, 7))
    rates = {c: row["decode_ratio"] for c, row in document["speed"].items()}
    points = {c: (bits[c], rate) for c, rate in rates.items() if c in bits}
    _scatter(panel, document, points)
    panel.axhline(1, color="black", linewidth=0.8, linestyle="--")
    panel.set_ylabel("decoding, raw bytes per second of one thread, memcpy = 1")
    _save(figure, document, [(panel, points)], folder / "peers-speed.svg")


def _scatter(panel: Any, document: Document, points: Points) -> None:
    """A colour for every family; hollow if re-implemented; our ecq joined by a line."""
    seen = set()
    for codec, (x, y) in points.items():
        peer = document["peers"].get(codec)
        family = peer["family"] if peer else _OURS
        colour = _COLOURS[family]
        style: dict[str, Any] = {"marker": "o" if peer else "D", "color": colour, "linestyle": ""}
        if peer and not peer["package"]:
            style["markerfacecolor"] = "none"
        panel.plot(x, y, label=None if family in seen else family, markersize=5, **style)
        seen.add(family)
        if peer and peer["packed_bits"] not in (None, x):
            panel.plot([peer["packed_bits"], x], [y, y], ":", color=colour, linewidth=0.8)
            panel.plot(peer["packed_bits"], y, "|", color=colour)
    for is_on, style in ((is_ecq, "-"), (has_values_above, "--")):
        curve = sorted(point for codec, point in points.items() if is_on(codec))
        panel.plot(*zip(*curve, strict=True), style, color=_COLOURS[_OURS], linewidth=1)
    panel.set_yscale("log")
    panel.set_xlabel("bits per value as stored, all metadata; dotted: to where packing would bring")


def _name(panel: Any, document: Document, points: Points) -> None:
    """Write every name beside its point, where no other name is yet; a thin line leads to it."""
    panel.figure.canvas.draw()
    to_pixels = panel.transData.transform
    scale = panel.figure.dpi / 72
    left_edge, right_edge = (edge / scale for edge in panel.get_window_extent().intervalx)
    centres = [[value / scale for value in to_pixels(point)] for point in points.values()]
    taken = [(x - 2.5, y - 2.5, x + 2.5, y + 2.5) for x, y in centres]
    for codec, point in sorted(points.items(), key=lambda at: (-at[1][1], at[1][0])):
        peer = document["peers"].get(codec)
        x, y = (value / scale for value in to_pixels(point))
        width, height = _LETTER * len(codec), _LINE
        for dx, dy in _places(width):
            box = (x + dx, y + dy, x + dx + width, y + dy + height)
            is_inside = left_edge < box[0] and box[2] < right_edge
            if is_inside and not any(
                box[0] < right and left < box[2] and box[1] < top and bottom < box[3]
                for left, bottom, right, top in taken
            ):
                break
        taken.append(box)
        line = {"arrowstyle": "-", "linewidth": 0.3, "color": "0.5"} if abs(dy) > _LINE else None
        panel.annotate(
            codec, point, fontsize=6, color=_COLOURS[peer["family"] if peer else _OURS],
            xytext=(dx, dy), textcoords="offset points", arrowprops=line,
        )  # fmt: skip


def _places(width: float) -> Iterator[tuple[float, float]]:
    """Where a name may begin, in points from its point: near first, right before left."""
    for step in range(14):
        for sign in (1, -1) if step else (1,):
            yield 5.0, sign * step * _LINE / 2 - 2
            yield -5 - width, sign * step * _LINE / 2 - 2


def _save(
    figure: Any, document: Document, panels: Sequence[tuple[Any, Points]], path: Path
) -> None:
    for panel, _ in panels:
        panel.grid(True, which="both", alpha=0.2)
    panels[0][0].legend(fontsize=8, title="hollow: re-implemented", title_fontsize=8)
    figure.tight_layout()
    for panel, points in panels:
        _name(panel, document, points)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
