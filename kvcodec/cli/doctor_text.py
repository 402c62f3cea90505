"""``kvcodec doctor``: the checks, line by line as they are made."""

from __future__ import annotations

import sys

from kvcodec.cli.doctor import FAILED, NOTE, OK, WARNING, checks
from kvcodec.cli.output import ExitCode, escaped, paint, write_json, write_line

__all__ = ["run_doctor"]

_COLOURS = {OK: "green", NOTE: "bold", WARNING: "yellow", FAILED: "red"}


def run_doctor(url: str | None, *, timeout: float, as_json: bool) -> ExitCode:
    """Make every check. The arguments are those of `kvcodec.cli.app.doctor`."""
    found = []
    for check in checks(url, timeout):
        found.append(check)
        if not as_json:
            # Padded before it is painted: an escape sequence has a length but no width.
            status = paint(_COLOURS[check.status], f"{check.status:<8}")
            write_line(sys.stdout, f"{status} {check.name:<16} {escaped(check.message)}")
    failed = sum(check.status == FAILED for check in found)
    if as_json:
        write_json({"ok": not failed, "checks": [check.as_json() for check in found]})
    elif failed:
        write_line(sys.stdout, paint("red", f"{failed} of {len(found)} checks failed"))
    return ExitCode.FAILED if failed else ExitCode.OK
