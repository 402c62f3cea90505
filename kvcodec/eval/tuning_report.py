"""What ``kvcodec tune`` found, for people: tables, and the front as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcodec.errors import ConfigError
from kvcodec.eval.report import console_of, save_figure, table_of

__all__ = ["draw_front", "show_tuning"]


def show_tuning(document: dict[str, Any]) -> None:
    """The points of the profile and what they save, then what they were compared with."""
    console = console_of()
    exact = document["exact"]
    title = (
        f"{document['model']['name']}: loss {exact['loss']:.4f} over {exact['tokens']} tokens of "
        f"{len(document['held_out_windows'])} held-out windows"
    )
    figures = ("measured bits", "KL", "expected KL", "loss increase")
    table = table_of(("point", *figures, "saves: uniform", "saves: ladder"), title, 1)
    for point in document["points"]:
        saved = (point["saved_against_uniform"], point["saved_against_ladder"])
        table.add_row(f"@{point['bits']:g}", *_figures(point), *map(_saved, saved))
    console.print(table)
    console.print()
    table = table_of(("compared with", *figures), "", 1)
    for row in document["others"]:
        table.add_row(row["family"], *_figures(row))
    console.print(table)


def _figures(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['bits_per_value']:.3f}",
        _pair(f"{row['kl']:.3g}", row["kl_se"], ".1g"),
        f"{row['predicted_kl']:.3g}",
        _pair(f"{row['loss_increase']:+.5f}", row["loss_increase_se"], ".5f"),
    ]


def _pair(mean: str, error: float | None, form: str) -> str:
    return mean if error is None else f"{mean} ±{error:{form}}"


def _saved(saved: dict[str, Any] | None) -> str:
    """In bits; a dash where the others do not reach the point's divergence."""
    return "-" if saved is None else _pair(f"{saved['bits']:+.3f} bit", saved["se"], ".3f")


def draw_front(document: dict[str, Any], path: Path) -> None:
    """Divergence against bits: the tuned points, and what they were compared with."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError(f"--plot needs matplotlib, of the extra eval: {error}") from error
    figure, panel = pyplot.subplots(figsize=(7, 4.6))
    curves: dict[str, Sequence[dict[str, Any]]] = {"tuned ecq": document["points"]}
    for row in document["others"]:
        curves[row["family"]] = [*curves.get(row["family"], ()), row]
    for (name, rows), marker in zip(curves.items(), "osv^", strict=False):
        points = sorted((row["bits_per_value"], row["kl"], row["kl_se"] or 0.0) for row in rows)
        bits, kl, errors = zip(*points, strict=True)
        panel.errorbar(bits, kl, errors, marker=marker, markersize=4, linewidth=1, label=name)
    panel.set_yscale("log")
    panel.set_xlabel("bits per value, all metadata included")
    panel.set_ylabel("KL of predictions on held-out windows, nats")
    panel.grid(True, which="both", alpha=0.25)
    panel.legend()
    panel.set_title(document["model"]["name"])
    figure.tight_layout()
    save_figure(figure, path)
    pyplot.close(figure)
