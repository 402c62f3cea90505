"""``kvcodec eval`` and ``kvcodec tune``, found by the command line through the entry-point group
``kvcodec.commands``.

Nothing heavy is imported before a command runs; where torch or transformers is missing, it says so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvcodec.errors import ConfigError

__all__ = ["evaluate", "register", "tune"]


_Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder of transformers, or a name on its hub.")
]
_Specs = Annotated[
    list[str], typer.Argument(metavar="SPEC...", help="Presets or specs, as many as wanted.")
]
_Text = Annotated[Path, typer.Option("--text", metavar="FILE", help="A text to predict.")]
_Mode = Annotated[
    str,
    typer.Option(
        "--mode",
        help="context: every full page is coded. prefix-reuse: those before the scored tokens.",
    ),
]
_Context = Annotated[int, typer.Option("--context", help="Tokens of a window.")]
_Score = Annotated[
    int, typer.Option("--score", help="Tokens at the end of a window to score; 0: half of it.")
]
_PageSize = Annotated[int, typer.Option("--page-size", help="Tokens of a page.")]
_SinkTokens = Annotated[
    int, typer.Option("--sink-tokens", help="First tokens of a window that stay raw.")
]
_Windows = Annotated[
    int, typer.Option("--windows", help="At most so many, spread over the text; 0: all.")
]
_Imprint = Annotated[
    str,
    typer.Option(
        "--imprint",
        metavar="WORDS",
        help="Measure also with outliers: keys=8,pairs=3,values=0.5,seed=0.",
    ),
]
_Peer = Annotated[
    list[str] | None,
    typer.Option("--peer", metavar="MODULE:NAME", help="Another codec; may be repeated."),
]
_Compute = Annotated[
    str, typer.Option("--compute", help="float32, bfloat16 or float16: what the model runs in.")
]
_Cache = Annotated[
    str, typer.Option("--cache", help="bfloat16 or float16: what the cache is kept in.")
]
_Device = Annotated[str, typer.Option("--device", help="Where the model runs.")]
_LayersTable = Annotated[bool, typer.Option("--layers-table", help="Show a line per layer too.")]
_Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw quality against bits.")
]
_AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]


_Texts = Annotated[
    list[Path], typer.Option("--text", metavar="FILE", help="A text to predict; may be repeated.")
]
_Output = Annotated[
    Path, typer.Option("--output", metavar="FILE", help="Where the profile goes, a JSON file.")
]
_Bits = Annotated[
    str, typer.Option("--bits", help="Sizes to find specs for, bits per value of whole pages.")
]
_ProbedWindows = Annotated[
    int, typer.Option("--windows", help="Windows of the text to measure sections on.")
]
_HeldOut = Annotated[
    int, typer.Option("--held-out", help="Other windows, to measure what was found.")
]
_Seed = Annotated[int, typer.Option("--seed", help="Which windows of the text are which.")]
_Ladder = Annotated[
    bool, typer.Option("--ladder/--no-ladder", help="Compare with the best of 2, 4 and 8 bits.")
]
_TunedImprint = Annotated[
    str,
    typer.Option(
        "--imprint",
        metavar="WORDS",
        help="Put outliers in first: keys=8,pairs=3,values=0.5,seed=0.",
    ),
]
_FrontPlot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw divergence against bits.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("eval")(evaluate)
    app.command("tune")(tune)


def evaluate(
    model: _Model,
    specs: _Specs,
    text: _Text,
    mode: _Mode = "context",
    context: _Context = 512,
    score: _Score = 0,
    page_size: _PageSize = 64,
    sink_tokens: _SinkTokens = 0,
    windows: _Windows = 0,
    imprint: _Imprint = "",
    peer: _Peer = None,
    compute: _Compute = "float32",
    cache: _Cache = "bfloat16",
    device: _Device = "cpu",
    layers_table: _LayersTable = False,
    plot: _Plot = None,
    as_json: _AsJson = False,
) -> int:
    """What codecs cost a language model: perplexity, divergence and attention error against bits.

    The model's cache goes through real pages of this codec, page by page as a store would have
    them, and the model predicts a text from what comes back.
    """
    try:
        from kvcodec.eval.memory import keep_memory
        from kvcodec.eval.report import draw, show, show_layers
        from kvcodec.eval.session import Session, run_session
    except ImportError as error:
        raise ConfigError(
            f"kvcodec eval needs what pip install 'kvcodec[eval]' brings: {error}"
        ) from error
    session = Session(
        model=model,
        specs=tuple(specs),
        text=text,
        mode=mode,
        context=context,
        score=score,
        page_size=page_size,
        sink_tokens=sink_tokens,
        windows=windows,
        imprint=imprint,
        peers=tuple(peer or ()),
        compute=compute,
        cache=cache,
        device=device,
    )
    keep_memory()
    document = run_session(session)
    if plot is not None:
        draw(document["rows"], Path(model).name, plot)
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
        return 0
    show(document["variants"], document["rows"])
    if layers_table:
        show_layers(document["rows"])
    return 0


def tune(
    model: _Model,
    text: _Texts,
    output: _Output,
    bits: _Bits = "2.25,2.5,2.75,3,3.25,3.5,4,4.5",
    windows: _ProbedWindows = 8,
    held_out: _HeldOut = 16,
    seed: _Seed = 0,
    ladder: _Ladder = True,
    mode: _Mode = "context",
    context: _Context = 512,
    score: _Score = 0,
    page_size: _PageSize = 64,
    sink_tokens: _SinkTokens = 0,
    imprint: _TunedImprint = "",
    compute: _Compute = "float32",
    cache: _Cache = "bfloat16",
    device: _Device = "cpu",
    plot: _FrontPlot = None,
    as_json: _AsJson = False,
) -> int:
    """Which bits each layer's keys and values need on a model: a profile for its pages.

    Measures what every section alone costs the predictions, divides bits among sections, and
    measures the result on other windows beside uniform bits and KVTuner's 2, 4 and 8. Interrupted,
    it goes on where it was. A spec names a point of the profile as profile:FILE@BITS.
    """
    try:
        from kvcodec.eval.memory import keep_memory
        from kvcodec.eval.tuning import Tuning, run_tuning
        from kvcodec.eval.tuning_report import draw_front, show_tuning
    except ImportError as error:
        raise ConfigError(
            f"kvcodec tune needs what pip install 'kvcodec[eval]' brings: {error}"
        ) from error
    tuning = Tuning(
        model=model,
        texts=tuple(text),
        output=output,
        bits=_numbers("--bits", bits),
        windows=windows,
        held_out=held_out,
        seed=seed,
        ladder=ladder,
        mode=mode,
        context=context,
        score=score,
        page_size=page_size,
        sink_tokens=sink_tokens,
        imprint=imprint,
        compute=compute,
        cache=cache,
        device=device,
    )
    keep_memory()
    document = run_tuning(tuning)
    if plot is not None:
        draw_front(document, plot)
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    else:
        show_tuning(document)
    return 0


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{name} is {text!r}, wanted are numbers such as 2.5,3,4") from error
