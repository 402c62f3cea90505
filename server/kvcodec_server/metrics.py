"""What Prometheus reads from a sidecar.

Names have the prefix ``kvcodec_`` and base units. Labels are few: operations, outcomes, names of
counters in the code. No key, token or address is ever one, and what is new beyond a fixed number of
values is counted as ``other``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from kvcodec.workers import Counters

__all__ = ["CALL_SECONDS", "MAX_LABEL_VALUES", "Metrics", "Watched"]

#: Bounds of the buckets of calls: a hit in memory takes less than 1 ms, a deadline is seconds.
CALL_SECONDS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)

#: How many values a label may have before the rest becomes ``other``.
MAX_LABEL_VALUES = 64

_OTHER = "other"
_PAIRS = {"bytes": "bytes", "dropped": "dropped_pages"}
_CODEC_PAGES, _CODEC_NANOSECONDS = "codec_pages.", "codec_nanoseconds."
_BREAKER = "_breaker"

# What stores count under names of their own that has a name of its own here: family, and labels
# after the place, which is the store or the memory in front of it.
_STORE_COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "evicted_objects": ("evicted_pages", ("limit",)),
    "evicted_bytes": ("evicted_bytes", ("limit",)),
    "expired_objects": ("evicted_pages", ("age",)),
    "expired_bytes": ("evicted_bytes", ("age",)),
    "displaced_objects": ("evicted_pages", ("disk_full",)),
    "displaced_bytes": ("evicted_bytes", ("disk_full",)),
    "swept_orphans": ("tmp_orphans_swept", ()),
}
_STORE_GAUGES = {
    "stored_bytes": ("store_bytes", "Bytes that are stored, where the store knows it."),
    "limit_bytes": ("store_limit_bytes", "What kvcodec_store_bytes may become."),
}
_REJECTED = frozenset(
    {
        "corrupt_page",
        "mismatched_page",
        "page_error",
        "quality_below_minimum",
        "too_long",
        "undecoded_page",
        "unsupported_page",
    }
)
_LOOKUPS = {"hits": "hit", "misses": "miss"}
_COUNTERS = {
    "pages": ("Pages by operation and result.", ("op", "result")),
    "page_reject": ("Pages that were not what was asked for.", ("reason",)),
    "circuit_changes": ("What the circuits did.", ("circuit", "change")),
    "bytes": (
        "Bytes moved: encoded pages (stored), their headers (meta), what they were raw (logical).",
        ("op", "kind"),
    ),
    "dropped_pages": ("Pages the store was never asked about.", ("op", "reason")),
    "removed_pages": ("Damaged pages that were removed.", ("reason",)),
    "evicted_pages": ("Pages removed to make room, or for their age.", ("place", "reason")),
    "evicted_bytes": ("Bytes of these pages.", ("place", "reason")),
    "tmp_orphans_swept": ("Unfinished files of dead writers that were removed.", ("place",)),
    "tier_lookups": ("Pages looked up in the memory in front of the store.", ("result",)),
    "store_events": ("What else the store counts about itself.", ("place", "event")),
}
_SERVER_GAUGES = {
    "calls": ("calls_in_progress", "Calls under way."),
    "streams": ("streams_in_progress", "Calls under way that are streams."),
    "sessions": ("sessions", "Clients with a region of shared memory."),
    "region_bytes": ("region_bytes", "Shared memory of the clients."),
    "staging_bytes": (
        "staging_bytes",
        "Memory in use for streams and for pages encoded or decoded here.",
    ),
    "draining": ("draining", "1 from SIGTERM to the end."),
}


class Watched(Protocol):
    """What is read when Prometheus comes: a `PageServer`."""

    def stats(self) -> Mapping[str, int]:
        """Numbers of now."""

    def counters(self) -> Mapping[str, int]:
        """Numbers that only grow."""


class Metrics:
    """The registry of one sidecar. Thread-safe; `observe` never waits for a reader."""

    def __init__(self, url: str, build: Mapping[str, str], digest: str) -> None:
        """`url` is the store's, of which the scheme is shown; `digest` is the configuration's."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._backend = url.partition(":")[0]
        self._operations = _Bounded()
        self._outcomes = _Bounded()
        self._seconds = Histogram(
            "kvcodec_op_seconds",
            "Seconds a call took.",
            ("op", "backend"),
            buckets=CALL_SECONDS,
            registry=self.registry,
        )
        self._calls = Counter(
            "kvcodec_calls", "Calls by outcome.", ("op", "outcome"), registry=self.registry
        )
        self._codec_bytes = Counter(
            "kvcodec_codec_bytes",
            "Bytes before and after of pages that the sidecar encoded itself.",
            ("kind",),
            registry=self.registry,
        )
        self._late = Counter(
            "kvcodec_deadline_exceeded",
            "Calls that ran out of time.",
            ("op",),
            registry=self.registry,
        )
        self._refused = Counter(
            "kvcodec_refused_calls",
            "Calls over TCP without a valid token or client name.",
            ("reason",),
            registry=self.registry,
        )
        self._pulled = _Pulled(build, digest, has_memory=self._backend.startswith("tier+"))
        self.registry.register(self._pulled)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def observe(
        self, operation: str, outcome: str, seconds: float, raw_bytes: int, encoded_bytes: int
    ) -> None:
        """One call is over; the arguments are those of `kvcodec_server.options.Observe`."""
        op, outcome = self._operations(operation), self._outcomes(outcome)
        self._seconds.labels(op, self._backend).observe(seconds)
        self._calls.labels(op, outcome).inc()
        if raw_bytes:
            self._pulled.moved.add(f"bytes.{op}.logical", raw_bytes)
        if encoded_bytes:
            self._pulled.moved.add(f"bytes.{op}.stored", encoded_bytes)
        if raw_bytes and encoded_bytes:
            self._codec_bytes.labels("raw").inc(raw_bytes)
            self._codec_bytes.labels("encoded").inc(encoded_bytes)
        if outcome == "timeout":
            self._late.labels(op).inc()

    def refused(self, reason: str) -> None:
        """A call was turned away: ``token`` or ``name``."""
        self._refused.labels(reason).inc()

    def watch(self, server: Watched) -> None:
        """Read this server's numbers whenever Prometheus comes."""
        self._pulled.server = server

    def gauge(self, name: str, help_text: str, read: Callable[[], float | None]) -> None:
        """A number read whenever Prometheus comes; None leaves it out."""
        self._pulled.gauges[name] = (help_text, read)

    def reloaded(self, digest: str | None) -> None:
        """A reload took place: with the digest of what applies now, None if it was refused."""
        self._pulled.reloaded = digest is not None
        if digest is not None:
            self._pulled.digest = digest
            self._pulled.reload_seconds = time.time()

    def text(self, accept: str) -> tuple[bytes, str]:
        """All of it in the format that an Accept header asks for, and that format's type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _Bounded:
    """Passes the first values on, and ``other`` for all that come later."""

    def __init__(self) -> None:
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        if value not in self._known:
            if len(self._known) >= MAX_LABEL_VALUES:
                return _OTHER
            self._known.add(value)
        return value


class _Pulled(Collector):
    """Metrics of numbers that somebody else keeps."""

    def __init__(self, build: Mapping[str, str], digest: str, *, has_memory: bool) -> None:
        self.server: Watched | None = None
        self.moved = Counters()
        self.gauges: dict[str, tuple[str, Callable[[], float | None]]] = {}
        self.reloaded = True
        self.reload_seconds = time.time()
        self.digest = digest
        self._build = dict(build)
        # What the names of a store's numbers begin with, for the place that they are of.
        self._places = {"ram": "", "store": "store."} if has_memory else {"store": ""}
        self._labels: dict[str, _Bounded] = {}

    def collect(self) -> Iterable[Metric]:
        """Part of prometheus_client's interface."""
        yield InfoMetricFamily("kvcodec_build", "What runs here.", value=self._build)
        yield InfoMetricFamily("kvcodec_config", "What it was told.", value={"digest": self.digest})
        yield GaugeMetricFamily(
            "kvcodec_config_last_reload_successful",
            "Whether the last reload was accepted.",
            float(self.reloaded),
        )
        yield GaugeMetricFamily(
            "kvcodec_config_last_reload_success_timestamp_seconds",
            "When a configuration was accepted last.",
            self.reload_seconds,
        )
        for name, (help_text, read) in self.gauges.items():
            value = read()
            if value is not None:
                yield GaugeMetricFamily(name, help_text, value)
        counters = self.moved.snapshot()
        if self.server is not None:
            yield from self._of_stats(self.server.stats())
            counters |= self.server.counters()
        yield from self._of_counters(counters)
        yield self._of_codec(counters)

    def _of_stats(self, stats: Mapping[str, int]) -> Iterator[Metric]:
        for stat, (name, help_text) in _SERVER_GAUGES.items():
            yield GaugeMetricFamily(f"kvcodec_{name}", help_text, float(stats.get(stat, 0)))
        circuits = GaugeMetricFamily(
            "kvcodec_circuit_state",
            "1 while the store is not asked, because it did not answer.",
            labels=("circuit",),
        )
        for circuit in ("reads", "writes"):
            circuits.add_metric((circuit,), float(stats.get(f"{circuit}_refused", 0)))
        yield circuits
        queue = GaugeMetricFamily(
            "kvcodec_queue_pages",
            "Pages of calls to the store that wait for a thread, or for the store.",
            labels=("state",),
        )
        for state in ("waiting", "asked"):
            queue.add_metric((state,), float(stats.get(f"{state}_pages", 0)))
        yield queue
        for gauge, (name, help_text) in _STORE_GAUGES.items():
            family = GaugeMetricFamily(f"kvcodec_{name}", help_text, labels=("place",))
            for place, prefix in self._places.items():
                if (number := stats.get(f"backend.{prefix}{gauge}")) is not None:
                    family.add_metric((place,), float(number))
            yield family

    def _of_codec(self, counters: Mapping[str, int]) -> Metric:
        family = SummaryMetricFamily(
            "kvcodec_codec_seconds",
            "Pages that the sidecar encoded or decoded itself, and the seconds it took.",
            labels=("op", "codec"),
        )
        for name, pages in sorted(counters.items()):
            if name.startswith(_CODEC_PAGES):
                operation, _, codec = name.removeprefix(_CODEC_PAGES).partition(".")
                nanoseconds = counters.get(f"{_CODEC_NANOSECONDS}{operation}.{codec}", 0)
                family.add_metric((operation, codec), pages, nanoseconds / 1e9)
        return family

    def _of_counters(self, counters: Mapping[str, int]) -> Iterator[Metric]:
        families = {
            name: CounterMetricFamily(f"kvcodec_{name}", help_text, labels=labels)
            for name, (help_text, labels) in _COUNTERS.items()
        }
        found: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        for name, count in counters.items():
            if name.startswith((_CODEC_PAGES, _CODEC_NANOSECONDS)):
                continue
            family, labels = self._sorted_in(name)
            bounded = tuple(
                self._labels.setdefault(f"{family}.{place}", _Bounded())(label)
                for place, label in enumerate(labels)
            )
            found[family, bounded] += count
            if family == "pages" and labels[1] in _REJECTED:
                found["page_reject", (labels[1],)] += count
        for (family, labels), total in sorted(found.items()):
            families[family].add_metric(labels, total)
        yield from families.values()

    def _sorted_in(self, name: str) -> tuple[str, tuple[str, ...]]:
        """The family and the labels of one of the server's counters."""
        operation, _, result = name.partition(".")
        if operation in _PAIRS:
            first, _, second = result.partition(".")
            return _PAIRS[operation], (first, second)
        if operation == "header_bytes":
            return "bytes", (result, "meta")
        if operation == "removed":
            return "removed_pages", (result,)
        if operation == "backend":
            place = "store"
            if "ram" in self._places:
                inner = result.removeprefix("store.")
                place = "ram" if inner == result else "store"
                result = inner
            if place == "ram" and result == "lost_objects":
                return "dropped_pages", ("put", "write_back")
            if place == "ram" and result in _LOOKUPS:
                return "tier_lookups", (_LOOKUPS[result],)
            if result in _STORE_COUNTERS:
                family, labels = _STORE_COUNTERS[result]
                return family, (place, *labels)
            return "store_events", (place, result)
        if operation == "io":
            return "store_events", ("sidecar", result)
        if operation.endswith(_BREAKER):
            return "circuit_changes", (operation.removesuffix(_BREAKER), result)
        return "pages", (operation, result)
