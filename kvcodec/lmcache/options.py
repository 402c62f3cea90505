"""The options in ``adapter_params``, read once, strictly."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields

from kvcodec.errors import ConfigError
from kvcodec.lmcache.chunks import ChunkShape
from kvcodec.spec import SPEC_OPTIONS, CodecSpec
from kvcodec.store import StoreOptions

__all__ = ["KNOWN_OPTIONS", "ConnectorOptions"]

_STORE_OPTIONS = frozenset(field.name for field in fields(StoreOptions))
_OWN_OPTIONS = frozenset({"url", "layout", "layouts", "namespace", "revision", "workers"})

KNOWN_OPTIONS = _OWN_OPTIONS | SPEC_OPTIONS | _STORE_OPTIONS

_MAX_WORKERS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorOptions:
    """What the user asked for. `shapes` has the shape of the objects of each object group."""

    url: str
    shapes: Mapping[int, ChunkShape]
    spec: CodecSpec
    store: StoreOptions
    namespace: str = ""
    revision: str = ""
    workers: int = 2

    @classmethod
    def parse(cls, params: Mapping[str, object]) -> ConnectorOptions:
        """Options from ``adapter_params``. Raises `ConfigError`."""
        for name in params:
            if name not in KNOWN_OPTIONS:
                near = difflib.get_close_matches(name, sorted(KNOWN_OPTIONS), n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else f"known are {_listing()}"
                raise ConfigError(f"unknown option {name!r} in adapter_params: {hint}")
        workers = params.get("workers", 2)
        if (
            isinstance(workers, bool)
            or not isinstance(workers, int)
            or not 1 <= workers <= _MAX_WORKERS
        ):
            raise ConfigError(f"workers is {workers!r}, allowed is 1 to {_MAX_WORKERS}")
        url = _text(params, "url")
        if not url:
            raise ConfigError("kvcodec needs to know where to keep pages: give 'url'")
        return cls(
            url=url,
            shapes=_shapes(params),
            spec=CodecSpec.from_options(_subset(params, SPEC_OPTIONS)),
            store=StoreOptions.parse(_subset(params, _STORE_OPTIONS)),
            namespace=_text(params, "namespace"),
            revision=_text(params, "revision"),
            workers=workers,
        )


def _listing() -> str:
    return ", ".join(sorted(KNOWN_OPTIONS))


def _subset(params: Mapping[str, object], names: frozenset[str]) -> dict[str, object]:
    return {name: value for name, value in params.items() if name in names}


def _text(params: Mapping[str, object], name: str) -> str:
    value = params.get(name, "")
    if not isinstance(value, str):
        raise ConfigError(f"{name} is {value!r}, wanted a text")
    return value


def _shapes(params: Mapping[str, object]) -> dict[int, ChunkShape]:
    if ("layout" in params) == ("layouts" in params):
        raise ConfigError(
            "LMCache does not tell an adapter the shape of its objects: give 'layout', or "
            "'layouts' with one for each object group of a hybrid model"
        )
    if "layout" in params:
        return {0: ChunkShape.parse(params["layout"], "layout")}  # type: ignore[arg-type]
    layouts = params["layouts"]
    if not isinstance(layouts, Mapping) or not layouts:
        raise ConfigError(f'layouts is {layouts!r}, wanted {{"0": {{...}}, "1": {{...}}}}')
    shapes = {}
    for group, layout in layouts.items():
        if not isinstance(group, str) or not group.isascii() or not group.isdecimal():
            raise ConfigError(f"layouts has the object group {group!r}, wanted a number")
        shapes[int(group)] = ChunkShape.parse(layout, f"layouts[{group}]")
    return shapes
