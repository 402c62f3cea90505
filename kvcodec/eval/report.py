"""What was found, for people and for programs: a table, a document, a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kvcodec.errors import ConfigError

__all__ = ["console_of", "draw", "save_figure", "show", "show_layers", "table_of"]

#: One codec on one variant of the model: `variant`, `codec`, and what `Tally.as_json` gives.
Row = dict[str, Any]

_WIDTH = 150


def console_of() -> Console:
    """A console of stdout, wide enough for tables where stdout is no terminal."""
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def table_of(names: Sequence[str], title: str, numbers_from: int) -> Table:
    """An empty table; columns from that index on hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for index, name in enumerate(names):
        right = index >= numbers_from
        table.add_column(name, justify="right" if right else "left", no_wrap=right)
    return table


def _pair(mean: float, error: float | None) -> str:
    return f"{mean:+.5f}" + ("" if error is None else f" ±{error:.5f}")


def show(variants: Sequence[dict[str, Any]], rows: Sequence[Row]) -> None:
    """A table for each variant of the model."""
    console = console_of()
    names = ("codec", "bits", "ratio", "ppl", "loss increase", "KL", "top-1", "K rMSE", "V rMSE")
    for variant in variants:
        title = (
            f"{variant['name']}: loss {variant['loss']:.4f}, perplexity "
            f"{variant['perplexity']:.3f} over {variant['tokens']} tokens"
        )
        table = table_of((*names, "attn KL", "attn out"), title, 1)
        for row in rows:
            if row["variant"] != variant["name"]:
                continue
            table.add_row(
                row["codec"],
                f"{row['bits_per_value']:.3f}",
                f"{row['ratio']:.2f}x",
                f"{row['perplexity']:.3f}",
                _pair(row["loss_increase"], row["loss_increase_se"]),
                f"{row['kl']:.3g}" + ("" if row["kl_se"] is None else f" ±{row['kl_se']:.1g}"),
                f"{100 * row['top1_agreement']:.2f}%",
                *(f"{row[name]:.3g}" for name in ("key_mse", "value_mse")),
                *(f"{row[name]:.3g}" for name in ("attention_kl", "output_error")),
            )
        console.print(table)
        console.print()


def show_layers(rows: Sequence[Row]) -> None:
    """A line for each layer of each codec."""
    console = console_of()
    names = ("codec", "layer", "K rMSE", "V rMSE", "attn KL", "attn out")
    for variant in dict.fromkeys(row["variant"] for row in rows):
        table = table_of(names, str(variant), 1)
        for row in rows:
            if row["variant"] != variant:
                continue
            for layer in row["layers"]:
                table.add_row(
                    row["codec"],
                    str(layer["layer"]),
                    *(
                        f"{layer[name]:.3g}"
                        for name in ("key_mse", "value_mse", "attention_kl", "output_error")
                    ),
                )
        console.print(table)
        console.print()


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Divergence of predictions, and error of attention, against bits per value."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError(f"--plot needs matplotlib, of the extra eval: {error}") from error
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.4))
    panels = (("kl", "KL of predictions, nats"), ("output_error", "relative error of attention"))
    for panel, (name, label) in zip(axes, panels, strict=True):
        for variant, marker in zip(variants, "os", strict=False):
            points = [row for row in rows if row["variant"] == variant and row[name] > 0]
            bits = [row["bits_per_value"] for row in points]
            panel.semilogy(bits, [row[name] for row in points], marker, label=variant)
            for row in points:
                panel.annotate(
                    row["codec"], (row["bits_per_value"], row[name]), fontsize=6,
                    xytext=(4, 3), textcoords="offset points",
                )  # fmt: skip
        panel.set_xlabel("bits per value, all metadata included")
        panel.set_ylabel(label)
        panel.grid(True, which="both", alpha=0.25)
        panel.legend()
    figure.suptitle(title)
    figure.tight_layout()
    save_figure(figure, path)
    pyplot.close(figure)


def save_figure(figure: Any, path: Path) -> None:  # noqa: ANN401 - of matplotlib, which may be missing
    """Write a figure, whose kind the name's ending says, and make its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the plot {str(path)!r} cannot be written: {error}") from error
