"""The arguments of ``kvcodec inspect`` without typer, which takes longer than the command."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

__all__ = ["InspectArguments", "inspect_arguments"]


class InspectArguments(TypedDict):
    """What `kvcodec.cli.app.inspect` takes."""

    page: str
    key: str | None
    layers: bool
    namespace: str
    timeout: float
    as_json: bool


def inspect_arguments(words: Sequence[str]) -> InspectArguments | None:
    """The arguments of a plain command line for `inspect`, None for anything else.

    None leaves the words to typer, which is the authority: it knows help, abbreviations and what to
    say about mistakes. Whatever is answered here equals what typer would have made of it.
    """
    if not words or words[0] != "inspect":
        return None
    flags, values, places = {"--layers": False, "--json": False}, {"--namespace": ""}, []
    timeout = 10.0
    rest = iter(words[1:])
    for word in rest:
        name, equals, value = word.partition("=")
        if word in flags:
            flags[word] = True
        elif name in ("--namespace", "--timeout"):
            if not equals:
                value = next(rest, "-")
            if value.startswith("-"):
                return None
            if name == "--namespace":
                values[name] = value
                continue
            try:
                timeout = float(value)
            except ValueError:
                return None
            if not math.isfinite(timeout) or not 0.001 <= timeout <= 3600:
                return None
        elif word.startswith("-"):
            return None
        else:
            places.append(word)
    if not 1 <= len(places) <= 2:
        return None
    return InspectArguments(
        page=places[0],
        key=places[1] if len(places) == 2 else None,
        layers=flags["--layers"],
        namespace=values["--namespace"],
        timeout=timeout,
        as_json=flags["--json"],
    )
