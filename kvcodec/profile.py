"""Profiles: the codecs that were found best for one model, layer by layer, at several sizes.

`kvcodec tune` writes them, and a spec names one as ``profile:PATH@BITS``. A profile steers the
encoder alone: pages carry its digest and nothing that a reader would need.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvcodec.errors import ConfigError
from kvcodec.layout import PageLayout, Role

__all__ = ["PROFILE_EXTENSION", "PROFILE_PREFIX", "PROFILE_VERSION", "Profile", "ProfileReference"]

#: The header extension that holds a profile's digest.
PROFILE_EXTENSION = 1
#: The field ``kvcodec_profile`` of a file.
PROFILE_VERSION = 1
#: How a spec that names a profile begins.
PROFILE_PREFIX = "profile:"

_MAX_FILE_BYTES = 64 << 20
_GEOMETRY = ("layers", "kv_heads", "key_head_size", "value_head_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileReference:
    """Which profile a spec comes from: the SHA-256 of the file, and the geometry of its model."""

    digest: bytes
    layers: int
    kv_heads: int
    key_head_size: int
    value_head_size: int

    def check(self, layout: PageLayout, *, is_whole: bool = False) -> None:
        """Raise `ConfigError` if the pages cannot be those of the profile's model: their layers may
        be some of its layers, unless `is_whole`, and their heads a share of its heads.
        """
        sizes = {stream.role: stream.head_size for stream in layout.streams}
        if set(sizes) != {Role.KEY, Role.VALUE}:
            roles = " and ".join(role.text for role in sizes)
            raise ConfigError(f"the profile is for keys and values; these pages hold {roles}")
        heads = max(stream.head_count for stream in layout.streams)
        end = layout.layer_start + layout.layer_count
        found = {"key_head_size": sizes[Role.KEY], "value_head_size": sizes[Role.VALUE]}
        for name, size in found.items():
            if size != getattr(self, name):
                raise ConfigError(_other_model(name, getattr(self, name), size))
        if self.kv_heads % heads:
            raise ConfigError(_other_model("kv_heads", self.kv_heads, heads))
        if end > self.layers or (is_whole and end - layout.layer_start != self.layers):
            raise ConfigError(_other_model("layers", self.layers, end))


def _other_model(name: str, wanted: int, found: int) -> str:
    return (
        f"the profile was made for a model with {name} {wanted}, this one has {found}: make one "
        "for this model with kvcodec tune"
    )


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile file. `points`: (bits per value with all metadata, text of the spec), ascending."""

    reference: ProfileReference
    points: tuple[tuple[float, str], ...]

    @classmethod
    def read(cls, path: Path) -> Profile:
        """The profile in a file. Raises `ConfigError` for what is none."""
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"the profile {str(path)!r} cannot be read: {error}") from error
        if len(data) > _MAX_FILE_BYTES:
            raise ConfigError(f"{str(path)!r} has more than {_MAX_FILE_BYTES} bytes: no profile")
        try:
            return cls.parse(data)
        except ConfigError as error:
            raise ConfigError(f"{str(path)!r}: {error}") from error

    @classmethod
    def parse(cls, data: bytes) -> Profile:
        """A profile from the bytes of its file. Raises `ConfigError`."""
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"a profile is a JSON document, this is not: {error}") from error
        if not isinstance(document, Mapping) or "kvcodec_profile" not in document:
            raise ConfigError("no profile of kvcodec tune: it has no field kvcodec_profile")
        if document["kvcodec_profile"] != PROFILE_VERSION:
            raise ConfigError(
                f"a profile of version {document['kvcodec_profile']!r}; this kvcodec reads "
                f"{PROFILE_VERSION}"
            )
        model, points = document.get("model"), document.get("points")
        if not isinstance(model, Mapping) or not isinstance(points, list) or not points:
            raise ConfigError("the profile has no model or no points")
        geometry = {name: _positive(model.get(name), name) for name in _GEOMETRY}
        return cls(
            ProfileReference(digest=hashlib.sha256(data).digest(), **geometry),
            tuple(sorted(map(_point, points))),
        )

    def text(self, bits: float) -> str:
        """The spec of the largest point that takes at most `bits`. Raises `ConfigError` below the
        smallest.
        """
        fitting = [text for size, text in self.points if size <= bits]
        if not fitting:
            there = ", ".join(f"{size:g}" for size, _ in self.points)
            raise ConfigError(f"the profile has no point of at most {bits:g} bits; it has {there}")
        return fitting[-1]


def _positive(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"the profile's {name} is {value!r}, wanted a number from 1")
    return value


def _point(point: object) -> tuple[float, str]:
    bits = point.get("bits") if isinstance(point, Mapping) else None
    text = point.get("spec") if isinstance(point, Mapping) else None
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not isinstance(text, str):
        raise ConfigError("a point of the profile lacks its bits or its spec")
    return float(bits), text
