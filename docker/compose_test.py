"""Starts compose.yaml as it is meant to be started, and looks whether its parts find each other.

    python3 docker/compose_test.py --compose 'docker compose' [--file OVERRIDE] SERVICE...

The engine is not started, it needs a GPU: containers of the sidecar's own image are clients in its
place, without a network and with the same volume. Pages go through the sidecar into the store;
Prometheus reads the sidecar, its rules and what the panels of the dashboard ask are tried on it;
Grafana is asked for the dashboard.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__: list[str] = []

HERE = Path(__file__).resolve().parent
PROJECT = "kvcodec-test"
PROMETHEUS, GRAFANA = "http://127.0.0.1:9090", "http://127.0.0.1:3000"
PAGE_COUNT = 32  # of container_client.py
#: Two scrapes, and one round of the rules.
SETTLE_SECONDS = 90.0


class Composition:
    """What `docker compose` makes of a file and of what is laid over it."""

    def __init__(self, compose: list[str], files: list[Path]) -> None:
        self._command = [*compose, "--project-name", PROJECT]
        for file in files:
            self._command += ["--file", str(file)]

    def call(self, *words: str) -> str:
        """One command; what it printed."""
        done = subprocess.run(  # noqa: S603 - words of this file
            [*self._command, *words], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def states(self) -> dict[str, str]:
        """Health, or state where there is no health check, by service."""
        lines = self.call("ps", "--all", "--format", "json").splitlines()
        found = [row for line in lines for row in _rows(line)]
        return {row["Service"]: row.get("Health") or row["State"] for row in found}


def say(line: str) -> None:
    """A line of the report, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _rows(line: str) -> list[dict[str, str]]:
    """Releases differ: one list, or an object per line."""
    found = json.loads(line)
    return found if isinstance(found, list) else [found]


def asked(url: str, **query: str) -> Any:  # noqa: ANN401 - JSON
    """What a URL answers."""
    full = f"{url}?{urllib.parse.urlencode(query)}" if query else url
    with urllib.request.urlopen(full, timeout=10) as answer:  # noqa: S310 - constants above
        return json.load(answer)


def samples(query: str) -> list[float]:
    """Values of all series that a query finds."""
    found = asked(f"{PROMETHEUS}/api/v1/query", query=query)["data"]["result"]
    return [float(series["value"][1]) for series in found]


def until(what: str, condition: Callable[[], object], seconds: float = SETTLE_SECONDS) -> None:
    """Wait until it holds; ends with what did not."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except (OSError, KeyError, ValueError):  # not up yet
            pass
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {seconds:g} s: {what}")
        time.sleep(1.0)


def passed_pages(task: str) -> str:
    """What a client in a container of its own says about writing or reading pages."""
    command = ["docker", "run", "--rm", "--interactive", "--network=none", "--read-only"]
    command += ["--volume", f"{PROJECT}_run:/run/kvcodec:ro", "--entrypoint", "python3", "kvcodec"]
    command += ["-", task, "sidecar+unix:///run/kvcodec/kvcodec.sock"]
    done = subprocess.run(  # noqa: S603 - words of this file
        command,
        input=(HERE / "container_client.py").read_text(),
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{task}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def check_prometheus() -> str:
    """It reads the sidecar, knows its rules, and answers what the dashboard asks."""
    until("Prometheus reads the sidecar", lambda: samples('up{job="kvcodec"}') == [1.0])
    count = 'sum(kvcodec_pages_total{op="put",result="ok"})'
    until("the pages are counted", lambda: samples(count) >= [float(PAGE_COUNT)])
    until("the store is well", lambda: samples("kvcodec_store_up") == [1.0])
    until("rates are there", lambda: samples("instance:kvcodec_calls:rate5m"))
    groups = asked(f"{PROMETHEUS}/api/v1/rules")["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    broken = [rule["name"] for rule in rules if rule["health"] != "ok"]
    if broken or not rules:
        raise SystemExit(f"of {len(rules)} rules these are broken: {broken}")
    panels = json.loads((HERE / "grafana" / "kvcodec.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    answered = [
        samples(query.replace("$__rate_interval", "1m").replace("$instance", ".+"))
        for query in queries
    ]
    return (
        f"{len(rules)} rules, {len(queries)} queries of the dashboard, "
        f"{sum(map(bool, answered))} with data"
    )


def check_grafana() -> str:
    """It has the dashboard, and a way to Prometheus."""
    url = f"{GRAFANA}/api/dashboards/uid/kvcodec-sidecar"
    until("Grafana has the dashboard", lambda: asked(url)["dashboard"]["panels"])
    return f"{len(asked(url)['dashboard']['panels'])} panels"


def main() -> None:
    """Everything is removed in the end, whatever came before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compose", default="docker compose")
    parser.add_argument("--file", action="append", type=Path, default=[])
    parser.add_argument("services", nargs="+")
    options = parser.parse_args()
    composition = Composition(options.compose.split(), [HERE / "compose.yaml", *options.file])
    composition.call("--profile", "engine", "config", "--quiet")
    started = time.monotonic()
    try:
        composition.call("up", "--detach", "--no-build", *options.services)
        wanted = dict.fromkeys(options.services, "running")
        wanted |= {"sidecar": "healthy", "store": "healthy"}
        until(f"{wanted}", lambda: composition.states() == wanted)
        seconds = time.monotonic() - started
        say(f"{len(wanted)} services are up after {seconds:.1f} s")
        say(f"written: {passed_pages('write')}; read: {passed_pages('read')}")
        held = composition.call("exec", "--no-TTY", "store", "redis-cli", "dbsize").split()[-1]
        if int(held) < PAGE_COUNT:
            raise SystemExit(f"the store holds {held} objects")
        say(f"Prometheus: {check_prometheus()}")
        if "grafana" in options.services:
            say(f"Grafana: {check_grafana()}")
        if composition.states() != wanted:
            raise SystemExit(f"in the end: {composition.states()}")
    except BaseException:
        say(composition.call("logs", "--tail", "30"))
        raise
    finally:
        composition.call("--profile", "engine", "down", "--volumes", "--timeout", "40")


if __name__ == "__main__":
    main()
