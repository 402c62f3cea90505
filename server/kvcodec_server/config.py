"""What the sidecar can be told, and what each setting may be.

A setting has one name, ``section.key``, in every place: a nested key of the file, the flag
``--section.key``, the variable ``KVCODEC__SECTION__KEY``. Units stand last in the name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from kvcodec.backend import display_url, parse_byte_count
from kvcodec.errors import ConfigError
from kvcodec_server import options
from kvcodec_server.options import ServerOptions

__all__ = [
    "RELOADABLE",
    "Access",
    "Address",
    "Configuration",
    "Given",
    "HTTP",
    "Health",
    "Limits",
    "Listen",
    "Log",
    "Settings",
    "Store",
    "TLS",
    "Tracing",
    "configured",
    "setting_names",
]

#: Settings that a running sidecar takes over on SIGHUP; all others need a restart.
RELOADABLE = frozenset(
    {
        "access.token",
        "access.token_file",
        "limits.drain_seconds",
        "log.level",
        "tls.certificate",
        "tls.client_ca",
        "tls.client_names",
        "tls.key",
        *(f"limits.{option}" for option in options.RELOADABLE),
    }
)

_DEFAULTS = ServerOptions()
_HOST_PORT = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<name>[^\s:\[\]/]+)):(?P<port>\d{1,5})")
_SHOWN_CHARACTERS = 80


def _number(value: object) -> object:
    """Python counts True as 1; a file that says `true` where a number belongs is mistaken."""
    if isinstance(value, bool):
        raise ValueError("wanted a number")
    return value


def _byte_count(value: object) -> object:
    if not isinstance(value, str):
        return _number(value)
    try:
        return parse_byte_count("value", value)
    except ConfigError:
        raise ValueError("wanted a number of bytes such as 4096, 64MiB or 10GB") from None


def _items(value: object) -> object:
    """A list, or text with commas as an environment variable has it."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def _mode(value: object) -> object:
    """Permissions: text is octal, as chmod takes it; a number is a number."""
    if isinstance(value, str):
        if not re.fullmatch(r"0?o?[0-7]{3}", value):
            raise ValueError("wanted three octal digits such as 0660")
        return int(value.replace("o", ""), 8)
    return _number(value)


def _address(value: object) -> object:
    return Address.parse(value) if isinstance(value, str) else value


def _addresses(value: object) -> object:
    items = _items(value)
    return [_address(item) for item in items] if isinstance(items, list) else items


