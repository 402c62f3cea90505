"""Error against size of every preset on synthetic KV: a table, a JSON document and a plot.

    make quality

The data is synthetic, because no model weights are shipped: keys have log-normal channel scales,
channel offsets and 2 % outlier channels, values are close to Gaussian, as published for RoPE models
with grouped-query attention. The errors compare presets with each other; they do not foretell the
perplexity of a model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvcodec.codec import Codec
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.plan import PagePlan
from kvcodec.section import Transform
from kvcodec.spec import PRESETS, CodecSpec

LAYERS, HEADS, TOKENS, HEAD_SIZE = 8, 4, 64, 128
KEY = b"0" * 64


def synthetic(rng: np.random.Generator, *, keys: bool) -> npt.NDArray[np.uint16]:
    """One page of bf16 bits, (1, layers, heads, tokens, head_size)."""
    shape = (1, LAYERS, HEADS, 1, HEAD_SIZE)
    scale = np.exp((0.6 if keys else 0.25) * rng.standard_normal(shape))
    offset = (0.8 if keys else 0.05) * scale * rng.standard_normal(shape)
    if keys:
        outlier = rng.random(shape) < 0.02
        scale, offset = np.where(outlier, 4 * scale, scale), np.where(outlier, 8 * offset, offset)
    token = np.exp(0.15 * rng.standard_normal((1, LAYERS, HEADS, TOKENS, 1)))
    noise = rng.standard_normal((1, LAYERS, HEADS, TOKENS, HEAD_SIZE))
    values = (token * (offset + scale * noise)).astype(np.float32)
    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def numbers(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bf16 bits as numbers."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def relative_error(before: npt.NDArray[np.uint16], after: npt.NDArray[np.uint16]) -> float:
    """Root mean square error over root mean square value."""
    x, y = numbers(before), numbers(after)
    return float(np.sqrt(np.square(x - y).mean() / np.square(x).mean()))


def measure(
    preset: str, pages: list[list[npt.NDArray[np.uint16]]], codec: Codec
) -> dict[str, object]:
    """Encode and decode the pages; sizes include every byte of the page."""
    layout = PageLayout.mha(
        dtype=DType.BF16,
        token_count=TOKENS,
        layer_count=LAYERS,
        head_count=HEADS,
        head_size=HEAD_SIZE,
    )
    namespace = Namespace(Identity.of(model="synthetic"), layout)
    plan = PagePlan.build(namespace, CodecSpec.parse(preset).section_codecs(layout), len(KEY))
    errors, sizes = [], []
    for page in pages:
        slot = np.zeros(plan.page_bytes, np.uint8)
        decoded = [np.empty_like(array) for array in page]
        views = PageViews.of_arrays(layout, page)
        sizes.append(int(codec.encode_into(plan, [KEY], views, [slot]).page_bytes[0]))
        (problem,) = codec.decode_into(
            namespace, plan, [KEY], [slot[: sizes[-1]]], PageViews.of_arrays(layout, decoded)
        )
        if problem is not None:
            raise problem
        errors.append([relative_error(a, b) for a, b in zip(page, decoded, strict=True)])
    page_bytes = float(np.mean(sizes))
    key_error, value_error = np.mean(errors, axis=0).tolist()
    return {
        "preset": preset,
        "bits_per_value": 8 * page_bytes / (layout.raw_bytes / layout.dtype.itemsize),
        "ratio": layout.raw_bytes / page_bytes,
        "key_error": key_error,
        "value_error": value_error,
    }


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Error of keys and values against bits per value."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for name, marker in (("key_error", "o"), ("value_error", "s")):
        points = [row for row in rows if row[name]]
        axes.semilogy(
            [p["bits_per_value"] for p in points],
            [p[name] for p in points],
            marker,
            label=name[:-6] + "s",
        )
    for row in rows:
        if row["key_error"]:
            axes.annotate(
                str(row["preset"]), (row["bits_per_value"], row["key_error"]), fontsize=7,
                xytext=(5, 3), textcoords="offset points",
            )  # fmt: skip
    axes.set_xlabel("bits per value, all metadata included")
    axes.set_ylabel("relative RMS error")
    axes.set_title("kvcodec presets on synthetic KV")
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    """Measure every preset; write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--pages", type=int, default=4)
    options = parser.parse_args()
    rng = np.random.default_rng(2026)
    pages = [[synthetic(rng, keys=True), synthetic(rng, keys=False)] for _ in range(options.pages)]
    codec = Codec(2)
    specs = {name: CodecSpec.parse(name) for name in reversed(PRESETS)}
    # These keys are not rotated: nothing could be taken out.
    named = {
        spec.text: name
        for name, spec in specs.items()
        if spec.key.transform is not Transform.DEROTATED
    }
    console = Console(stderr=True)
    rows = [
        measure(name, pages, codec)
        for name in track(list(named.values())[::-1], "presets", console=console)
    ]
    codec.close()
    rows.sort(key=lambda row: -float(str(row["bits_per_value"])))
    table = Table(
        "preset",
        "bits/value",
        "ratio",
        "key error",
        "value error",
        title="synthetic KV, 64-token pages",
    )
    for row in rows:
        table.add_row(
            str(row["preset"]),
            f"{row['bits_per_value']:.3f}",
            f"{row['ratio']:.2f}x",
            f"{row['key_error']:.4f}",
            f"{row['value_error']:.4f}",
        )
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
