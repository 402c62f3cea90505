"""How the served model rotates its keys, for codecs that take the rotation out."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from kvcodec.errors import ConfigError
from kvcodec.rotary import Rotary, rotary_of_config
from kvcodec.sglang.options import AdapterOptions

__all__ = ["find_rotary"]

logger = logging.getLogger(__name__)

_FILE = "config.json"


def find_rotary(options: AdapterOptions, model_name: str) -> Rotary | None:
    """What `options.rotary` names: a model's config, the one of `model_name` (``auto``), or none.

    Raises `ConfigError` for a path that cannot be read. A model whose config is not on this
    machine, or says nothing that holds for every token, is a line in the log: its keys are stored
    as they are.
    """
    if options.rotary == "off" or not options.can_derotate:
        return None
    path = _config_of(model_name) if options.rotary == "auto" else Path(options.rotary)
    if path is None:
        logger.warning(
            "kvcodec: keys keep their rotation, because the config of %r is not on this machine; "
            "'rotary' may name a config.json",
            model_name,
        )
        return None
    path = path / _FILE if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"rotary: {path} is no model's config ({error}); name a config.json, 'auto' or 'off'"
        ) from error
    if not isinstance(config, dict):
        raise ConfigError(f"rotary: {path} holds a {type(config).__name__}, wanted an object")
    rotary, reason = rotary_of_config(config)
    if rotary is None:
        logger.warning("kvcodec: keys keep their rotation: %s", reason)
    return rotary


def _config_of(model_name: str) -> Path | None:
    """Where the config of a model lies: in its folder, or in the cache of Hugging Face's hub."""
    folder = Path(model_name)
    if model_name and (folder / _FILE).is_file():
        return folder
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(model_name, _FILE)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
