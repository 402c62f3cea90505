"""What the sidecar writes to stderr: one line per event, JSON for machines or text for people."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import TextIO

__all__ = ["JSONFormatter", "Sparing", "TextFormatter", "start_logging"]

#: What every record has by itself; the rest of it came as `extra`.
_OWN_FIELDS = frozenset(
    logging.LogRecord("", 0, "", 0, "", (), None).__dict__ | {"message": "", "asctime": ""}
)
_MAX_MESSAGE_CHARACTERS = 4000
_SPARED_SECONDS = 60.0
_MAX_KINDS = 1000
_MAX_KIND_CHARACTERS = 200


def _time_text(seconds: float) -> str:
    """RFC 3339 in UTC, to the millisecond."""
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{milliseconds:03d}Z"


def _extras(record: logging.LogRecord) -> dict[str, object]:
    return {name: value for name, value in vars(record).items() if name not in _OWN_FIELDS}


class JSONFormatter(logging.Formatter):
    """One JSON object per record: time, level, logger, message, then what was given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, ASCII only, so that no key or URL can break or colour it."""
        fields: dict[str, object] = {
            "time": _time_text(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_MAX_MESSAGE_CHARACTERS],
        }
        fields.update(_extras(record))
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(fields, default=str)


class TextFormatter(logging.Formatter):
    """``time level logger: message name=value``, with what is not printable escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; the lines of an exception follow it."""
        message = record.getMessage()[:_MAX_MESSAGE_CHARACTERS]
        if not message.isprintable():
            message = message.encode("unicode_escape").decode()
        words = [_time_text(record.created), record.levelname.lower(), f"{record.name}:", message]
        words += [f"{name}={value!r}" for name, value in _extras(record).items()]
        line = " ".join(words)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class Sparing(logging.Filter):
    """Lets a library say each thing once a minute, with the number of times in between.

    kvcodec's own loggers spare themselves, where they know what is worth a line.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[tuple[str, str], float] = {}
        self._left_out: dict[tuple[str, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Part of the interface of `logging`, which calls it with the handler's lock held."""
        if record.name.startswith("kvcodec"):
            return True
        kind = record.name, str(record.msg)[:_MAX_KIND_CHARACTERS]
        if record.created - self._said.get(kind, 0.0) < _SPARED_SECONDS:
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return False
        if len(self._said) >= _MAX_KINDS:
            self._said.clear()
            self._left_out.clear()
        self._said[kind] = record.created
        if left_out := self._left_out.pop(kind, 0):
            record.left_out = left_out
        return True


def start_logging(level: int, form: str, stream: TextIO | None = None) -> None:
    """Send every logger's records of at least `level` to stderr, in place of what was set up.

    `form` is ``json`` or ``text``. Calling again changes both.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JSONFormatter() if form == "json" else TextFormatter())
    handler.addFilter(Sparing())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # A closed stderr must not make a log line the reason of a failing call.
    logging.raiseExceptions = False
