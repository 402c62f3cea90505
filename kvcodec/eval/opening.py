"""What the commands of this package open alike: words, texts, imprints, a bar, versions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from kvcodec.errors import ConfigError
from kvcodec.eval.imprint import Imprint, check_same, imprint
from kvcodec.eval.model import CachedModel

__all__ = ["CACHE", "COMPUTE", "imprinted", "one_of", "progress_bar", "text_of", "versions"]

COMPUTE = ("float32", "bfloat16", "float16")
CACHE = ("bfloat16", "float16")


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """`value`, or a `ConfigError` that names the option and what it may be."""
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}, allowed are {', '.join(allowed)}")
    return value


def text_of(path: Path) -> str:
    """The text in a file. Raises `ConfigError`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the text {str(path)!r} cannot be read: {error}") from error


def imprinted(raw: PreTrainedModel, what: Imprint, ids: Tensor, compute: torch.dtype) -> float:
    """Imprint the model in place, and make sure on the tokens `ids` that it is still the same
    function; the largest change.
    """
    bare, ids = CachedModel(raw, None), ids.to(raw.device)
    before = bare.logits(ids, len(ids) - 1)
    imprint(raw, what)
    return check_same(before, bare.logits(ids, len(ids) - 1), compute)


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {name: version(name) for name in ("kvcodec", "torch", "transformers")}


@contextmanager
def progress_bar(total: int | None) -> Iterator[Callable[[str], None]]:
    """A bar on stderr where somebody watches, and a function that advances it."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)
