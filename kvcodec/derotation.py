"""Which sections may be stored with the rotation of their keys taken out, and what a page says of
it (FORMAT.md 3.7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvcodec.errors import ConfigError, CorruptPage
from kvcodec.extension import Extension
from kvcodec.layout import PageLayout, Role, Stream
from kvcodec.rotary import Rotary
from kvcodec.section import SectionCodec, Transform

__all__ = [
    "ROTARY_EXTENSION",
    "ROTATED_ROLES",
    "can_derotate",
    "check_derotation",
    "rotary_of_page",
    "settled_codecs",
]

#: The header extension that holds rotary parameters, and the streams that they are about.
ROTARY_EXTENSION = 2
ROTATED_ROLES = frozenset({Role.KEY, Role.ROPE})

_MAX_HEAD_SIZE = 256


def can_derotate(rotary: Rotary | None, stream: Stream) -> bool:
    """Whether the rows of a stream are known to hold the pairs of `rotary`."""
    if rotary is None or stream.role not in ROTATED_ROLES:
        return False
    return rotary.size <= stream.head_size <= _MAX_HEAD_SIZE


def settled_codecs(
    codecs: Sequence[SectionCodec], layout: PageLayout, rotary: Rotary | None
) -> tuple[SectionCodec, ...]:
    """One codec per section, without derotation where nothing is known to be taken out."""
    streams = layout.streams * layout.layer_count
    return tuple(
        replace(codec, transform=Transform.NONE)
        if codec.transform is Transform.DEROTATED and not can_derotate(rotary, stream)
        else codec
        for codec, stream in zip(codecs, streams, strict=True)
    )


def rotary_of_page(extensions: Sequence[Extension]) -> Rotary | None:
    """What the header of a page says of the rotation of its keys. `CorruptPage` if that is none."""
    for extension in extensions:
        if extension.type == ROTARY_EXTENSION:
            try:
                return Rotary.from_record(extension.data)
            except ConfigError as error:
                raise CorruptPage("extensions", str(error)) from error
    return None


def check_derotation(
    layout: PageLayout, codecs: Sequence[SectionCodec], extensions: Sequence[Extension]
) -> None:
    """Raise `CorruptPage` if an int section is derotated whose rotation the page does not know."""
    if not any(codec.transform is Transform.DEROTATED for codec in codecs):
        return
    rotary = rotary_of_page(extensions)
    for codec, stream in zip(codecs, layout.streams * layout.layer_count, strict=True):
        if codec.transform is Transform.DEROTATED and not can_derotate(rotary, stream):
            raise CorruptPage(
                "section", f"derotated {stream.role.text} rows whose rotation is not known"
            )
