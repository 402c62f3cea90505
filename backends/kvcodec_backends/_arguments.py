"""What every backend asks of its arguments, under the name that this package knows it by."""

from __future__ import annotations

from kvcodec.backend import (
    Deadline,
    checked_buffers,
    checked_names,
    checked_objects,
    closed_error,
)

__all__ = ["Deadline", "checked_buffers", "checked_names", "checked_objects", "closed_error"]
