"""Whether a dashboard holds what Grafana knows and nothing else, by Grafana's own types.

    python check.py DASHBOARD.json        needs grafana-foundation-sdk

What Grafana does not know it ignores without a word. Here it is read into those types and written
again: a name that is lost on the way is none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

__all__: list[str] = []


def lost(mine: Any, theirs: Any, path: str) -> Iterator[str]:  # noqa: ANN401 - JSON
    """Where something of mine is not there, or is something else."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for name, value in mine.items():
            if name in theirs:
                yield from lost(value, theirs[name], f"{path}.{name}")
            else:
                yield f"{path}.{name} is not known"
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for index, (one, other) in enumerate(zip(mine, theirs, strict=True)):
            yield from lost(one, other, f"{path}[{index}]")
    elif mine != theirs:
        yield f"{path} is {mine!r}, read as {theirs!r}"


def main() -> None:
    """Ends with 1 and says what is wrong, if anything is."""
    register_default_plugins()
    dashboard = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    sys.exit("\n".join(lost(dashboard, read, "dashboard")) or None)


if __name__ == "__main__":
    main()
