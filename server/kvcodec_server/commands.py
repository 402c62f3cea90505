"""``kvcodec serve``, ``kvcodec config show`` and ``kvcodec health``.

Found by the command line through the entry-point group ``kvcodec.commands``. Nothing heavy is
imported before a command runs, and where the extra ``sidecar`` is missing the command says so.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kvcodec.errors import BackendError, ConfigError

if TYPE_CHECKING:
    from kvcodec_server.config import Configuration

__all__ = ["config", "config_show", "health", "register", "serve"]

_FAILED = 4

#: Settings are flags of any section; typer leaves them alone.
_OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}

_File = Annotated[
    str, typer.Option("--config", metavar="FILE", help="YAML, TOML or JSON; or KVCODEC__CONFIG.")
]

_AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]

config = typer.Typer(help="Look at the sidecar's settings.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("serve", context_settings=_OPEN, rich_help_panel="Sidecar")(serve)
    app.command("health", rich_help_panel="Sidecar")(health)
    app.add_typer(config, name="config", rich_help_panel="Sidecar")


def serve(context: typer.Context, file: _File = "") -> int:
    """Serve pages to the engines of this node, and to others over TCP.

    Every setting of `kvcodec config show` is also a flag, as in --store.url file:///pages, and an
    environment variable, as in KVCODEC__STORE__URL. Exit code 4 if calls were cut off at the end.
    """
    # Lines that gRPC's core writes past our log: one for each broken handshake, for instance.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    words = list(context.args)
    configuration = _configuration(words, file)
    try:
        from kvcodec_server.app import serve as run
    except ImportError as error:
        raise _missing(error) from error
    ended = run(configuration, lambda: _configuration(words, file))
    # Threads that hang in a dead store would hang Python's own way out as well.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if ended else _FAILED)


@config.command("show", context_settings=_OPEN)
def config_show(
    context: typer.Context,
    file: _File = "",
    origin: Annotated[
        bool, typer.Option("--origin", help="Also where each value is from.")
    ] = False,
    as_json: _AsJson = False,
) -> int:
    """Show every setting as `serve` would take it, secrets starred."""
    rows = list(_configuration(list(context.args), file).rows())
    if as_json:
        document = {
            name: {"value": value, "origin": where} if origin else value
            for name, value, where in rows
        }
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return 0
    cells = [(name, _text(value), where if origin else "") for name, value, where in rows]
    widths = [max(len(row[column]) for row in cells) for column in (0, 1)]
    for name, text, where in cells:
        sys.stdout.write(f"{name:{widths[0]}}  {text:{widths[1]}}  {where}".rstrip() + "\n")
    return 0


def health(
    target: Annotated[
        str, typer.Argument(metavar="[TARGET]", help="unix:PATH or HOST:PORT, without TLS.")
    ] = "unix:/run/kvcodec/kvcodec.sock",
    timeout: Annotated[
        float, typer.Option("--timeout", min=0.001, max=3600, help="Seconds to wait.")
    ] = 2.0,
    as_json: _AsJson = False,
) -> int:
    """Ask a sidecar whether it serves.

    Exit code 4 if it does not, or does not answer.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc
    except ImportError as error:
        raise _missing(error) from error
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        try:
            answer = stub.Check(request, timeout=timeout)  # type: ignore[attr-defined]
        except grpc.RpcError as error:
            raise BackendError(f"{target} does not answer: {error.code().name}") from error
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    document = json.dumps({"target": target, "status": name}, indent=2)
    sys.stdout.write(f"{document if as_json else f'{target}: {name}'}\n")
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else _FAILED


def _configuration(words: list[str], file: str) -> Configuration:
    try:
        from kvcodec_server.sources import gathered
    except ImportError as error:
        raise _missing(error) from error
    return gathered(words, os.environ, file or None)


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(f"{error}; pip install 'kvcodec[sidecar]' brings what a sidecar needs")


def _text(value: object) -> str:
    if isinstance(value, list):
        text = ",".join(str(item) for item in value)
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if text.isprintable() else json.dumps(text)
