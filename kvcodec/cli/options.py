"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["AsJson", "OneNamespace", "StoreURL", "Timeout"]

AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON document to stdout.")]
OneNamespace = Annotated[
    str, typer.Option("--namespace", metavar="DIGEST", help="Only this namespace: 32 hex digits.")
]
StoreURL = Annotated[str, typer.Argument(metavar="URL", help="The URL of a store.")]
Timeout = Annotated[
    float, typer.Option("--timeout", min=0.001, max=3600, help="Seconds a store call may take.")
]
