"""How one stream of one layer is encoded: a frozen value with a canonical text form."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace

from kvcodec.errors import ConfigError
from kvcodec.layout import MAX_HEAD_SIZE

__all__ = ["ECQ_BITS", "RAW", "Axis", "Kind", "SectionCodec", "Transform"]


class Kind(enum.IntEnum):
    """Kinds of section; the values are those of the page format."""

    RAW = 0
    INT = 1
    ECQ = 2  #: entropy-coded trellis quantization
    LOSSLESS = 3  #: entropy-coded exponents
    BLOCK = 4  #: exponents by block: lossless, larger and faster
    FP8 = 5  #: e4m3fn without scales: a plain cast

    @property
    def is_coded(self) -> bool:
        """Whether the size of a section depends on its data."""
        return Kind.ECQ <= self <= Kind.BLOCK


class Axis(enum.IntEnum):
    """Along what a group of elements runs; the values are KVTuner's `axis_key` and `axis_value`."""

    TOKEN = 0  #: elements of one token's row
    CHANNEL = 1  #: tokens of one channel


class Transform(enum.IntEnum):
    """What is done to the rows of an int section before they are quantized (FORMAT.md 3.12)."""

    NONE = 0
    DEROTATED = 1  #: keys turned back by their position in the page, where a page knows how
    HADAMARD = 2  #: sums and differences over a whole row


#: Bits of an `ecq` section are counted in sixteenths.
ECQ_BITS = range(24, 98)

_CODEC_TEXT = re.compile(
    r"int([248])(-channel)?(?:-(derotated|hadamard))?(-asym)?(?:-g([1-9]\d{0,9}))?", re.ASCII
)
_CODED_TEXT = re.compile(
    r"(?:ecq-(\d(?:\.\d{1,4})?)|lossless)(-channel)?|(lossless-fast)", re.ASCII
)


