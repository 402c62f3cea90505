"""How the served model rotates its keys, for codecs that take the rotation out."""

from __future__ import annotations

import logging
from pathlib import Path

from kvcodec.rotary import CONFIG_FILE, Rotary, read_rotary
from kvcodec.sglang.options import AdapterOptions

__all__ = ["find_rotary"]

logger = logging.getLogger(__name__)


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
    rotary, reason = read_rotary(path)
    if rotary is None:
        logger.warning("kvcodec: keys keep their rotation: %s", reason)
    return rotary


def _config_of(model_name: str) -> Path | None:
    """Where the config of a model lies: in its folder, or in the cache of Hugging Face's hub."""
    folder = Path(model_name)
    if model_name and (folder / CONFIG_FILE).is_file():
        return folder
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        found = try_to_load_from_cache(model_name, CONFIG_FILE)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None
