"""What a Redis URL says: where the server is, how to log in, and what to do with objects."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import SplitResult, unquote

import redis.connection

from kvcodec.backend import display_url, parse_options
from kvcodec.errors import ConfigError
from kvcodec_backends._redis_channel import Connect

__all__ = ["RedisURL"]

DEFAULT_PREFIX = "kvcodec:"
DEFAULT_MAX_CONNECTIONS = 16
DEFAULT_PORT = 6379

_OPTIONS = ("prefix", "max_connections", "ttl_seconds")
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_SCHEME_OPTIONS = {
    "redis": _OPTIONS,
    "rediss": (*_OPTIONS, *_TLS_FILES, "ssl_check_hostname"),
    "redis+unix": (*_OPTIONS, "db"),
}
_CONNECTIONS: dict[str, Callable[..., redis.connection.AbstractConnection]] = {
    "redis": redis.connection.Connection,
    "rediss": redis.connection.SSLConnection,
    "redis+unix": redis.connection.UnixDomainSocketConnection,
}


@dataclass(frozen=True)
class RedisURL:
    """A parsed URL; `shown` is the URL without its secrets."""

    shown: str
    connect: Connect
    prefix: bytes
    max_connections: int
    ttl_seconds: int | None

    @classmethod
    def parse(cls, url: str) -> RedisURL:
        """`ConfigError` for whatever cannot be honoured."""
        shown = display_url(url)
        scheme = url.partition("://")[0]
        allowed = _SCHEME_OPTIONS.get(scheme)
        if allowed is None:
            raise ConfigError(f"{shown!r}: known schemes are {', '.join(_SCHEME_OPTIONS)}")
        parts, options = parse_options(url, allowed)
        if parts.fragment:
            raise ConfigError(f"{shown!r}: a part after #; write # as %23")
        where = _unix_arguments if scheme == "redis+unix" else _host_arguments
        arguments = where(shown, parts, options)
        if scheme == "rediss":
            arguments |= _tls_arguments(shown, options)
        ttl = options.get("ttl_seconds")
        return cls(
            shown=shown,
            # Protocol 2: no message arrives that is no answer.
            connect=partial(
                _CONNECTIONS[scheme],
                protocol=2,
                username=_unquoted(parts.username),
                password=_unquoted(parts.password),
                **arguments,
            ),
            prefix=options.get("prefix", DEFAULT_PREFIX).encode(),
            max_connections=_positive(
                shown, "max_connections", options.get("max_connections", DEFAULT_MAX_CONNECTIONS)
            ),
            ttl_seconds=None if ttl is None else _positive(shown, "ttl_seconds", ttl),
        )


def _host_arguments(shown: str, parts: SplitResult, _: Mapping[str, str]) -> dict[str, Any]:
    try:
        port = parts.port or DEFAULT_PORT
    except ValueError as error:
        raise ConfigError(f"{shown!r}: {error}") from error
    if not parts.hostname:
        raise ConfigError(
            f"{shown!r} names no host; wanted is redis://host:port/db or redis+unix:///path"
        )
    db = parts.path.strip("/") or "0"
    return {"host": parts.hostname, "port": port, "db": _database(shown, db)}


def _unix_arguments(shown: str, parts: SplitResult, options: Mapping[str, str]) -> dict[str, Any]:
    if parts.hostname or not parts.path.startswith("/"):
        raise ConfigError(f"{shown!r}: wanted is redis+unix:///run/redis.sock, three slashes")
    return {"path": unquote(parts.path), "db": _database(shown, options.get("db", "0"))}


def _tls_arguments(shown: str, options: Mapping[str, str]) -> dict[str, Any]:
    files = {name: options[name] for name in _TLS_FILES if name in options}
    for name, path in files.items():
        if not os.path.isfile(path):
            raise ConfigError(f"{shown!r}: {name} is {path!r}, and there is no such file")
    if ("ssl_certfile" in files) != ("ssl_keyfile" in files):
        raise ConfigError(f"{shown!r}: ssl_certfile and ssl_keyfile go together")
    check = options.get("ssl_check_hostname", "1")
    if check not in ("0", "1"):
        raise ConfigError(f"{shown!r}: ssl_check_hostname is {check!r}, must be 0 or 1")
    return {**files, "ssl_check_hostname": check == "1"}


def _database(shown: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{shown!r}: database {text!r}, must be a number such as 0")
    return int(text)


def _positive(shown: str, name: str, value: int | str) -> int:
    if (isinstance(value, str) and not value.isdecimal()) or int(value) < 1:
        raise ConfigError(f"{shown!r}: {name} is {value!r}, must be a whole number from 1 on")
    return int(value)


def _unquoted(text: str | None) -> str | None:
    return None if text is None else unquote(text)
