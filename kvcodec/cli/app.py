"""The commands and their options. Each imports what it needs when it runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvcodec.cli.extensions import add_commands
from kvcodec.cli.options import AsJson, OneNamespace, StoreURL, Timeout
from kvcodec.cli.output import ExitCode, write_line
from kvcodec.cli.store_commands import STORE_COMMANDS
from kvcodec.errors import ConfigError

#: The encodings whose speed is worth knowing.
DEFAULT_CODECS = (
    "raw,int8-g128,int8-g64,int4-g64,int4-asym-g64,int2-asym-g64,int4-channel-asym,kv4-channel,"
    "fp8,kv4-derotated,kv4-hadamard,lossless-fast,lossless,ecq-4,ecq-3,ecq-2.5"
)

__all__ = [
    "DEFAULT_CODECS",
    "app",
    "bench",
    "bench_codec",
    "doctor",
    "inspect",
    "root",
    "run",
    "verify",
]

app = typer.Typer(
    name="kvcodec",
    help="Look at stored KV-cache pages, look after whole stores, and measure the codec.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

bench = typer.Typer(help="Measure this machine.", no_args_is_help=False)
app.add_typer(bench, name="bench")

for _command in STORE_COMMANDS:
    app.command(rich_help_panel="Stores")(_command)

#: typer's root of errors about arguments; some of its versions bring their own copy of click.
_ArgumentError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            write_line(sys.stdout, f"kvcodec {version('kvcodec')}")
        except PackageNotFoundError as error:
            raise ConfigError("kvcodec is not installed, so it has no version") from error
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Look at stored KV-cache pages, look after whole stores, and measure the codec."""
    if context.invoked_subcommand is None and not version:
        help_text = context.get_help()  # with rich, typer prints it and returns nothing
        if help_text.strip():
            write_line(sys.stdout, help_text)
        raise typer.Exit(ExitCode.USAGE)


@app.command()
def inspect(
    page: Annotated[str, typer.Argument(metavar="PAGE", help="A file, or the URL of a store.")],
    key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="With a URL: an object name or an engine's key."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="One line per layer.")] = False,
    namespace: OneNamespace = "",
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> int:
    """Show what a stored page says about itself, and whether it is sound.

    Exit code 2 if the page is damaged, 3 if its version is unknown.
    """
    from kvcodec.cli.inspection_text import run_inspect

    return run_inspect(page, key, layers, namespace, timeout, as_json)


@app.command(rich_help_panel="Stores")
def verify(
    url: StoreURL,
    namespace: OneNamespace = "",
    threads: Annotated[
        int, typer.Option("--threads", min=1, max=64, help="How many pages to read at a time.")
    ] = 4,
    timeout: Timeout = 10.0,
    delete_bad: Annotated[
        bool,
        typer.Option("--delete-bad", help="Delete damaged pages; never unsupported ones."),
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Read every page of a store and check every byte of it.

    Exit code 2 if a page is damaged or lies under a wrong name, 4 if some could not be read, 3 if
    some are of an unknown version.
    """
    from kvcodec.cli.verification_text import run_verify

    return run_verify(
        url,
        namespace=namespace,
        threads=threads,
        timeout=timeout,
        delete_bad=delete_bad,
        as_json=as_json,
    )


@app.command()
def doctor(
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help="A store to write a page to and read back.")
    ] = None,
    timeout: Timeout = 10.0,
    as_json: AsJson = False,
) -> int:
    """Check that the installation works, and that a store does.

    Exit code 4 if something that must work does not.
    """
    from kvcodec.cli.doctor_text import run_doctor

    return run_doctor(url, timeout=timeout, as_json=as_json)


@bench.command("codec")
def bench_codec(
    codecs: Annotated[
        str, typer.Option("--codecs", help="Codecs, specs or presets, separated by commas.")
    ] = DEFAULT_CODECS,
    isas: Annotated[
        str, typer.Option("--isas", help="Instruction sets; all that this machine has if empty.")
    ] = "",
    threads: Annotated[
        str, typer.Option("--threads", help="Numbers of threads; 1 and 2 if empty.")
    ] = "",
    layouts: Annotated[
        str, typer.Option("--layouts", help="Memory layouts: canonical, page_first, layer_first.")
    ] = "page_first",
    geometry: Annotated[
        str, typer.Option("--geometry", help="Whose pages: qwen2.5-7b or llama3.1-8b.")
    ] = "qwen2.5-7b",
    page_tokens: Annotated[
        int, typer.Option("--page-tokens", min=1, max=4096, help="Tokens of a page.")
    ] = 64,
    working_set_mb: Annotated[
        int,
        typer.Option(
            "--working-set-mb", min=0, help="MiB of raw pages; 0: twice the cache, at least 512."
        ),
    ] = 0,
    rounds: Annotated[
        int, typer.Option("--rounds", min=0, max=10_000, help="Samples per figure; 0: 24.")
    ] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="5 rounds of 64 MiB: shows that it works, no more.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Encode and decode against memcpy, and against a stream of the same traffic.

    Ratios are comparable between machines and runs; GB/s are not.
    """
    from kvcodec.cli.bench_text import BenchOptions, run_bench

    options = BenchOptions(
        codecs=codecs,
        isas=isas,
        threads=threads,
        layouts=layouts,
        geometry=geometry,
        page_tokens=page_tokens,
        working_set_mb=working_set_mb,
        rounds=rounds,
        quick=quick,
    )
    return run_bench(options, as_json=as_json)


add_commands(app)


def run(words: list[str]) -> int:
    """Run a command line. Raises `ConfigError` for arguments that typer refuses."""
    try:
        code = int(app(words, prog_name="kvcodec", standalone_mode=False) or 0)
    except _ArgumentError as error:
        message = error.format_message()  # type: ignore[attr-defined]
        raise ConfigError(f"{message.rstrip('.')}. See: kvcodec --help") from error
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    if code == ExitCode.INTERRUPTED:
        # What some versions of typer make of an interrupt; no command answers so itself.
        raise KeyboardInterrupt
    return code
