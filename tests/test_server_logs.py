"""Log lines: one per event, parseable, whatever is in the message."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcodec_server.logs import Sparing, start_logging


@pytest.fixture(autouse=True)
def as_before():
    root = logging.getLogger()
    before = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:], root.level, logging.raiseExceptions = before


def logged(form, log, level=logging.INFO):
    stream = io.StringIO()
    start_logging(level, form, stream)
    log(logging.getLogger("kvcodec.test"))
    return stream.getvalue().splitlines()


def test_json_line():
    (line,) = logged("json", lambda log: log.info("%d pages", 3, extra={"op": "get"}))
    fields = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", fields.pop("time"))
    assert fields == {"level": "info", "logger": "kvcodec.test", "message": "3 pages", "op": "get"}


def test_text_line():
    (line,) = logged("text", lambda log: log.info("%d pages", 3, extra={"op": "get"}))
    assert re.fullmatch(r"\S+Z info kvcodec\.test: 3 pages op='get'", line)


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_any_message_is_one_json_line(text):
    (line,) = logged("json", lambda log: log.warning("%s", text))
    assert line.isascii()
    assert json.loads(line)["message"] == text[:4000]


def test_terminal_sequences_are_escaped_in_text():
    (line,) = logged("text", lambda log: log.warning("a\x1b[31m\nb"))
    assert line.endswith("a\\x1b[31m\\nb")


def test_exception_is_a_field():
    def log(logger):
        try:
            raise ValueError("broken")
        except ValueError:
            logger.exception("it failed")

    (line,) = logged("json", log)
    assert "ValueError: broken" in json.loads(line)["exception"]
    lines = logged("text", log)
    assert lines[0].endswith("it failed") and lines[-1] == "ValueError: broken"


def test_level_is_a_floor():
    def log(logger):
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logger.log(level, "x")

    assert len(logged("json", log, logging.DEBUG)) == 4
    assert len(logged("json", log, logging.ERROR)) == 1


def test_value_that_json_does_not_know_becomes_text():
    (line,) = logged("json", lambda log: log.info("x", extra={"path": {1, 2}.__class__}))
    assert json.loads(line)["path"] == "<class 'set'>"


def test_broken_stream_does_not_raise():
    stream = io.StringIO()
    start_logging(logging.INFO, "json", stream)
    stream.close()
    logging.getLogger("kvcodec.test").info("nobody hears this")


class TestLibraries:
    """What other libraries log is said once a minute; kvcodec's own lines always."""

    def lines(self, *records):
        sparing, lines = Sparing(), []
        for name, message, seconds in records:
            record = logging.LogRecord(name, logging.ERROR, "", 0, message, (), None)
            record.created = 1e9 + seconds
            if sparing.filter(record):
                lines.append((message, getattr(record, "left_out", 0)))
        return lines

    def test_the_same_again_is_left_out_and_counted(self):
        records = [("otel", "away %s", second) for second in range(130)]
        assert self.lines(*records) == [("away %s", 0), ("away %s", 59), ("away %s", 59)]

    def test_another_message_or_library_is_heard(self):
        records = [("otel", "a", 0), ("otel", "b", 1), ("grpc", "a", 2)]
        assert len(self.lines(*records)) == 3

    def test_own_lines_pass(self):
        assert len(self.lines(*[("kvcodec.x", "a", 0)] * 100)) == 100

    def test_memory_is_bounded(self):
        sparing = Sparing()
        for number in range(5000):
            sparing.filter(logging.LogRecord("x", 40, "", 0, f"message {number}", (), None))
        assert len(sparing._said) <= 1000
