"""Results that outlive the process that found them: a file with a line for each."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from kvcodec.errors import ConfigError

__all__ = ["Journal"]


class Journal:
    """Name -> result, in a file that is written to with every result.

    The first line says what was asked for; a file begun for something else is refused, and so is
    one that another process writes to. A line that was cut off by the end of its writer is
    forgotten. Raises `ConfigError`.
    """

    def __init__(self, path: Path, inputs: Mapping[str, Any]) -> None:
        self._path = path
        wanted = json.loads(json.dumps(inputs))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"the state file {str(path)!r} cannot be written: {error}") from error
        try:
            self._results = self._begin(wanted)
        except BaseException:
            self._file.close()
            raise

    def _begin(self, wanted: dict[str, Any]) -> dict[str, Any]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"another process works on {str(self._path)!r}") from error
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            found, results = (lines[0]["inputs"] if lines else None), dict(lines[1:])
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{str(self._path)!r} is no state file: remove it") from error
        if found is not None and found != wanted:
            raise ConfigError(
                f"{str(self._path)!r} was begun with other inputs, {_difference(found, wanted)}: "
                "give the same ones to go on, or remove it to begin anew"
            )
        self._file.truncate(len(whole))
        if found is None:
            self._write({"inputs": wanted})
        return results

    def _write(self, line: object) -> None:
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def __contains__(self, name: str) -> bool:
        return name in self._results

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - what `put` was given
        return self._results[name]

    def put(self, name: str, result: object) -> None:
        """Keep a result, which is made of numbers, texts and lists."""
        self._write([name, result])
        self._results[name] = result

    def remove(self) -> None:
        """Delete the file: everything in it has gone elsewhere."""
        self._path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _difference(found: object, wanted: dict[str, Any]) -> str:
    if not isinstance(found, dict):
        return "which cannot be read"
    names = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    return "; ".join(f"{name} {found.get(name)!r}, now {wanted.get(name)!r}" for name in names)
