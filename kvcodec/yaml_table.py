"""A YAML file as a user wrote it, read strictly."""

from __future__ import annotations

from pathlib import Path

import yaml

from kvcodec.errors import ConfigError

__all__ = ["read_table"]


def read_table(path: Path) -> object:
    """What the file holds. Raises `ConfigError` if it cannot be read, or names something twice."""
    try:
        text = path.read_text(encoding="utf-8")
        _check_unique(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except ConfigError:
        raise
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"per_layer_config_path {str(path)!r} cannot be read: {error}") from error


def _check_unique(node: yaml.Node | None) -> None:
    """Refuse a mapping with a key that appears twice; YAML would silently keep the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if key.value in seen:
            raise ConfigError(f"{key.value!r} appears twice in the layer table")
        seen.add(str(key.value))
        _check_unique(value)
