"""Draw the result of ``kvcodec bench codec --json``: ratio to memcpy, one thread, per codec."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Read the JSON document, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--layout", default="page_first")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        row
        for row in json.loads(options.json.read_text())["rows"]
        if row["threads"] == 1 and row["layout"] == options.layout and row["isa"] != "scalar"
    ]
    codecs = list(dict.fromkeys(row["codec"] for row in rows))
    isas = list(dict.fromkeys(row["isa"] for row in rows))
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    for panel, operation in zip(panels, ("decode", "encode"), strict=True):
        for number, isa in enumerate(isas):
            mine = {
                row["codec"]: row for row in rows if row["op"] == operation and row["isa"] == isa
            }
            heights = [mine[codec]["ratio_memcpy"] if codec in mine else 0 for codec in codecs]
            places = [index + number * 0.8 / len(isas) for index in range(len(codecs))]
            panel.bar(places, heights, 0.8 / len(isas), label=isa)
        panel.axhline(1, color="black", linewidth=0.8, linestyle="--")
        panel.set_title(f"{operation}, one thread, {options.layout}")
        panel.set_xticks([index + 0.2 for index in range(len(codecs))])
        panel.set_xticklabels(codecs, rotation=35, ha="right", fontsize=8)
        panel.grid(True, axis="y", alpha=0.25)
    panels[0].set_ylabel("raw bytes per second, memcpy = 1")
    panels[0].legend()
    figure.tight_layout()
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture)


if __name__ == "__main__":
    main()
