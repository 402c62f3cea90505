"""Every error kvcodec raises, in one tree.

::

    KVCodecError
    ├── ConfigError (ValueError)     an option, URL or layout that cannot be honoured, at start-up
    ├── NativeError                  libkvcodec is missing, of another ABI, or lacks the forced ISA
    ├── PageError                    these bytes are not the page that was asked for: a miss
    │   ├── CorruptPage              damage: cut, flipped, padded, of impossible structure
    │   ├── UnsupportedPage          a newer version, or a feature this reader does not know
    │   ├── MismatchedPage           a whole page, but of another identity, key or layout
    │   ├── QualityBelowMinimum      a right page with fewer bits than the reader demands
    │   └── UndecodedPage            time or memory ran out first; the page may be perfectly sound
    └── BackendError                 the store failed; a missing object is not an error
        ├── BackendFull              no space, quota or inodes left
        ├── BackendReadOnly          the store cannot be written
        └── BackendTimeout (TimeoutError)   the deadline passed

Errors carry fields, not prose alone, so that the outermost adapter can count them apart.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BackendFull",
    "BackendReadOnly",
    "BackendTimeout",
    "ConfigError",
    "CorruptPage",
    "KVCodecError",
    "MismatchedPage",
    "NativeError",
    "PageError",
    "QualityBelowMinimum",
    "UndecodedPage",
    "UnsupportedPage",
]


class KVCodecError(Exception):
    """Root of the tree."""


class ConfigError(KVCodecError, ValueError):
    """An option that cannot be honoured. The message names the value, the limit and the way out."""


class NativeError(KVCodecError):
    """The native library cannot serve this process."""


class PageError(KVCodecError):
    """The bytes are not the page that was asked for.

    `reason` is a short stable label for counters, such as ``"corrupt:header_checksum"`` or
    ``"mismatch:dtype"``.
    """

    kind = "page"

    def __init__(self, what: str, message: str) -> None:
        super().__init__(message)
        self.what = what

    @property
    def reason(self) -> str:
        """`kind:what`: bounded in number, fit for a metric label."""
        return f"{self.kind}:{self.what}"


class CorruptPage(PageError):
    """The bytes break the format: damage, truncation, or not a page at all."""

    kind = "corrupt"


class UnsupportedPage(PageError):
    """The page asks for something this reader does not know."""

    kind = "unsupported"

    def __init__(self, what: str, found: object, supported: object) -> None:
        super().__init__(what, f"{what}: found {found}, this reader supports {supported}")
        self.found = found
        self.supported = supported


class MismatchedPage(PageError):
    """A sound page of something else than was asked for."""

    kind = "mismatch"

    def __init__(self, what: str, found: object, expected: object) -> None:
        super().__init__(what, f"{what}: found {found!r}, expected {expected!r}")
        self.found = found
        self.expected = expected


class QualityBelowMinimum(PageError):
    """The right page, stored with fewer bits than the reader demands."""

    kind = "quality"

    def __init__(self, found: int, minimum: int) -> None:
        super().__init__("bits", f"stored with {found} bits, the reader demands at least {minimum}")
        self.found = found
        self.minimum = minimum


class UndecodedPage(PageError):
    """Time or memory ran out before the page was decoded; it may be perfectly sound."""

    kind = "undecoded"


class BackendError(KVCodecError):
    """The store failed. `label` is a short stable name of the failure, for counters."""

    label = "error"


class BackendFull(BackendError):
    """No space, quota or inodes left; reads go on."""

    label = "full"


class BackendReadOnly(BackendError):
    """The store cannot be written; reads go on."""

    label = "read_only"


class BackendTimeout(BackendError, TimeoutError):
    """The deadline passed before the store answered."""

    label = "timeout"
