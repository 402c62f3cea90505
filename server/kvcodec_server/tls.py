"""Certificates that may be replaced while connections are made with them.

The files are looked at again when a client connects, at most once a second, and on demand. A pair
that does not fit together (the one file replaced, the other not yet) changes nothing.
"""

from __future__ import annotations

import calendar
import re
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from kvcodec.errors import ConfigError
from kvcodec.log import RateLimitedLog

__all__ = ["CertificateFiles", "Certificates", "not_after_seconds"]

_LOOK_SECONDS = 1.0
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x17, 0x18, 0xA0

_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Paths of PEM files: our certificate chain, its key, and who may sign clients ("": nobody is
    asked for a certificate).
    """

    certificate: str
    key: str
    client_ca: str = ""

    @property
    def paths(self) -> list[Path]:
        """Those that are set."""
        return [Path(path) for path in (self.certificate, self.key, self.client_ca) if path]


@dataclass(frozen=True, slots=True)
class _Loaded:
    stamp: _Stamp
    configuration: grpc.ServerCertificateConfiguration
    not_after_seconds: float


class Certificates:
    """What a TLS listener shows and whom it trusts, as the files are now. Thread-safe."""

    def __init__(self, files: CertificateFiles, log: RateLimitedLog) -> None:
        """Raises `ConfigError` if the files cannot be used."""
        self._files = files
        self._log = log
        self._lock = threading.Lock()
        self._looked_at = time.monotonic()
        self._loaded = _load(files)
        self._shown = self._loaded
        self.reloads = 0

    @property
    def not_after_seconds(self) -> float:
        """When our certificate expires, in seconds since the epoch."""
        return self._loaded.not_after_seconds

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`; every later connection is made with the files of its time."""
        return grpc.dynamic_ssl_server_credentials(
            self._loaded.configuration,
            # Its stubs forget that None says "nothing new", as its documentation has it.
            self._newer,  # type: ignore[arg-type]
            require_client_authentication=bool(self._files.client_ca),
        )

    def reload(self, files: CertificateFiles | None = None) -> None:
        """Read the files, or others in their place, now. Raises `ConfigError`, and changes nothing,
        if they cannot be used.
        """
        files = files or self._files
        if bool(files.client_ca) != bool(self._files.client_ca):
            raise ConfigError(
                "tls.client_ca: whether clients need a certificate at all is changed by a restart"
            )
        with self._lock:
            loaded = _load(files)
            self._files = files
            self._take(loaded)

    def look(self) -> None:
        """Read the files again if they have changed; keeps the old ones if that fails."""
        with self._lock:
            self._looked_at = time.monotonic()
            try:
                if _stamp(self._files) != self._loaded.stamp:
                    self._take(_load(self._files))
            except ConfigError as error:
                self._log.report("tls", "the old certificate stays: %s", error)

    def _take(self, loaded: _Loaded) -> None:
        if loaded.stamp != self._loaded.stamp:
            self.reloads += 1
        self._loaded = loaded

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        """What is new since the last connection; gRPC asks with every one."""
        if time.monotonic() - self._looked_at > _LOOK_SECONDS:
            self.look()
        if self._shown is self._loaded:
            return None
        self._shown = self._loaded
        return self._shown.configuration


def _stamp(files: CertificateFiles) -> _Stamp:
    """Changes whenever a file is replaced or written, also behind a symbolic link."""
    try:
        stats = [path.stat() for path in files.paths]
    except OSError as error:
        raise ConfigError(f"certificate files cannot be read: {error}") from error
    return tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)


def _load(files: CertificateFiles) -> _Loaded:
    """Raises `ConfigError` for files that are unreadable or do not belong together."""
    stamp = _stamp(files)
    try:
        certificate = Path(files.certificate).read_bytes()
        key = Path(files.key).read_bytes()
        client_ca = Path(files.client_ca).read_bytes() if files.client_ca else None
    except OSError as error:
        raise ConfigError(f"certificate files cannot be read: {error}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    what = f"tls.certificate {files.certificate!r} with tls.key {files.key!r}"
    try:
        # No password: an encrypted key would otherwise be asked for on the terminal.
        context.load_cert_chain(files.certificate, files.key, password=lambda: "")
        if client_ca is not None:
            what = f"tls.client_ca {files.client_ca!r}"
            context.load_verify_locations(cadata=client_ca.decode("ascii"))
        expiry = not_after_seconds(certificate)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} cannot be used: {error}") from error
    if _stamp(files) != stamp:
        raise ConfigError(f"{what}: the files change at this moment")
    configuration = grpc.ssl_server_certificate_configuration(
        [(key, certificate)], root_certificates=client_ca
    )
    return _Loaded(stamp, configuration, expiry)


def not_after_seconds(pem: bytes) -> float:
    """When the first certificate of a PEM file expires, in seconds since the epoch.

    Raises `ValueError` for what is no certificate. RFC 5280, 4.1: Certificate ::= SEQUENCE
    { tbsCertificate ::= SEQUENCE { [0] version, serial, algorithm, issuer, validity ... } ... }
    """
    block = _PEM.search(pem)
    if block is None:
        raise ValueError("no certificate in PEM form")
    der = ssl.PEM_cert_to_DER_cert(block[0].decode("ascii"))
    (certificate,) = _elements(der, 0, len(der))
    signed = _elements(der, *_elements(der, *certificate[1:])[0][1:])
    has_version = signed[0][0] == _VERSION
    tag, start, end = _elements(der, *signed[3 + has_version][1:])[1]
    text = der[start:end].decode("ascii")
    if tag == _UTC_TIME:
        text = ("20" if text < "5" else "19") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("the certificate has no time of expiry")
    return float(calendar.timegm(time.strptime(text, "%Y%m%d%H%M%SZ")))


def _elements(der: bytes, start: int, end: int) -> list[tuple[int, int, int]]:
    """Tag, start and end of the content of each DER element in a range."""
    found = []
    while start < end:
        tag, length = der[start], der[start + 1]
        start += 2
        if length & 0x80:
            size = length & 0x7F
            length = int.from_bytes(der[start : start + size], "big")
            start += size
        if start + length > end:
            raise ValueError("the certificate is cut short")
        found.append((tag, start, start + length))
        start += length
    return found
