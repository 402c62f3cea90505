"""The tree of errors: its picture, its fields, its labels."""

from __future__ import annotations

import inspect
import re

import pytest

import kvcodec.codec
from kvcodec import errors
from kvcodec.errors import (
    BackendTimeout,
    ConfigError,
    CorruptPage,
    KVCodecError,
    MismatchedPage,
    PageError,
    QualityBelowMinimum,
    UndecodedPage,
    UnsupportedPage,
)

CLASSES = {
    name: kind
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, Exception)
}


def drawn_tree() -> dict[str, set[str]]:
    """Class -> names of its bases, as the docstring draws it."""
    assert errors.__doc__ is not None
    path: list[str] = []
    tree = {}
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│ ├└─]*)(\w+)(?: \((\w+)\))?(?:  |$)", line)
        if match:
            depth = len(match[1]) // 4
            path = [*path[:depth], match[2]]
            tree[match[2]] = {path[-2] if depth else "Exception", *filter(None, [match[3]])}
    return tree


def test_tree_is_as_drawn():
    """The picture in the docstring shows every class with all of its bases."""
    real = {name: {base.__name__ for base in kind.__bases__} for name, kind in CLASSES.items()}
    assert drawn_tree() == real


def test_all_names_every_class():
    assert set(errors.__all__) == set(CLASSES)


def test_every_error_is_one_of_the_tree():
    """Whoever catches KVCodecError catches all that kvcodec raises on purpose."""
    assert all(issubclass(kind, KVCodecError) for kind in CLASSES.values())
    own = [kind for kind in vars(kvcodec.codec).values() if inspect.isclass(kind)]
    assert all(kind.__name__ in CLASSES for kind in own if issubclass(kind, Exception))


def test_builtin_bases():
    """Who knows no kvcodec catches ValueError for an option and TimeoutError for a deadline."""
    assert issubclass(ConfigError, ValueError)
    assert issubclass(BackendTimeout, TimeoutError)


@pytest.mark.parametrize(
    ("error", "reason", "message"),
    [
        (CorruptPage("magic", "no page"), "corrupt:magic", "no page"),
        (
            UnsupportedPage("version", 2, 1),
            "unsupported:version",
            "version: found 2, this reader supports 1",
        ),
        (
            MismatchedPage("model", "a", "b"),
            "mismatch:model",
            "model: found 'a', expected 'b'",
        ),
        (
            QualityBelowMinimum(4, 8),
            "quality:bits",
            "stored with 4 bits, the reader demands at least 8",
        ),
    ],
)
def test_page_errors_have_a_label_and_a_message(error: PageError, reason: str, message: str):
    assert error.reason == reason
    assert str(error) == message


def test_fields_tell_found_from_wanted():
    mismatch = MismatchedPage("key", "a", "b")
    assert (mismatch.what, mismatch.found, mismatch.expected) == ("key", "a", "b")
    unsupported = UnsupportedPage("version", 2, 1)
    assert (unsupported.found, unsupported.supported) == (2, 1)
    quality = QualityBelowMinimum(4, 8)
    assert (quality.found, quality.minimum) == (4, 8)


def test_a_deadline_is_no_damage():
    """A page that could not be decoded in time may be sound: whoever deletes damage must not see it
    as such.
    """
    timeout = UndecodedPage("deadline", "too late")
    assert not isinstance(timeout, CorruptPage)
    assert timeout.reason == "undecoded:deadline"
