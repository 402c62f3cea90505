"""What the commands of this package have alike: options, texts, imprints, a bar, versions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from kvcodec.eval.runner import Mode, Options

__all__ = ["Opening", "imprinted", "progress_bar", "text_of", "versions"]

_COMPUTE = ("float32", "bfloat16", "float16")
_CACHE = ("bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """The options that both commands have; see there. A value that is not allowed is a
    `ConfigError` where it is first used.
    """

    model: str
    mode: str = "context"
    context: int = 512
    score: int = 0
    page_size: int = 64
    sink_tokens: int = 0
    imprint: str = ""
    compute: str = "float32"
    cache: str = "bfloat16"
    device: str = "cpu"

    def cutting(self, windows: int = 0) -> Options:
        """How a text is cut into windows, at most `windows` of them; 0 is all."""
        return Options(
            mode=Mode(_one_of("--mode", self.mode, [mode.value for mode in Mode])),
            context=self.context,
            score=self.score,
            page_size=self.page_size,
            sink_tokens=self.sink_tokens,
            windows=windows,
        )

    def types(self) -> tuple[torch.dtype, torch.dtype]:
        """What the model runs in, and what its cache is kept in."""
        compute = _one_of("--compute", self.compute, _COMPUTE)
        return getattr(torch, compute), getattr(torch, _one_of("--cache", self.cache, _CACHE))

    def outliers(self) -> Imprint | None:
        """What is put into the model first, if anything."""
        return Imprint.parse(self.imprint) if self.imprint else None


def _one_of(name: str, value: str, allowed: Sequence[str]) -> str:
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
