"""The SGLang plugin: makes ``--hicache-storage-backend kvcodec`` valid without touching a file.

SGLang runs `register` in each of its processes, through the entry-point group
``sglang.srt.plugins``. Four places need a hook: the choices of the command line, the registry of
storage backends, the construction of one, and the attachment to the cache controller.
"""

from __future__ import annotations

import logging
import pkgutil
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Protocol

from kvcodec.sglang.geometry import note_logical_dtype

if TYPE_CHECKING:
    from sglang.srt.plugins.hook_registry import HookType

__all__ = ["BACKEND_NAME", "TESTED_VERSIONS", "register"]

logger = logging.getLogger(__name__)

BACKEND_NAME = "kvcodec"
#: The oldest and the newest release of SGLang that this was tried with.
TESTED_VERSIONS = ("0.5.11", "0.5.23")

_ADD_CLI_ARGS = "sglang.srt.server_args.ServerArgs.add_cli_args"
_FACTORY = "sglang.srt.mem_cache.storage.backend_factory.StorageBackendFactory"
_CREATE = f"{_FACTORY}._create_builtin_backend"
_ATTACH = "sglang.srt.managers.cache_controller.HiCacheController.attach_storage_backend"
#: Where the extra configuration is parsed; it moved, and for some releases there were several.
_CACHE = "sglang.srt.mem_cache"
_PARSE = "parse_storage_backend_extra_config"
_PARSERS = (
    f"{_CACHE}.hybrid_cache.hybrid_cache_controller.HybridCacheController.{_PARSE}",
    f"{_CACHE}.hiradix_cache.HiRadixCache._{_PARSE}",
    f"{_CACHE}.hi_mamba_radix_cache.HiMambaRadixCache._{_PARSE}",
)

_WAY_OUT = (
    "the way out is --hicache-storage-backend dynamic with module_path 'kvcodec.sglang', "
    "class_name 'KVCodecStorage', backend_name 'kvcodec' and interface_v1 1 in "
    "--hicache-storage-backend-extra-config"
)


class _Controller(Protocol):
    """What is used of SGLang's HiCacheController."""

    mem_pool_device: object
    mem_pool_host: object
    storage_backend_type: str | None
    page_get_func: object
    page_set_func: object


def register() -> None:
    """Entry point. Never raises: SGLang would skip the plugin and call the option invalid."""
    found = _sglang_version()
    trouble = [text for text in (_trouble(_ADD_CLI_ARGS), _trouble(_CREATE)) if text]
    if trouble:
        logger.error(
            "kvcodec cannot add itself to SGLang %s (tried with %s to %s): %s; %s",
            found,
            *TESTED_VERSIONS,
            "; ".join(trouble),
            _WAY_OUT,
        )
        return
    if not _is_tested(found):
        logger.warning(
            "kvcodec was tried with SGLang %s to %s, this is %s; if it does not work, %s",
            *TESTED_VERSIONS,
            found,
            _WAY_OUT,
        )
    _register_hooks()


def _register_hooks() -> None:
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory
    from sglang.srt.plugins.hook_registry import HookType

    StorageBackendFactory.register_backend(BACKEND_NAME, "kvcodec.sglang.storage", "KVCodecStorage")
    _hook(_ADD_CLI_ARGS, _add_choice, HookType.AFTER)
    _hook(_CREATE, _create, HookType.AROUND)
    trouble = _trouble(_ATTACH)
    if trouble:
        logger.warning(
            "kvcodec: %s; pages are copied once more, and the kind of fp8 in a pool is not known",
            trouble,
        )
    else:
        _hook(_ATTACH, _attach, HookType.AROUND)
    for place in _PARSERS:
        if not _trouble(place):
            _hook(place, _tell_prefix_keys, HookType.AFTER)


def _hook(place: str, hook: Callable[..., object], kind: HookType) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.register(place, hook, kind)


def _trouble(place: str) -> str:
    """Why a dotted name cannot be had, empty if it can."""
    try:
        pkgutil.resolve_name(place)
    # Importing a module of another release, or for another device, may end in any way.
    except Exception as error:  # noqa: BLE001
        return f"no {place} ({type(error).__name__}: {error})"
    return ""


def _sglang_version() -> str:
    try:
        return version("sglang")
    except PackageNotFoundError:
        return "of unknown version"


def _is_tested(found: str) -> bool:
    """Compares the three numbers; what follows them (post1, rc0) does not matter."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(".")[:3] if part.isdecimal())

    oldest, newest = (numbers(text) for text in TESTED_VERSIONS)
    return oldest <= numbers(found) <= newest


def _add_choice(_result: object, parser: ArgumentParser, *_: object, **__: object) -> None:
    """After ServerArgs.add_cli_args: the option takes our name too."""
    for action in parser._actions:
        if action.dest == "hicache_storage_backend" and action.choices is not None:
            choices = list(action.choices)
            if BACKEND_NAME not in choices:
                action.choices = [*choices, BACKEND_NAME]


def _create(
    original: Callable[..., object],
    factory: type,
    backend_name: str,
    backend_class: Callable[[object, object], object],
    storage_config: object,
    mem_pool_host: object,
) -> object:
    """Around the factory's construction, which knows SGLang's own names only."""
    if backend_name == BACKEND_NAME:
        return backend_class(storage_config, mem_pool_host)
    return original(factory, backend_name, backend_class, storage_config, mem_pool_host)


def _attach(
    original: Callable[..., object], controller: _Controller, *args: object, **kwargs: object
) -> object:
    """Around the attachment: note beforehand what each pool's elements mean, because host pools
    hold fp8 as plain bytes; afterwards let pages be read and written in place.
    """
    try:
        _note_dtypes(controller)
    # Another backend's attachment must not fail because of us; ours then finds plain bytes.
    except Exception as error:  # noqa: BLE001
        logger.warning("kvcodec: what the pools hold could not be seen: %r", error)
    result = original(controller, *args, **kwargs)
    if controller.storage_backend_type == BACKEND_NAME:
        get = getattr(controller, "_page_get_zero_copy", None)
        put = getattr(controller, "_page_set_zero_copy", None)
        if get is not None and put is not None:
            controller.page_get_func, controller.page_set_func = get, put
    return result


def _note_dtypes(controller: _Controller) -> None:
    anchor = getattr(controller, "storage_host_pool", controller.mem_pool_host)
    note_logical_dtype(anchor, controller.mem_pool_device)
    for entry in getattr(controller.mem_pool_host, "entries", None) or ():
        note_logical_dtype(entry.host_pool, getattr(entry, "device_pool", None))


def _tell_prefix_keys(result: object, *_: object, **__: object) -> None:
    """After the parsing of the extra configuration, which takes out whether pages come with the
    keys before them: who asks for sink_tokens has to know.
    """
    if not isinstance(result, tuple) or not result or not isinstance(result[0], Mapping):
        return
    extra, passes = result[0], result[-1]
    if isinstance(extra, dict) and "sink_tokens" in extra and isinstance(passes, bool):
        extra["hicache_storage_pass_prefix_keys"] = passes
