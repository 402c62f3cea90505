"""Where settings come from: flags, then environment, then a file, then defaults.

Each source is read into ``{name: Given}``, so that every value remembers who said it. A name that
nobody knows is an error that proposes the nearest one which exists.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from kvcodec.errors import ConfigError
from kvcodec_server.config import Configuration, Given, configured, setting_names

__all__ = [
    "CONFIG_VARIABLE",
    "MAX_FILE_BYTES",
    "VARIABLE_PREFIX",
    "gathered",
    "from_environment",
    "from_file",
    "from_flags",
    "variable_of",
]

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Two underscores, because Kubernetes gives every container variables such as KVCODEC_PORT for a
#: service that is called kvcodec.
VARIABLE_PREFIX = "KVCODEC__"
CONFIG_VARIABLE = "KVCODEC__CONFIG"
MAX_FILE_BYTES = 1 << 20

_MAX_LIST_ITEMS = 1000


def variable_of(name: str) -> str:
    """The environment variable of a setting: ``KVCODEC__SECTION__KEY``."""
    return VARIABLE_PREFIX + name.replace(".", "__").upper()


def gathered(
    words: Sequence[str], environment: Mapping[str, str], path: str | None = None
) -> Configuration:
    """The settings of a command line's remaining words, an environment and a file.

    Without a `path` the file is the one that ``KVCODEC__CONFIG`` names, if any. Raises
    `ConfigError`.
    """
    path = path or environment.get(CONFIG_VARIABLE) or None
    file = from_file(Path(path)) if path else {}
    return configured({**file, **from_environment(environment), **from_flags(words)})


def from_flags(words: Sequence[str]) -> dict[str, Given]:
    """``--section.key value`` and ``--section.key=value``; ``-`` may stand for ``_``."""
    given: dict[str, Given] = {}
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            raise ConfigError(
                f"{word!r} belongs to no setting; settings are given as --section.key"
            )
        name = _known(flag[2:].replace("-", "_"), flag, [f"--{each}" for each in setting_names()])
        if name in given:
            raise ConfigError(f"--{name} is given twice")
        if not equals:
            following = next(rest, None)
            if following is None:
                raise ConfigError(f"--{name} needs a value")
            value = following
        given[name] = Given(value, f"flag --{name}")
    return given


def from_environment(environment: Mapping[str, str]) -> dict[str, Given]:
    """``KVCODEC__SECTION__KEY=value``. An empty value is a value."""
    names = {variable_of(name): name for name in setting_names()}
    flat = {variable.replace("_", ""): variable for variable in names}
    given: dict[str, Given] = {}
    for variable, value in sorted(environment.items()):
        if variable in names:
            given[names[variable]] = Given(value, f"environment {variable}")
        elif variable.startswith(VARIABLE_PREFIX) and variable != CONFIG_VARIABLE:
            raise _unknown(f"environment variable {variable}", variable, names)
        elif variable.startswith("KVCODEC_") and variable.replace("_", "") in flat:
            # Meant for us, with an underscore too few: silence would be a setting ignored.
            meant = flat[variable.replace("_", "")]
            raise ConfigError(f"environment variable {variable} sets nothing: write {meant}")
    return given


def from_file(path: Path) -> dict[str, Given]:
    """The settings of a YAML, TOML or JSON file; its suffix says which it is."""
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise ConfigError(
            f"configuration file {str(path)!r}: wanted a name that ends in "
            f"{', '.join(sorted(_READERS))}"
        )
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(
                f"configuration file {str(path)!r} is longer than {MAX_FILE_BYTES} bytes"
            )
        tree = read(data.decode("utf-8"))
    except ConfigError:
        raise
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"configuration file {str(path)!r} cannot be read: {_line(error)}"
        ) from error
    return _flattened(tree, path)


def _flattened(tree: object, path: Path) -> dict[str, Given]:
    where = f"file {path}"
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: wanted sections such as store: and listen:")
    names = setting_names()
    sections = sorted({name.partition(".")[0] for name in names})
    given: dict[str, Given] = {}
    for section, keys in tree.items():
        if section not in sections:
            raise _unknown(f"{where}: section {_brief(section)}", str(section), sections)
        if keys is None:
            continue
        if not isinstance(keys, dict):
            raise ConfigError(f"{where}: {section} is a section; wanted its settings below it")
        for key, value in keys.items():
            name = _known(f"{section}.{key}", f"{where}: {_brief(f'{section}.{key}')}", names)
            if not _is_plain(value):
                raise ConfigError(f"{where}: {name}: wanted one value or a list of values")
            given[name] = Given("" if value is None else value, where)
    return given


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return len(value) <= _MAX_LIST_ITEMS and not any(
            isinstance(item, list | dict) for item in value
        )
    return not isinstance(value, dict)


def _known(name: str, shown: str, candidates: Sequence[str]) -> str:
    if name not in setting_names():
        raise _unknown(shown, shown.rpartition(" ")[2].strip("'"), candidates)
    return name


def _unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    choices = list(known)
    near = difflib.get_close_matches(name[:200], choices, n=2, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(choices)}"
    return ConfigError(f"{what} is unknown; {hint}")


def _brief(value: object) -> str:
    return repr(value)[:100]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read_yaml(text: str) -> object:
    _check_unique(yaml.compose(text, Loader=yaml.SafeLoader))
    return yaml.safe_load(text)


def _check_unique(node: yaml.Node | None, depth: int = 2) -> None:
    """YAML would silently keep the last of two equal keys. Settings lie two levels deep."""
    if not isinstance(node, yaml.MappingNode) or not depth:
        return
    seen: set[str] = set()
    for key, value in node.value:
        if str(key.value) in seen:
            raise ValueError(f"{key.value!r} appears twice")
        seen.add(str(key.value))
        _check_unique(value, depth - 1)


def _read_json(text: str) -> object:
    return json.loads(text, object_pairs_hook=_unique_pairs)


def _unique_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    for index, (key, _) in enumerate(pairs):
        if any(key == other for other, _ in pairs[:index]):
            raise ValueError(f"{key!r} appears twice")
    return dict(pairs)


_READERS = {
    ".json": _read_json,
    ".toml": tomllib.loads,
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
}
