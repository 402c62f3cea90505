"""Whether the sidecar is well: the answer to ``grpc.health.v1``, ``/healthz`` and ``/readyz``.

A sidecar whose store is away is ready all the same: it answers at once that nothing is there, and
the engine computes. Not ready is one that starts or drains. Whether the store works is told apart,
by a page of the sidecar's own that is written, read, compared and removed from time to time.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Mapping

import grpc
import numpy as np
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvcodec.backend import Backend
from kvcodec.codec import Codec
from kvcodec.errors import BackendError
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.plan import PagePlan
from kvcodec.spec import CodecSpec
from kvcodec.workers import IOThreads

__all__ = ["PROBE_STEPS", "Health", "Probe", "canary_page"]

#: What a probe tries, in this order.
PROBE_STEPS = ("write", "read", "delete")

logger = logging.getLogger(__name__)

_PROBE_SECONDS = 5.0
_THREADS = 4
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """The state of the process. Thread-safe."""

    def __init__(self, services: tuple[str, ...]) -> None:
        """`services` are the full names that clients may ask for beside the server as a whole."""
        self._services = ("", *services)
        self._servicer = health.HealthServicer()
        self.phase = "starting"
        for service in self._services:
            self._servicer.set(service, _NOT_SERVING)

    def add_to(self, server: grpc.Server) -> None:
        """Register ``grpc.health.v1.Health``."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    @property
    def is_ready(self) -> bool:
        """Whether clients are welcome."""
        return self.phase == "serving"

    def serve(self) -> None:
        """Clients are welcome from now on."""
        self.phase = "serving"
        for service in self._services:
            self._servicer.set(service, _SERVING)

    def drain(self) -> None:
        """No new clients, for good."""
        self.phase = "draining"
        self._servicer.enter_graceful_shutdown()


class Probe:
    """Asks a store from time to time, on a thread of its own: the store itself, since memory in
    front of it answers without it.
    """

    def __init__(self, store: Backend, interval_seconds: float) -> None:
        """0 seconds: never."""
        self._store = store
        self._interval_seconds = interval_seconds
        self._closing = threading.Event()
        self._threads = IOThreads(_THREADS, limit=_THREADS)
        self._canary: tuple[str, memoryview] | None = None
        self.results: Mapping[str, str] = {}
        self.seconds: float | None = None

    @property
    def is_well(self) -> bool | None:
        """Whether the last probe found nothing wrong, None before the first."""
        return all(result == "ok" for result in self.results.values()) if self.results else None

    def start(self) -> None:
        """Probe now, and then at every interval."""
        if self._interval_seconds:
            threading.Thread(target=self._run, name="kvcodec-probe", daemon=True).start()

    def close(self) -> None:
        """Probe no more."""
        self._closing.set()
        self._threads.close(timeout_seconds=0.0)

    def once(self) -> Mapping[str, str]:
        """One probe: ``ok`` or what was wrong, for each step. Takes at most the time of three
        calls to the store, whatever it does.
        """
        started = time.monotonic()
        name, page = self._canary = self._canary or canary_page()
        results = {
            step: self._threads.call(
                lambda step=step: self._tried(step, name, page),  # type: ignore[misc]
                "timeout",
                _PROBE_SECONDS,
            )
            for step in PROBE_STEPS
        }
        if results["write"] != "ok":
            # What could not be written is not there; a store that says so answers well.
            results |= {step: "ok" for step in ("read", "delete") if results[step] == "missing"}
        self.results, self.seconds = results, time.monotonic() - started
        return results

    def _run(self) -> None:
        while True:
            self.once()
            if self._closing.wait(self._interval_seconds):
                return

    def _tried(self, step: str, name: str, page: memoryview) -> str:
        try:
            if step == "write":
                (error,) = self._store.put([name], [page], timeout_seconds=_PROBE_SECONDS)
                return "ok" if error is None else error.label
            if step == "read":
                return self._read(name, page)
            (gone,) = self._store.delete([name], timeout_seconds=_PROBE_SECONDS)
            return "ok" if gone else "missing"
        except Exception:
            logger.exception("the store raised at a probe")
            return "raised"

    def _read(self, name: str, page: memoryview) -> str:
        buffer = bytearray(len(page))
        (answer,) = self._store.get_into(
            [name], [memoryview(buffer)], timeout_seconds=_PROBE_SECONDS
        )
        if isinstance(answer, BackendError):
            return answer.label
        if answer is None:
            return "missing"
        return "ok" if buffer == page else "damaged"


def canary_page() -> tuple[str, memoryview]:
    """The name and the bytes of a small sound page that no engine asks for."""
    layout = PageLayout.mha(
        dtype=DType.BF16, token_count=1, layer_count=1, head_count=1, head_size=64
    )
    namespace = Namespace(Identity.of(kvcodec="canary", run=secrets.token_hex(16)), layout)
    key = b"canary"
    plan = PagePlan.build(namespace, CodecSpec().section_codecs(layout), len(key))
    page = np.zeros(plan.page_bytes, np.uint8)
    rows = [np.full((1, 1, 1, 1, 64), number, np.uint16) for number in (0x3F80, 0x4000)]
    codec = Codec(1)
    try:
        codec.encode_into(plan, [key], PageViews.of_arrays(layout, rows), [page])
    finally:
        codec.close()
    return namespace.object_name(key.decode()), page.data
