"""What Prometheus reads: names, labels, their number, and that counters only grow."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from contextlib import closing
from itertools import combinations
from pathlib import Path

import grpc
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from real_server import STORES
from sidecar_process import SidecarProcess
from waiting import wait_until

from kvcodec import native
from kvcodec.backend import open_backend
from kvcodec_proto.v1 import service_pb2 as pb
from kvcodec_proto.v1 import service_pb2_grpc as pb_grpc
from kvcodec_server.metrics import CALL_SECONDS, MAX_LABEL_VALUES, Metrics
from kvcodec_server.status import worst_label

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "sidecar.md").read_text()
RULES = ROOT / "docker" / "prometheus" / "kvcodec.rules.yaml"
DASHBOARD = ROOT / "docker" / "grafana" / "kvcodec.json"

OPERATIONS = ("get", "put", "get_stream", "put_stream", "exists", "delete", "stat", "list")
OPERATIONS += ("inspect", "stats")
STORE_CALLS = ("get", "put", "exists", "delete", "stat")
DROPPED = ("thread", "queue", "circuit", "memory")
#: Every set of codecs that a page can have, and none.
CODECS = ["none"] + [
    "+".join(sorted(names))
    for count in range(1, 5)
    for names in combinations(("raw", "int2", "int4", "int8"), count)
]
READING = ("get", "get_stream", "inspect")
GAUGES = (
    "kvcodec_ready",
    "kvcodec_sessions_limit",
    "kvcodec_staging_limit_bytes",
    "kvcodec_store_probe_seconds",
    "kvcodec_store_up",
    "kvcodec_tls_certificate_expiry_timestamp_seconds",
)


class Server:
    """Stands for a PageServer."""

    def __init__(self, counters=(), **stats):
        self.numbers, self.counts = stats, dict(counters)

    def stats(self):
        return self.numbers

    def counters(self):
        return self.counts


def metrics_of(url="file:///x", server=None):
    metrics = Metrics(url, {"version": "1", "isa": "scalar"}, "0123456789ab")
    if server is not None:
        metrics.watch(server)
    return metrics


def series(metrics):
    text = metrics.text("")[0].decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics, name, **labels):
    return series(metrics)[name, tuple(sorted(labels.items()))]


def busy():
    """Metrics of a sidecar in which everything has happened that can."""
    statuses = [pb.Status.Name(number) for number in pb.Status.values()][1:]
    of_stores = [name for name in statuses if "PAGE" not in name and "QUALITY" not in name]
    counters = {
        f"{operation}.{name.removeprefix('STATUS_').lower()}": 1
        for operation, names in (("get", statuses), ("inspect", statuses), ("put", of_stores))
        for name in names
    }
    counters |= {f"{op}.{name}": 1 for op in ("exists", "delete") for name in ("ok", "not_found")}
    counters |= {f"{name}_breaker.opened": 1 for name in ("reads", "writes")}
    counters |= {"io.replaced_threads": 1, "backend.hits": 2, "backend.misses": 1}
    for kind in ("objects", "bytes"):
        counters |= {f"backend.{place}evicted_{kind}": 1 for place in ("", "store.")}
        counters |= {f"backend.store.{why}_{kind}": 1 for why in ("expired", "displaced")}
    counters |= {"backend.store.swept_orphans": 1, "backend.store.scans": 3}
    counters |= {"backend.lost_objects": 1, "removed.corrupt_page": 1}
    counters |= {f"dropped.{op}.{why}": 1 for op in STORE_CALLS for why in DROPPED}
    counters |= {f"header_bytes.{op}": 1 for op in ("get", "put")}
    for codec in CODECS:
        for op in ("encode", "decode"):
            counters |= {f"codec_pages.{op}.{codec}": 1, f"codec_nanoseconds.{op}.{codec}": 5}
    gauges = {
        f"backend.{place}{name}": 1
        for place in ("", "store.")
        for name in ("stored_bytes", "limit_bytes")
    }
    server = Server(counters, calls=1, reads_refused=1, **gauges)
    metrics = metrics_of("tier+ram://?bytes=1", server)
    for name in GAUGES:
        metrics.gauge(name, "A number of the process.", lambda: 1.0)
    metrics.refused("token")
    metrics.refused("name")
    for operation in OPERATIONS:
        for name in statuses if operation in READING else of_stores:
            outcome = worst_label([pb.Outcome(status=pb.Status.Value(name))])
            metrics.observe(operation, outcome, 0.01, 100, 25)
    metrics.observe("get", "timeout", 1.0, 0, 0)
    return metrics


def promtool():
    program = shutil.which("promtool", path=f"{STORES / 'promtool'}:{STORES}") or shutil.which(
        "promtool"
    )
    if program is None:
        pytest.skip("promtool is not installed; `make stores` does it where it can")
    return program


def own_names(metrics):
    return {name for name, _ in series(metrics) if name.startswith("kvcodec_")}


class TestCalls:
    def test_a_call_is_counted_timed_and_weighed(self):
        metrics = metrics_of()
        metrics.observe("get", "ok", 0.002, 100, 25)
        metrics.observe("get", "timeout", 0.7, 0, 0)
        assert value(metrics, "kvcodec_calls_total", op="get", outcome="ok") == 1
        assert value(metrics, "kvcodec_calls_total", op="get", outcome="timeout") == 1
        assert value(metrics, "kvcodec_deadline_exceeded_total", op="get") == 1
        assert value(metrics, "kvcodec_bytes_total", op="get", kind="logical") == 100
        assert value(metrics, "kvcodec_bytes_total", op="get", kind="stored") == 25
        assert value(metrics, "kvcodec_op_seconds_count", op="get", backend="file") == 2
        assert value(metrics, "kvcodec_op_seconds_sum", op="get", backend="file") == 0.702
        for bound, count in ((0.001, 0), (0.0025, 1), (0.5, 1), (1.0, 2)):
            labels = {"op": "get", "backend": "file", "le": str(bound)}
            assert value(metrics, "kvcodec_op_seconds_bucket", **labels) == count
        assert (CALL_SECONDS[0], CALL_SECONDS[-1]) == (0.0005, 10.0)

    def test_codec_ratio_is_of_pages_encoded_here(self):
        metrics = metrics_of()
        metrics.observe("put", "ok", 0.01, 100, 25)
        metrics.observe("put", "ok", 0.01, 0, 1000)  # came encoded
        metrics.observe("get", "ok", 0.01, 1000, 0)  # went out decoded
        assert value(metrics, "kvcodec_codec_bytes_total", kind="raw") == 100
        assert value(metrics, "kvcodec_codec_bytes_total", kind="encoded") == 25

    def test_refusals_are_counted_by_reason(self):
        metrics = metrics_of()
        metrics.refused("token")
        assert value(metrics, "kvcodec_refused_calls_total", reason="token") == 1


class TestNumbersOfOthers:
    def test_pages_by_operation_and_result(self):
        metrics = metrics_of(
            server=Server({"get.ok": 3, "get.corrupt_page": 1, "inspect.corrupt_page": 2})
        )
        assert value(metrics, "kvcodec_pages_total", op="get", result="ok") == 3
        assert value(metrics, "kvcodec_page_reject_total", reason="corrupt_page") == 3

    def test_circuits(self):
        server = Server({"reads_breaker.opened": 2, "reads_breaker.probe_failed": 5})
        server.numbers = {"reads_refused": 1, "writes_refused": 0}
        metrics = metrics_of(server=server)
        assert value(metrics, "kvcodec_circuit_state", circuit="reads") == 1
        assert value(metrics, "kvcodec_circuit_state", circuit="writes") == 0
        changes = {"circuit": "reads", "change": "opened"}
        assert value(metrics, "kvcodec_circuit_changes_total", **changes) == 2

    def test_memory_and_store_behind_it_are_told_apart(self):
        counters = {
            "backend.hits": 7,
            "backend.misses": 3,
            "backend.evicted_objects": 5,
            "backend.store.evicted_objects": 2,
            "backend.store.scans": 1,
        }
        metrics = metrics_of("tier+ram://?bytes=1&store=file:///x", Server(counters))
        assert value(metrics, "kvcodec_tier_lookups_total", result="hit") == 7
        assert value(metrics, "kvcodec_tier_lookups_total", result="miss") == 3
        for place, count in (("ram", 5), ("store", 2)):
            labels = {"place": place, "reason": "limit"}
            assert value(metrics, "kvcodec_evicted_pages_total", **labels) == count
        assert value(metrics, "kvcodec_store_events_total", place="store", event="scans") == 1

    def test_store_alone(self):
        counters = {"backend.evicted_bytes": 5, "backend.swept_orphans": 2, "backend.hits": 1}
        metrics = metrics_of(server=Server(counters))
        labels = {"place": "store", "reason": "limit"}
        assert value(metrics, "kvcodec_evicted_bytes_total", **labels) == 5
        assert value(metrics, "kvcodec_tmp_orphans_swept_total", place="store") == 2
        assert value(metrics, "kvcodec_store_events_total", place="store", event="hits") == 1

    def test_evictions_say_why(self):
        counters = {"evicted_objects": 1, "expired_objects": 2, "displaced_objects": 3}
        counters |= {"evicted_bytes": 10, "expired_bytes": 20, "displaced_bytes": 30}
        server = Server({f"backend.{name}": count for name, count in counters.items()})
        metrics = metrics_of(server=server)
        for reason, count in (("limit", 1), ("age", 2), ("disk_full", 3)):
            labels = {"place": "store", "reason": reason}
            assert value(metrics, "kvcodec_evicted_pages_total", **labels) == count
            assert value(metrics, "kvcodec_evicted_bytes_total", **labels) == 10 * count

    def test_bytes_of_the_store_and_of_memory_in_front_of_it(self):
        numbers = {"backend.stored_bytes": 7, "backend.limit_bytes": 9}
        metrics = metrics_of(server=Server(**numbers))
        assert value(metrics, "kvcodec_store_bytes", place="store") == 7
        assert value(metrics, "kvcodec_store_limit_bytes", place="store") == 9
        numbers |= {"backend.store.stored_bytes": 70}
        metrics = metrics_of("tier+ram://?bytes=1", Server(**numbers))
        assert value(metrics, "kvcodec_store_bytes", place="ram") == 7
        assert value(metrics, "kvcodec_store_bytes", place="store") == 70
        found = [labels for name, labels in series(metrics) if name == "kvcodec_store_limit_bytes"]
        assert found == [(("place", "ram"),)]

    def test_pages_that_memory_lost_were_dropped(self):
        server = Server({"backend.lost_objects": 3})
        metrics = metrics_of("tier+ram://?bytes=1", server)
        labels = {"op": "put", "reason": "write_back"}
        assert value(metrics, "kvcodec_dropped_pages_total", **labels) == 3

    def test_gauges_without_a_number_are_left_out(self):
        metrics = metrics_of()
        metrics.gauge("kvcodec_store_up", "Whether.", lambda: None)
        assert "kvcodec_store_up" not in own_names(metrics)

    def test_reload_is_told(self):
        metrics = metrics_of()
        assert value(metrics, "kvcodec_config_last_reload_successful") == 1
        metrics.reloaded(None)
        assert value(metrics, "kvcodec_config_last_reload_successful") == 0
        assert value(metrics, "kvcodec_config_info", digest="0123456789ab") == 1
        metrics.reloaded("ba9876543210")
        assert value(metrics, "kvcodec_config_last_reload_successful") == 1
        assert value(metrics, "kvcodec_config_info", digest="ba9876543210") == 1


class TestNumbersOfNow:
    def test_each_is_that_of_the_server(self):
        stats = {"calls": 1, "streams": 2, "sessions": 3, "region_bytes": 4, "staging_bytes": 5}
        metrics = metrics_of(server=Server(**stats, draining=1))
        names = ["calls_in_progress", "streams_in_progress", "sessions", "region_bytes"]
        names += ["staging_bytes", "draining"]
        found = [value(metrics, f"kvcodec_{name}") for name in names]
        assert found == [1, 2, 3, 4, 5, 1]

    def test_reload_has_its_time(self):
        metrics = metrics_of()
        accepted = "kvcodec_config_last_reload_success_timestamp_seconds"
        first = value(metrics, accepted)
        assert abs(first - time.time()) < 5
        metrics.reloaded(None)
        assert value(metrics, accepted) == first
        metrics.reloaded("0")
        assert value(metrics, accepted) > first

    def test_client_and_reader_of_a_real_sidecar_are_seen(self, tmp_path):
        settings = {
            "limits.max_sessions": "7",
            "limits.staging_bytes": "80MiB",
            "store.url": f"file://{tmp_path}/store",  # pages in memory take no other
        }
        with SidecarProcess(tmp_path, settings) as sidecar:
            assert sidecar.metric("kvcodec_ready") == 1
            assert (
                f'kvcodec_build_info{{isa="{native.isa()}",version="' in sidecar.get("/metrics")[1]
            )
            assert sidecar.metric("kvcodec_sessions_limit") == 7
            assert sidecar.metric("kvcodec_staging_limit_bytes") == 80 << 20
            for name in ("sessions", "region_bytes", "staging_bytes", "streams_in_progress"):
                assert sidecar.metric(f"kvcodec_{name}") == 0
            page = memoryview(bytes(8 << 20))
            names = [f"{'a' * 32}/{number:064x}" for number in range(8)]
            with closing(open_backend(f"sidecar+unix://{sidecar.socket}")) as client:
                assert client.put(names, [page] * 8, timeout_seconds=20) == [None] * 8
                assert sidecar.metric("kvcodec_sessions") == 1
                assert sidecar.metric("kvcodec_region_bytes") >= 8 << 20
            wait_until(lambda: sidecar.metric("kvcodec_sessions") == 0)
            rooms = [pb.ObjectRoom(name=name, capacity=8 << 20) for name in names]
            with grpc.insecure_channel(sidecar.target) as channel:
                request = pb.GetStreamRequest(objects=rooms)
                answers = pb_grpc.PageServiceStub(channel).GetStream(request, timeout=30)
                next(answers)
                wait_until(lambda: sidecar.metric("kvcodec_streams_in_progress") == 1)
                assert sidecar.metric("kvcodec_calls_in_progress") == 1
                assert 8 << 20 <= sidecar.metric("kvcodec_staging_bytes") <= 80 << 20
                answers.cancel()
            wait_until(lambda: sidecar.metric("kvcodec_streams_in_progress") == 0)


class TestBounds:
    def test_everything_at_once_is_at_most_500_series(self):
        assert len(series(busy())) <= 500

    def test_new_label_values_become_other(self):
        metrics = metrics_of()
        for number in range(10 * MAX_LABEL_VALUES):
            metrics.observe("get", f"outcome-{number}", 0.001, 0, 0)
        outcomes = [labels for name, labels in series(metrics) if name == "kvcodec_calls_total"]
        assert len(outcomes) == MAX_LABEL_VALUES + 1
        other = value(metrics, "kvcodec_calls_total", op="get", outcome="other")
        assert other == 9 * MAX_LABEL_VALUES

    def test_new_counters_become_other(self):
        counters = {f"backend.event-{number}": 1 for number in range(1000)}
        metrics = metrics_of(server=Server(counters))
        found = [labels for name, labels in series(metrics) if name == "kvcodec_store_events_total"]
        assert len(found) == MAX_LABEL_VALUES + 1
        labels = {"place": "store", "event": "other"}
        assert value(metrics, "kvcodec_store_events_total", **labels) == 1000 - MAX_LABEL_VALUES

    def test_counters_only_grow(self):
        metrics = busy()
        before = series(metrics)
        metrics.observe("get", "ok", 0.01, 1, 1)
        metrics._pulled.server.counts["get.ok"] += 1
        after = series(metrics)
        for (name, labels), count in before.items():
            if name.endswith(("_total", "_count", "_bucket", "_sum")):
                assert after[name, labels] >= count


class TestPresentation:
    def test_what_exists_is_documented_and_the_other_way_round(self):
        documented = {
            cells[0].strip("` "): set(re.findall(r"`(\w+)`", cells[1]))
            for line in DOCUMENT.splitlines()
            if line.startswith("| `kvcodec_") and (cells := line.strip("|").split("|"))
        }
        found: dict[str, set[str]] = {}
        for name, labels in series(busy()):
            if name.startswith("kvcodec_"):
                base = re.sub("_(bucket|count|sum)$", "", name) if "_seconds_" in name else name
                found.setdefault(base, set()).update(key for key, _ in labels if key != "le")
        assert found == documented

    def test_both_formats(self):
        metrics = busy()
        text, content_type = metrics.text("")
        assert content_type.startswith("text/plain")
        assert text.endswith(b"\n")
        text, content_type = metrics.text("application/openmetrics-text; version=1.0.0")
        assert content_type.startswith("application/openmetrics-text")
        assert text.endswith(b"# EOF\n")

    def test_promtool_finds_no_fault(self):
        run = subprocess.run(
            [promtool(), "check", "metrics"],
            input=busy().text("")[0],
            check=False,
            capture_output=True,
        )
        assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")

    def test_promtool_finds_no_fault_in_a_real_sidecar(self, tmp_path):
        program = promtool()
        with SidecarProcess(tmp_path, {"store.ram_bytes": "1MiB"}) as sidecar:
            wait_until(lambda: sidecar.metric("kvcodec_store_up"))
            text = sidecar.get("/metrics")[1]
            found = own_names(metrics_of(server=Server())) | set(GAUGES[:-1])
            assert found <= set(re.findall(r"^kvcodec_\w+", text, re.MULTILINE))
        run = subprocess.run(
            [program, "check", "metrics"], input=text.encode(), check=False, capture_output=True
        )
        assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


class TestRules:
    def expressions(self):
        rules = [
            rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
        ]
        return {rule.get("record") or rule["alert"]: rule["expr"] for rule in rules}

    def test_rules_and_dashboard_name_only_what_exists(self):
        """A metric that is renamed takes its alerts and panels with it."""
        exists = {name for name, _ in series(busy())}
        recorded = {name for name in self.expressions() if ":" in name}
        dashboard = json.loads(DASHBOARD.read_text())
        panels = [
            target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])
        ]
        assert panels
        for expression in (*self.expressions().values(), *panels):
            names = set(re.findall(r"[a-z]*:?kvcodec_[a-z0-9_:]+|\bprocess_[a-z_]+", expression))
            assert names <= exists | recorded, expression
            assert names or expression == 'up{job="kvcodec"} == 0'

    def test_every_alert_says_what_to_do(self):
        for group in yaml.safe_load(RULES.read_text())["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
                    assert rule["annotations"]["summary"] and rule["annotations"]["description"]

    def test_promtool_checks_and_tests_the_rules(self):
        for words in (
            ("check", "rules", str(RULES)),
            ("test", "rules", str(RULES.with_name("kvcodec.rules.test.yaml"))),
        ):
            run = subprocess.run([promtool(), *words], check=False, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout + run.stderr

    def test_every_alert_is_tested_both_ways(self):
        """Each fires in one of promtool's tests and stays silent in another."""
        tests = yaml.safe_load(RULES.with_name("kvcodec.rules.test.yaml").read_text())["tests"]
        seen = {
            (case["alertname"], bool(case.get("exp_alerts")))
            for test in tests
            for case in test.get("alert_rule_test", [])
        }
        alerts = {name for name in self.expressions() if ":" not in name}
        assert seen == {(name, fires) for name in alerts for fires in (True, False)}
