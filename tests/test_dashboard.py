"""docker/grafana: the dashboard, by Grafana's own types and by Prometheus's own parser."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from test_deployment import DOCKER, TOOLS, Tree, run, tool

DASHBOARD = DOCKER / "grafana" / "kvcodec.json"


def dashboard_check(file: Path) -> subprocess.CompletedProcess[str]:
    """By Grafana's own types; it asks for Python 3.11."""
    python = TOOLS / "python"
    probe = [str(python), "-c", "import grafana_foundation_sdk"]
    if not python.exists() or subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("no grafana-foundation-sdk: tools/install_stores.sh installs it")
    command = [str(python), str(DOCKER / "grafana" / "check.py"), str(file)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_dashboard_holds_what_grafana_knows():
    done = dashboard_check(DASHBOARD)
    assert done.returncode == 0, done.stderr


def test_name_that_grafana_does_not_know_is_found(tmp_path: Path):
    file = tmp_path / "dashboard.json"
    file.write_text(DASHBOARD.read_text().replace('"showLegend"', '"showLegnd"', 1))
    done = dashboard_check(file)
    assert done.returncode == 1
    assert ".options.legend.showLegnd is not known" in done.stderr


def queries(dashboard: Tree) -> list[str]:
    """What a dashboard asks Prometheus, with what Grafana puts in for its variables."""
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return [query.replace("$__rate_interval", "1m").replace("$instance", ".+") for query in asked]


def test_queries_of_the_dashboard_are_promql(tmp_path: Path):
    asked = queries(json.loads(DASHBOARD.read_text()))
    rules = [{"record": f"q{number}", "expr": query} for number, query in enumerate(asked)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(asked)} rules found" in run(tool("promtool"), "check", "rules", file)


def test_panels_of_the_dashboard_do_not_overlap():
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    cells = [
        (x, y)
        for at in places
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
