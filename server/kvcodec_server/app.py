"""One sidecar process: made from its configuration, served until a signal, drained, gone."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import grpc
from grpc_reflection.v1alpha import reflection

from kvcodec import native
from kvcodec.backend import Backend, display_url, open_backend
from kvcodec.errors import ConfigError, NativeError
from kvcodec.log import RateLimitedLog
from kvcodec_server.access import Gate, read_tokens
from kvcodec_server.config import RELOADABLE, Address, Configuration, Settings
from kvcodec_server.health import Health, Probe
from kvcodec_server.http import HTTPListener
from kvcodec_server.logs import start_logging
from kvcodec_server.malloc import keep_freed_memory
from kvcodec_server.metrics import Metrics
from kvcodec_server.namespaces import ServedNamespaces
from kvcodec_server.options import Observe
from kvcodec_server.service import PageServer, new_grpc_server
from kvcodec_server.sockets import UnixSocket, add_port
from kvcodec_server.tls import CertificateFiles, Certificates
from kvcodec_server.tracing import open_traces

__all__ = ["SERVICE", "Sidecar", "serve"]

logger = logging.getLogger(__name__)

#: The full name of the service, as health checks and reflection know it.
SERVICE = "kvcodec.v1.PageService"

_ANSWER_SECONDS = 1.0
_CLOSE_SECONDS = 1.0
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def serve(configuration: Configuration, reread: Callable[[], Configuration]) -> bool:
    """Run a sidecar until SIGTERM or SIGINT; whether all calls under way came to their end.

    SIGHUP asks `reread` for the configuration of now. A second SIGTERM ends the process at once.
    Raises `ConfigError` if it cannot start. To be called on the main thread, before others exist.
    """
    keep_freed_memory()
    _raise_descriptor_limit()
    # Threads inherit the mask: only this one hears signals, when it waits for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    start_logging(configuration.settings.log_level, configuration.settings.log.format)
    sidecar = Sidecar(configuration)
    try:
        sidecar.start()
        while signal.sigwait(_SIGNALS) == signal.SIGHUP:
            sidecar.reload(reread)
    finally:
        _end_at_next_signal()
        ended = sidecar.stop()
    return ended


class Sidecar:
    """Store, service, listeners and what watches them. `start` once, `stop` once."""

    def __init__(self, configuration: Configuration) -> None:
        """Opens the store and reads the files; listens nowhere yet. Raises `ConfigError`."""
        self.configuration = configuration
        settings = configuration.settings
        self._log = RateLimitedLog(logger)
        tokens = read_tokens(settings.access.token.get_secret_value(), settings.access.token_file)
        self._certificates = (
            Certificates(_certificate_files(settings), self._log)
            if settings.tls.certificate
            else None
        )
        self._traces = open_traces(settings.tracing)
        self._store = open_backend(_store_url(settings), create=settings.store.create)
        self.metrics = Metrics(_store_url(settings), _build(), configuration.digest)
        crowded = partial(self.metrics.refused, "crowd")
        self._pages = PageServer(self._served(), settings.server_options, self._observe(), crowded)
        self._gate = Gate(self.metrics.refused)
        self._gate.reload(tokens, settings.tls.client_names)
        self._grpc = new_grpc_server(settings.server_options, self._interceptors(), crowded)
        self.health = Health((SERVICE,))
        self._probe = Probe(self._store.origin, settings.health.probe_seconds)
        self._unix: UnixSocket | None = None
        self._http: HTTPListener | None = None
        self.tcp_addresses: list[Address] = []

    @property
    def http_address(self) -> Address | None:
        """Where metrics and health are read."""
        return self._http.address if self._http else None

    def start(self) -> None:
        """Listen, and say so. Raises `ConfigError` if an address cannot be had."""
        settings = self.configuration.settings
        self._pages.add_to(self._grpc)
        self.health.add_to(self._grpc)
        if settings.listen.reflection:
            names = (SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._grpc)
        self._listen(settings)
        self._watch(settings)
        self._grpc.start()
        self._probe.start()
        self.health.serve()
        logger.info(
            "kvcodec serves %s on %s",
            display_url(settings.store.url),
            ", ".join(self._places()),
            extra={"config": self.configuration.digest} | _build(),
        )

    def reload(self, reread: Callable[[], Configuration]) -> bool:
        """Take over what may change while running; False, and nothing changed, if it is broken."""
        try:
            new = reread()
            applied, fixed = self._applied(new)
        except ConfigError as error:
            logger.error("the configuration stays as it was: %s", error)
            self.metrics.reloaded(None)
            return False
        changed = self.configuration.changed(applied)
        self.configuration = applied
        self.metrics.reloaded(applied.digest)
        logger.info("reloaded: %s", ", ".join(sorted(changed)) or "certificates and tokens")
        if fixed:
            logger.warning("only a restart changes %s", ", ".join(sorted(fixed)))
        return True

    def stop(self) -> bool:
        """Tell clients to leave, wait for calls under way, close everything; whether all ended."""
        seconds = self.configuration.settings.limits.drain_seconds
        self.health.drain()
        logger.info("draining for %g s at most", seconds)
        ended = self._pages.drain(seconds)
        if not ended:
            logger.warning("calls under way are cut off after %g s", seconds)
        # A call that has ended may still have its answer on the way.
        self._grpc.stop(_ANSWER_SECONDS if ended else None).wait(_CLOSE_SECONDS)
        self._probe.close()
        # A store that hangs must not hang the end of the process.
        closing = threading.Thread(target=self._close_store, name="kvcodec-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if self._traces is not None:
            self._traces.close()
        if self._unix is not None:
            self._unix.close()
        if self._http is not None:
            self._http.close()
        logger.info("stopped")
        return ended

    def _close_store(self) -> None:
        self._pages.close()
        self._store.close()

    def _served(self) -> Backend:
        digests = self.configuration.settings.store.namespaces
        return ServedNamespaces(self._store, digests) if digests else self._store

    def _interceptors(self) -> list[grpc.ServerInterceptor]:
        """Who is not let in makes no spans."""
        return [self._gate, *([] if self._traces is None else [self._traces])]

    def _observe(self) -> Observe:
        traces = self._traces
        if traces is None:
            return self.metrics.observe

        def observe(
            operation: str, outcome: str, seconds: float, raw_bytes: int, encoded_bytes: int
        ) -> None:
            self.metrics.observe(operation, outcome, seconds, raw_bytes, encoded_bytes)
            traces.observe(operation, outcome, seconds, raw_bytes, encoded_bytes)

        return observe

    def _listen(self, settings: Settings) -> None:
        if settings.listen.unix:
            self._unix = UnixSocket(settings.listen.unix, settings.listen.unix_mode)
            self._unix.add_to(self._grpc)
            self._pages.listen(f"{self._unix.path}.region", mode=self._unix.mode)
        credentials = self._certificates.credentials() if self._certificates else None
        for address in settings.listen.tcp:
            port = add_port(self._grpc, address, credentials, "listen.tcp")
            self.tcp_addresses.append(Address(address.host, port))
        if settings.http.address is not None:
            pages = {
                "/metrics": self._metrics_page,
                "/healthz": lambda _: (200, b"alive\n", "text/plain"),
                "/readyz": lambda _: self._ready_page(),
            }
            self._http = HTTPListener(settings.http.address, pages)

    def _watch(self, settings: Settings) -> None:
        metrics, probe = self.metrics, self._probe
        metrics.watch(self._pages)
        metrics.gauge(
            "kvcodec_ready", "Whether clients are welcome.", lambda: float(self.health.is_ready)
        )
        metrics.gauge(
            "kvcodec_staging_limit_bytes",
            "What kvcodec_staging_bytes may become.",
            lambda: float(settings.limits.staging_bytes),
        )
        metrics.gauge(
            "kvcodec_sessions_limit",
            "What kvcodec_sessions may become.",
            lambda: float(self.configuration.settings.limits.max_sessions),
        )
        if settings.health.probe_seconds:
            metrics.gauge(
                "kvcodec_store_up",
                "Whether a page could be written, read and removed at the last probe.",
                lambda: None if probe.is_well is None else float(probe.is_well),
            )
            metrics.gauge("kvcodec_store_probe_seconds", "Seconds it took.", lambda: probe.seconds)
        if (certificates := self._certificates) is not None:
            metrics.gauge(
                "kvcodec_tls_certificate_expiry_timestamp_seconds",
                "When the certificate in use expires.",
                lambda: certificates.not_after_seconds,
            )

    def _places(self) -> list[str]:
        places = [f"unix:{self._unix.path}"] if self._unix else []
        places += [str(address) for address in self.tcp_addresses]
        return places + ([f"http://{self.http_address}"] if self.http_address else [])

    def _metrics_page(self, accept: str) -> tuple[int, bytes, str]:
        return (200, *self.metrics.text(accept))

    def _ready_page(self) -> tuple[int, bytes, str]:
        steps = {step: result for step, result in self._probe.results.items() if result != "ok"}
        stats = self._pages.stats()
        circuits = [name for name in ("reads", "writes") if stats.get(f"{name}_refused")]
        document = {"status": self.health.phase, "store": steps or "ok", "circuits_open": circuits}
        status = 200 if self.health.is_ready else 503
        return status, json.dumps(document).encode() + b"\n", "application/json"

    def _applied(self, new: Configuration) -> tuple[Configuration, frozenset[str]]:
        """Apply what may change; the configuration that applies now, and what needs a restart.

        Whatever can fail comes first: a reload is taken as a whole or not at all.
        """
        changed = self.configuration.changed(new)
        reloadable = set(RELOADABLE)
        if self._certificates is None or not new.settings.tls.certificate:
            reloadable -= {name for name in RELOADABLE if name.startswith("tls.")}
        merged = self.configuration.with_values(new, changed & reloadable)
        settings = merged.settings
        tokens = read_tokens(settings.access.token.get_secret_value(), settings.access.token_file)
        options = settings.server_options
        if self._certificates is not None:
            self._certificates.reload(_certificate_files(settings))
        self._pages.reconfigure(options)
        self._gate.reload(tokens, settings.tls.client_names)
        logging.getLogger().setLevel(settings.log_level)
        return merged, changed - reloadable


def _raise_descriptor_limit() -> None:
    """As far as it goes: the usual one is for programs that count on `select`."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _end_at_next_signal() -> None:
    """SIGTERM or SIGINT ends the process from here on, whatever the main thread waits for.

    A handler in Python would run when that thread next executes Python, which a signal that comes
    just before a wait does not bring about; and the kernel's own way out does not exist for the
    first process of a container.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told)
    threading.Thread(
        target=lambda: os._exit(128 + os.read(heard, 1)[0]), name="kvcodec-end", daemon=True
    ).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})


def _store_url(settings: Settings) -> str:
    """The store's URL, behind memory if there is to be some."""
    url = settings.store.url
    if not settings.store.ram_bytes:
        return url
    quoted = url.replace("%", "%25").replace("&", "%26").replace("#", "%23")
    return f"tier+ram://?bytes={settings.store.ram_bytes}&store={quoted}"


def _certificate_files(settings: Settings) -> CertificateFiles:
    tls = settings.tls
    return CertificateFiles(tls.certificate, tls.key, tls.client_ca)


def _build() -> dict[str, str]:
    try:
        installed = version("kvcodec")
    except PackageNotFoundError:
        installed = "unknown"
    try:
        isa = native.isa()
    except NativeError:
        isa = "none"
    return {"version": installed, "isa": isa}
