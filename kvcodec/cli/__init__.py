"""The ``kvcodec`` command, for people who look at pages and stores from a shell.

``kvcodec inspect`` is meant for loops over thousands of pages, so the way to it imports neither
typer nor rich. Exit codes: `kvcodec.cli.output.ExitCode`.
"""

from __future__ import annotations

import os
import sys

from kvcodec.cli.output import ExitCode, escaped, exit_code_of, write_json, write_line
from kvcodec.errors import KVCodecError

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; an error is one line on stderr.

    With ``--json`` an error is also the one document on stdout.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except KVCodecError as error:
        return _failed(words, type(error).__name__, str(error), exit_code_of(error))
    except KeyboardInterrupt:
        return _failed(words, "Interrupted", "interrupted", ExitCode.INTERRUPTED)
    except MemoryError:
        return _failed(words, "MemoryError", "not enough memory for this", ExitCode.FAILED)
    except BrokenPipeError:
        # Whoever read the output has seen enough. Python flushes stdout once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except OSError as error:
        return _failed(words, type(error).__name__, str(error), ExitCode.FAILED)


def _run(words: list[str]) -> int:
    from kvcodec.cli.quick import inspect_arguments

    arguments = inspect_arguments(words)
    if arguments is not None:
        from kvcodec.cli.inspection_text import run_inspect

        return run_inspect(**arguments)
    from kvcodec.cli.app import run

    return run(words)


def _failed(words: list[str], kind: str, message: str, code: ExitCode) -> ExitCode:
    if "--json" in words:
        write_json({"error": {"kind": kind, "message": message, "exit_code": int(code)}})
    write_line(sys.stderr, f"kvcodec: {escaped(message)}")
    return code
