"""What a ``hicache+NAME://`` URL says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvcodec.backend import display_url, parse_byte_count, parse_options
from kvcodec.errors import ConfigError

__all__ = ["HiCacheURL"]

DEFAULT_SLOT_BYTES = 16 << 20
DEFAULT_THREADS = 4
_SLOT_ALIGNMENT = 4096

_OWN_OPTIONS = ("exact", "json", "slot_bytes", "threads")
#: Options of SGLang's backends that may stand in the URL as they are. Everything else goes into
#: `json`: SGLang ignores what it does not know, and kvcodec cannot tell a slip from an option.
_BACKEND_OPTIONS = {
    "file": ("file_storage_path",),
    "mooncake": (
        "client_server_address",
        "device_name",
        "extra_backend_tag",
        "global_segment_size",
        "local_hostname",
        "master_metrics_port",
        "master_server_address",
        "metadata_server",
        "protocol",
        "tenant_id",
    ),
}
#: Backends tried here that store as many bytes as they are given, and read an object into a larger
#: page. All others get pages of one size, which is all that SGLang's interface promises.
_EXACT_BACKENDS = frozenset({"mooncake"})


@dataclass(frozen=True)
class HiCacheURL:
    """A parsed URL; `shown` is the URL without its secrets, `extra_config` what SGLang gets."""

    shown: str
    backend_name: str
    extra_config: Mapping[str, Any]
    slot_bytes: int
    exact: bool
    threads: int

    @classmethod
    def parse(cls, url: str) -> HiCacheURL:
        """`ConfigError` for whatever cannot be honoured."""
        shown = display_url(url)
        name = url.partition("://")[0].partition("+")[2]
        if not name:
            raise ConfigError(f"{shown!r} names no backend; wanted is hicache+mooncake://?...")
        backend_options = _BACKEND_OPTIONS.get(name, ())
        parts, options = parse_options(url, (*_OWN_OPTIONS, *backend_options))
        if parts.netloc or parts.path or parts.fragment:
            raise ConfigError(f"{shown!r}: wanted is hicache+{name}://?option=value&..., no more")
        exact = options.get("exact", "1" if name in _EXACT_BACKENDS else "0")
        if exact not in ("0", "1"):
            raise ConfigError(f"{shown!r}: exact is {exact!r}, must be 0 or 1")
        if exact == "0" and "slot_bytes" not in options:
            raise ConfigError(
                f"{shown!r}: give slot_bytes; {name} stores every object in that many bytes, so it "
                "should be a little more than an encoded page has (kvcodec inspect)"
            )
        return cls(
            shown=shown,
            backend_name=name,
            extra_config=_extra_config(shown, options, backend_options),
            slot_bytes=_slot_bytes(shown, options.get("slot_bytes")),
            exact=exact == "1",
            threads=_threads(shown, options.get("threads", str(DEFAULT_THREADS))),
        )


def _extra_config(
    shown: str, options: Mapping[str, str], backend_options: tuple[str, ...]
) -> dict[str, Any]:
    text = options.get("json", "{}")
    try:
        if text.startswith("@"):
            with open(text[1:], encoding="utf-8") as file:
                text = file.read()
        config = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{shown!r}: json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{shown!r}: json is {type(config).__name__}, must be an object")
    for name in backend_options:
        if name in options and name in config:
            raise ConfigError(f"{shown!r}: {name} is given twice, once in json")
        if name in options:
            config[name] = _plain(options[name])
    return config


def _plain(text: str) -> str | int:
    """Numbers as numbers: SGLang takes its options from JSON."""
    return int(text) if text.isdecimal() else text


def _slot_bytes(shown: str, text: str | None) -> int:
    count = DEFAULT_SLOT_BYTES if text is None else parse_byte_count("slot_bytes", text)
    if not _SLOT_ALIGNMENT <= count <= 1 << 30:
        raise ConfigError(f"{shown!r}: slot_bytes is {count}, must be from 4096 to 1 GiB")
    # Backends that bypass the page cache need whole blocks.
    return -(-count // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT


def _threads(shown: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise ConfigError(f"{shown!r}: threads is {text!r}, must be a number from 1 to 64")
    return int(text)