@dataclass(frozen=True, slots=True)
class SectionCodec:
    """How one stream of one layer is encoded.

    `group_size` elements share a scale; -1 is the whole row (or, per channel, all tokens of the
    page). A group never leaves its row or its page, so a larger number means the same as -1. The
    bits of `ecq` are nominal, what it takes for Gaussian data, in sixteenths.
    """

    kind: Kind = Kind.RAW
    bits: int = 0
    asymmetric: bool = False
    axis: Axis = Axis.TOKEN
    group_size: int = -1
    transform: Transform = Transform.NONE

    def __post_init__(self) -> None:
        self._check_transform()
        if self.kind is Kind.RAW:
            if (self.bits, self.asymmetric, self.axis, self.group_size) != (
                0,
                False,
                Axis.TOKEN,
                -1,
            ):
                raise ConfigError("a raw section has no bits, symmetry, axis or group")
            return
        if self.kind is Kind.FP8:
            if (self.bits, self.asymmetric, self.axis, self.group_size) != (8, False, 0, -1):
                raise ConfigError("an fp8 section has eight bits, but no symmetry, axis or group")
            return
        if self.kind.is_coded:
            if self.asymmetric or self.group_size != -1:
                raise ConfigError(f"a {self.text} section has no symmetry and no group")
            if self.kind is Kind.BLOCK and self.axis is not Axis.TOKEN:
                raise ConfigError(f"{self.text}: lossless-fast has no axis, lossless has one")
            if self.bits not in (ECQ_BITS if self.kind is Kind.ECQ else (0,)):
                raise ConfigError(
                    f"{self.bits / 16} bits; ecq takes {ECQ_BITS[0] / 16} to {ECQ_BITS[-1] / 16}, "
                    "and lossless takes none"
                )
            return
        if self.bits not in (2, 4, 8):
            raise ConfigError(
                f"int codec with {self.bits} bits; allowed are 2, 4 and 8 (16 is raw)"
            )
        if self.group_size != -1 and not 1 <= self.group_size <= MAX_HEAD_SIZE:
            raise ConfigError(
                f"group size {self.group_size}; allowed is 1 to {MAX_HEAD_SIZE}, or -1 for the "
                "whole row"
            )

    def _check_transform(self) -> None:
        if self.transform is Transform.NONE:
            return
        if self.kind is not Kind.INT:
            raise ConfigError(f"only int sections are {self.transform.name.lower()}")
        wanted = Axis.CHANNEL if self.transform is Transform.DEROTATED else Axis.TOKEN
        if self.axis is not wanted:
            raise ConfigError(
                f"{self.text}: {self.transform.name.lower()} rows have groups per "
                f"{wanted.name.lower()}"
            )

    @classmethod
    def integer(
        cls,
        bits: int,
        *,
        asymmetric: bool = False,
        axis: Axis = Axis.TOKEN,
        group_size: int = -1,
        transform: Transform = Transform.NONE,
    ) -> SectionCodec:
        """An int codec of 2, 4 or 8 bits."""
        return cls(Kind.INT, bits, asymmetric, axis, group_size, transform)

    @classmethod
    def parse(cls, text: str) -> SectionCodec:
        """``raw``, ``fp8``, ``int8-g128``, ``int4-channel-asym``, ``ecq-3``, ``lossless-channel``,
        ``lossless-fast``: inverse of `text`.
        """
        if text == "raw":
            return cls()
        if text == "fp8":
            return cls(Kind.FP8, 8)
        coded = _CODED_TEXT.fullmatch(text)
        if coded is not None:
            bits, channel, fast = coded.groups()
            kind = Kind.ECQ if bits else Kind.BLOCK if fast else Kind.LOSSLESS
            sixteenths = 16 * float(bits or 0)
            if sixteenths != int(sixteenths):
                raise ConfigError(f"codec {text!r}; bits are a multiple of 1/16")
            axis = Axis.CHANNEL if channel else Axis.TOKEN
            return cls(kind, int(sixteenths), axis=axis)
        match = _CODEC_TEXT.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"codec {text!r}; wanted raw, fp8, int{{2,4,8}}[-channel][-asym][-gN], "
                f"int{{2,4,8}}-channel-derotated[-asym][-gN], int{{2,4,8}}-hadamard[-asym][-gN], "
                f"ecq-BITS[-channel], lossless[-channel] or lossless-fast, "
                f"such as int4-g64 or ecq-3-channel"
            )
        bits, channel, transform, asym, group = match.groups()
        return cls.integer(
            int(bits),
            asymmetric=asym is not None,
            axis=Axis.CHANNEL if channel else Axis.TOKEN,
            group_size=int(group) if group else -1,
            transform=Transform[transform.upper()] if transform else Transform.NONE,
        )

    @property
    def text(self) -> str:
        """Canonical name."""
        if self.kind in (Kind.RAW, Kind.FP8):
            return self.kind.name.lower()
        channel = "-channel" if self.axis is Axis.CHANNEL else ""
        if self.kind is Kind.ECQ:
            return f"ecq-{self.bits / 16:g}{channel}"
        if self.kind.is_coded:
            return ("lossless" if self.kind is Kind.LOSSLESS else "lossless-fast") + channel
        return (
            f"int{self.bits}"
            + channel
            + (f"-{self.transform.name.lower()}" if self.transform else "")
            + ("-asym" if self.asymmetric else "")
            + (f"-g{self.group_size}" if self.group_size > 0 else "")
        )

    @property
    def nominal_bits(self) -> float | None:
        """Bits per element without metadata; None where nothing is lost."""
        if self.kind in (Kind.INT, Kind.FP8):
            return self.bits
        return self.bits / 16 if self.kind is Kind.ECQ else None

    def resolved(self, head_size: int, token_count: int) -> SectionCodec:
        """The same codec with the true number of elements in a group, as it stands in a page."""
        if self.kind is not Kind.INT:
            return self
        length = token_count if self.axis is Axis.CHANNEL else head_size
        return replace(
            self, group_size=length if self.group_size == -1 else min(self.group_size, length)
        )


RAW = SectionCodec()
