"""Break real stores in the middle of hundreds of batches, and count what comes of it.

    make fault-runs

Every call of a page store meets the fault at a random moment. To reach: no wrong page, no
exception, and no call that ends more than 50 ms after its deadline. Needs what `make stores`
installs; mounting needs root.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import fault_scenarios


def main() -> None:
    """Run all scenarios, print a table, write JSON; exit code 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--only", default="", help="a part of the name of a scenario")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [name for name in fault_scenarios.SCENARIOS if options.only in name]
    rows: list[dict[str, object]] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("scenarios", total=len(names))
        for number, name in enumerate(names):
            progress.update(task, description=name)
            with tempfile.TemporaryDirectory(prefix="faults-") as directory:
                scenario = fault_scenarios.SCENARIOS[name](Path(directory))
                with scenario as running:
                    outcome = fault_scenarios.run(running, options.calls, seed=number)
            late = sorted(outcome.late_seconds)
            rows.append(
                {
                    "scenario": name,
                    "calls": outcome.calls,
                    "pages_yes": outcome.hits,
                    "pages_no": outcome.misses,
                    "wrong_pages": outcome.wrong_pages,
                    "exceptions": outcome.exceptions,
                    "latest_seconds_after_deadline": outcome.latest,
                    "p99_seconds_after_deadline": late[int(0.99 * (len(late) - 1))],
                    "recovered": outcome.recovered,
                }
            )
            progress.advance(task)
    table = Table(
        *("fault in every call", "calls", "pages: yes", "no", "wrong", "exceptions"),
        *("latest end after deadline", "recovers"),
    )
    for row in rows:
        latest = 1000 * float(str(row["latest_seconds_after_deadline"]))
        table.add_row(
            *(str(row[key]) for key in ("scenario", "calls", "pages_yes", "pages_no")),
            *(str(row["wrong_pages"]), str(row["exceptions"])),
            *(f"{latest:.0f} ms", "yes" if row["recovered"] else "no"),
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    broken = [row for row in rows if row["wrong_pages"] or row["exceptions"]]
    sys.exit(1 if broken or not all(row["recovered"] for row in rows) else 0)


if __name__ == "__main__":
    main()