def _level(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port to listen on; port 0 lets the system choose."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``127.0.0.1:9464``, ``localhost:0`` or ``[::1]:9464``; `ValueError` otherwise."""
        match = _HOST_PORT.fullmatch(text.strip())
        if match is None or int(match["port"]) > 65535:
            raise ValueError("wanted host:port such as 127.0.0.1:9464 or [::1]:9464")
        return cls(match["v6"] or match["name"], int(match["port"]))

    @property
    def is_loopback(self) -> bool:
        """Whether nobody outside this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_Count = Annotated[int, BeforeValidator(_number), Field(ge=0, le=1_000_000)]
_Seconds = Annotated[
    float, BeforeValidator(_number), Field(ge=0.0, le=86_400.0, allow_inf_nan=False)
]
_Ratio = Annotated[float, BeforeValidator(_number), Field(ge=0.0, le=1.0, allow_inf_nan=False)]
_Bytes = Annotated[int, BeforeValidator(_byte_count), Field(ge=0, le=1 << 46)]
_Names = Annotated[tuple[str, ...], BeforeValidator(_items)]
_Uid = Annotated[int, BeforeValidator(_number), Field(ge=0, le=0xFFFFFFFE)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Store(_Section):
    """Where pages are kept."""

    url: str = Field(min_length=1, repr=False)  # it may have a password in it
    create: bool = True
    ram_bytes: _Bytes = 0
    namespaces: Annotated[tuple[_Digest, ...], BeforeValidator(_items)] = ()


class Listen(_Section):
    """Where clients come in."""

    unix: str = "/run/kvcodec/kvcodec.sock"
    unix_mode: Annotated[int, BeforeValidator(_mode), Field(ge=0, le=0o777)] = 0o660
    tcp: Annotated[tuple[Address, ...], BeforeValidator(_addresses)] = ()
    reflection: bool = True


class HTTP(_Section):
    """Where metrics and health are read."""

    address: Annotated[Address | None, BeforeValidator(lambda v: _address(v) if v else None)] = (
        Address("127.0.0.1", 9464)
    )


class TLS(_Section):
    """What proves who is who on TCP; the files may be replaced at any time."""

    certificate: str = ""
    key: str = ""
    client_ca: str = ""
    client_names: _Names = ()


class Access(_Section):
    """Who may come in."""

    token: SecretStr = SecretStr("")
    token_file: str = ""
    uids: Annotated[tuple[_Uid, ...], BeforeValidator(_items)] = ()
    plaintext: bool = False


class Limits(_Section):
    """How much at once: the options of `kvcodec_server.options.ServerOptions`, and how long to wait
    for calls under way at the end.
    """

    grpc_threads: _Count = _DEFAULTS.grpc_threads
    io_threads: _Count = _DEFAULTS.io_threads
    codec_threads: _Count = _DEFAULTS.codec_threads
    staging_bytes: _Bytes = _DEFAULTS.staging_bytes
    max_object_bytes: _Bytes = _DEFAULTS.max_object_bytes
    max_objects: _Count = _DEFAULTS.max_objects
    max_call_seconds: _Seconds = _DEFAULTS.max_call_seconds
    max_streams: _Count = _DEFAULTS.max_streams
    max_sessions: _Count = _DEFAULTS.max_sessions
    max_region_bytes: _Bytes = _DEFAULTS.max_region_bytes
    breaker_failures: _Count = _DEFAULTS.breaker_failures
    breaker_cooldown_seconds: _Seconds = _DEFAULTS.breaker_cooldown_seconds
    drain_seconds: _Seconds = 25.0


class Health(_Section):
    """How the store is watched."""

    probe_seconds: _Seconds = 30.0


class Log(_Section):
    """What is written to stderr."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_level)] = "info"
    format: Annotated[Literal["json", "text"], BeforeValidator(_level)] = "json"


class Tracing(_Section):
    """Where spans go."""

    endpoint: str = ""
    sample_ratio: _Ratio = 0.01


class Settings(_Section):
    """Everything the sidecar is told, checked."""

    store: Store
    listen: Listen = Listen()
    http: HTTP = HTTP()
    tls: TLS = TLS()
    access: Access = Access()
    limits: Limits = Limits()
    health: Health = Health()
    log: Log = Log()
    tracing: Tracing = Tracing()

    @model_validator(mode="after")
    def _fits_together(self) -> Settings:
        """Settings that contradict each other; a `ValueError` names both."""
        if not self.listen.unix and not self.listen.tcp:
            raise ValueError("nothing to listen on: set listen.unix or listen.tcp")
        if bool(self.tls.certificate) != bool(self.tls.key):
            raise ValueError("tls.certificate and tls.key go together")
        if self.tls.client_ca and not self.tls.certificate:
            raise ValueError("tls.client_ca needs tls.certificate and tls.key")
        if self.tls.client_names and not self.tls.client_ca:
            raise ValueError("tls.client_names needs tls.client_ca, which proves the names")
        if self.access.token.get_secret_value() and self.access.token_file:
            raise ValueError("access.token and access.token_file: set one of them")
        open_to_all = [str(at) for at in self.listen.tcp if not at.is_loopback]
        if open_to_all and not self.tls.certificate and not self.access.plaintext:
            raise ValueError(
                f"listen.tcp {open_to_all[0]} can be reached from other machines without TLS: set "
                "tls.certificate and tls.key, or access.plaintext=true if the network is safe"
            )
        _ = self.server_options  # its limits are checked there
        return self

    @property
    def server_options(self) -> ServerOptions:
        """The limits as `PageServer` takes them."""
        limits = self.limits.model_dump(exclude={"drain_seconds"})
        return ServerOptions(allowed_uids=frozenset(self.access.uids), **limits)

    @property
    def log_level(self) -> int:
        """The level as `logging` counts it."""
        level: int = getattr(logging, self.log.level.upper())
        return level


@dataclass(frozen=True, slots=True)
class Given:
    """What somebody set: the value as it was written, and where, in words for people."""

    value: object
    origin: str


@dataclass(frozen=True, slots=True)
class Configuration:
    """Settings, and where each came from."""

    settings: Settings
    origins: Mapping[str, str]

    def rows(self) -> Iterator[tuple[str, object, str]]:
        """Name, value fit to be shown (secrets starred), and origin of every setting."""
        for name in setting_names():
            yield name, _shown(name, self.value(name)), self.origins[name]

    def value(self, name: str) -> object:
        """The value of one setting."""
        section, _, key = name.partition(".")
        found: object = getattr(getattr(self.settings, section), key)
        return found

    def with_values(self, other: Configuration, names: Collection[str]) -> Configuration:
        """This one, with the values and origins of `names` from the other."""
        settings = self.settings
        for name in names:
            section, _, key = name.partition(".")
            changed = getattr(settings, section).model_copy(update={key: other.value(name)})
            settings = settings.model_copy(update={section: changed})
        origins = dict(self.origins) | {name: other.origins[name] for name in names}
        return Configuration(settings, origins)

    @property
    def digest(self) -> str:
        """12 hex digits that change with any value but a secret one: equal for equal sidecars."""
        values = {name: value for name, value, _ in self.rows()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def changed(self, other: Configuration) -> frozenset[str]:
        """Names of the settings that differ between the two."""
        return frozenset(name for name in setting_names() if self.value(name) != other.value(name))


def setting_names() -> tuple[str, ...]:
    """Every setting there is, in the order of the documentation."""
    return tuple(
        f"{section}.{key}"
        for section, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for key in field.annotation.model_fields
    )


def configured(given: Mapping[str, Given]) -> Configuration:
    """Settings from what was given; defaults for the rest.

    `given` has names of `setting_names` only. Raises one `ConfigError` that lists every value which
    cannot be honoured.
    """
    if "store.url" not in given:
        raise ConfigError(
            "store.url is not set: say which store with --store.url URL, KVCODEC__STORE__URL or "
            "in the file"
        )
    tree: dict[str, dict[str, object]] = {}
    for name, each in given.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = each.value
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(_complaints(error, given))) from None
    origins = {name: given[name].origin if name in given else "default" for name in setting_names()}
    return Configuration(settings, origins)


def _complaints(error: ValidationError, given: Mapping[str, Given]) -> Iterator[str]:
    for detail in error.errors(include_url=False, include_context=False):
        name = ".".join(str(part) for part in detail["loc"][:2])
        message = detail["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        if name in given:
            shown = repr(_shown(name, given[name].value))[:_SHOWN_CHARACTERS]
            yield f"{name} is {shown} ({given[name].origin}): {message}"
        else:
            yield message


def _shown(name: str, value: object) -> object:
    """The value as JSON can hold it, without secrets."""
    if name == "access.token":
        secret = value.get_secret_value() if isinstance(value, SecretStr) else value
        return "***" if secret else ""
    if isinstance(value, tuple | list):
        return [_shown(name, item) for item in value]
    if isinstance(value, Address):
        return str(value)
    if name in ("store.url", "tracing.endpoint") and isinstance(value, str):
        return display_url(value)
    if name == "listen.unix_mode" and isinstance(value, int):
        return f"{value:04o}"
    if name == "http.address" and value is None:
        return ""
    if isinstance(value, str | int | float | None):
        return value
    return str(value)[:_SHOWN_CHARACTERS]
