"""Whose KV a page is: the identity record, the namespace made of it, and the names of pages in a
store.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvcodec.errors import ConfigError, CorruptPage
from kvcodec.layout import PageLayout

__all__ = [
    "CODEC_POOLS",
    "MAX_IDENTITY_BYTES",
    "MAX_KEY_BYTES",
    "Identity",
    "Namespace",
    "encode_key",
    "layout_record",
    "object_name",
]

MAX_IDENTITY_BYTES = 16384
MAX_KEY_BYTES = 1024

#: What the identity field `pool` says of pools of keys and values, which bear a codec. Any other
#: pool holds state that must not change.
CODEC_POOLS = frozenset({"kv", "swa", "auxiliary_swa", "draft", "draft_swa"})

_FIELD_NAME = re.compile(r"[a-z0-9_]{1,32}")
_LAYOUT = struct.Struct("<BBHII")
_STREAM = struct.Struct("<B3xIII")


def layout_record(layout: PageLayout) -> tuple[bytes, bytes]:
    """The layout as it stands in a header: the 12 bytes from `dtype` to `token_count`, and the
    streams.
    """
    fixed = _LAYOUT.pack(
        layout.dtype,
        len(layout.streams),
        layout.layer_count,
        layout.layer_start,
        layout.token_count,
    )
    streams = b"".join(
        _STREAM.pack(s.role, s.head_count, s.head_size, s.head_start) for s in layout.streams
    )
    return fixed, streams


@dataclass(frozen=True, slots=True)
class Identity:
    """Named text fields that tell one KV from another: model, revision, ranks, pool, tenant ...

    Equal only if all fields are equal; there are no wildcards. Put a digest of a secret, never the
    secret.
    """

    fields: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        names = [name for name, _ in self.fields]
        if names != sorted(set(names)):
            raise ConfigError(f"identity fields {names} are not ascending and unique")
        for name in names:
            if not _FIELD_NAME.fullmatch(name):
                raise ConfigError(f"identity field {name!r}: a name is 1 to 32 of a-z, 0-9 and _")
        if len(self.record) > MAX_IDENTITY_BYTES:
            raise ConfigError(
                f"the identity takes {len(self.record)} bytes, allowed is {MAX_IDENTITY_BYTES}"
            )

    @classmethod
    def of(cls, **fields: object) -> Identity:
        """An identity from keyword arguments; values become text."""
        return cls(tuple(sorted((name, str(value)) for name, value in fields.items())))

    @property
    def record(self) -> bytes:
        """The bytes of the identity in a header (FORMAT.md 2.5)."""
        parts = []
        for name, value in self.fields:
            data = _utf8(f"identity field {name!r}", value)
            if len(data) > 0xFFFF:
                raise ConfigError(
                    f"identity field {name!r} takes {len(data)} bytes, allowed is 65535"
                )
            parts.append(
                struct.pack("<B", len(name)) + name.encode() + struct.pack("<H", len(data)) + data
            )
        return b"".join(parts)

    @classmethod
    def parse(cls, record: bytes) -> Identity:
        """The inverse of `record`. Raises `CorruptPage` for anything a writer would not write."""
        fields = []
        at = 0
        try:
            while at < len(record):
                end = at + 1 + record[at]
                name = record[at + 1 : end].decode("ascii")
                (size,) = struct.unpack_from("<H", record, end)
                at = end + 2 + size
                if at > len(record):
                    raise CorruptPage(
                        "identity", "an identity field runs past the end of the record"
                    )
                fields.append((name, record[end + 2 : at].decode("utf-8")))
            return cls(tuple(fields))
        except (struct.error, UnicodeDecodeError, ConfigError) as error:
            raise CorruptPage("identity", f"the identity record is malformed: {error}") from error

    def as_dict(self) -> Mapping[str, str]:
        """The fields by name."""
        return dict(self.fields)


@dataclass(frozen=True, slots=True)
class Namespace:
    """An identity together with a layout: the room in a store in which page keys are unique."""

    identity: Identity
    layout: PageLayout
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        fixed, streams = layout_record(self.layout)
        data = b"kvcodec namespace 1\0" + fixed + streams + self.identity.record
        object.__setattr__(self, "digest", hashlib.sha256(data).digest()[:16])

    def object_name(self, key: str) -> str:
        """Name of the page with this key in a store. Raises `ConfigError` for an empty or overlong
        key.
        """
        return object_name(self.digest, key)


def _utf8(what: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} {text!r} is not text: {error.reason}") from error


def encode_key(key: str) -> bytes:
    """The key as it stands in a header."""
    data = _utf8("page key", key)
    if not 1 <= len(data) <= MAX_KEY_BYTES:
        raise ConfigError(f"a page key of {len(data)} bytes; allowed is 1 to {MAX_KEY_BYTES}")
    return data


def object_name(namespace_digest: bytes, key: str) -> str:
    """``<namespace>/<page>`` in hexadecimal digits (FORMAT.md 2.5)."""
    page = hashlib.sha256(namespace_digest + encode_key(key)).hexdigest()
    return f"{namespace_digest.hex()}/{page}"
