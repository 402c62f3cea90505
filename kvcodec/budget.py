"""Rate control: the fewest bits taken from a page that make it fit a byte budget.

Coded sections have the length that their data make of them, so a store whose slots have one size
needs somebody who tries. Every `ecq` section of a spec loses the same number of sixteenths of a
bit, down to a floor: layers, keys and values keep the distance that the spec puts between them, and
to take the same from all costs the least, because each bit costs each section a factor of four in
its squared error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from kvcodec.errors import ConfigError
from kvcodec.format import pad64
from kvcodec.identity import Namespace
from kvcodec.layout import PageLayout
from kvcodec.plan import PagePlan
from kvcodec.section import ECQ_BITS, Kind, SectionCodec
from kvcodec.spec import CodecSpec

__all__ = ["Ladder", "Search", "check_budget"]

_KEY_BYTES = 64
#: Encodings of a page that trust the prediction; those after them halve what is left. Real pages
#: need one or two.
_PREDICTIONS = 3
#: A page that fits is good enough then, however many bits it could still have.
_MOST_ENCODINGS = 8
#: Steps that a page may miss of the finest that fits, for which it is not encoded again.
_SLACK_STEPS = 2


class Ladder:
    """The codecs of a page's sections at every step: step 0 is the spec itself, each further one
    takes a sixteenth of a bit from every `ecq` section that is above the floor.
    """

    def __init__(
        self, layout: PageLayout, codecs: Sequence[SectionCodec], minimum_bits: int = 0
    ) -> None:
        """`minimum_bits` is the floor; without it, the fewest bits that `ecq` has."""
        self._codecs = tuple(codecs)
        self._floor = max(ECQ_BITS[0], 16 * minimum_bits)
        ecq = [codec.bits for codec in codecs if codec.kind is Kind.ECQ]
        self.last_step = max(0, max(ecq, default=0) - self._floor)
        streams = layout.streams * layout.layer_count
        #: Bytes of the `ecq` sections at each step, as far as their nominal bits tell.
        self.nominal_bytes: npt.NDArray[np.float64] = np.array(
            [
                sum(
                    stream.head_count * stream.head_size * layout.token_count * codec.bits / 128
                    for stream, codec in zip(streams, self.codecs(step), strict=True)
                    if codec.kind is Kind.ECQ
                )
                for step in range(self.last_step + 1)
            ]
        )

    def codecs(self, step: int) -> tuple[SectionCodec, ...]:
        """The codec of every section at a step."""
        return tuple(
            replace(codec, bits=max(min(codec.bits, self._floor), codec.bits - step))
            if codec.kind is Kind.ECQ
            else codec
            for codec in self._codecs
        )

    def predicted_step(self, step: int, page_bytes: int, limit_bytes: int) -> int:
        """The finest step at which a page should fit that had `page_bytes` at `step`."""
        room = self.nominal_bytes[step] - page_bytes + limit_bytes
        # Nominal sizes fall from step to step.
        return min(int(np.count_nonzero(self.nominal_bytes > room)), self.last_step)


class Search:
    """Looks for the step of one page. `step` is what it is to be encoded with next."""

    def __init__(self, ladder: Ladder, limit_bytes: int, first_step: int) -> None:
        self._ladder = ladder
        self._limit = limit_bytes
        self._low = 0  # the finest step that is not known to be too large
        self._fitting: int | None = None
        self.encodings = 0
        self.step = first_step

    def judge(self, page_bytes: int) -> bool | None:
        """The page took so many bytes at `step`: True to keep it, False if it fits at no step, None
        to encode it again, at another one.
        """
        self.encodings += 1
        last = self._ladder.last_step
        guess = self._ladder.predicted_step(self.step, page_bytes, self._limit)
        if page_bytes <= self._limit:
            self._fitting = self.step
            finer = max(guess, self._low)
            if self.step - finer < _SLACK_STEPS or self.encodings >= _MOST_ENCODINGS:
                # The next page is like this one, and starts where this one might have fitted.
                self.step = min(self.step, finer)
                return True
        elif self.step == last:
            return False
        else:
            self._low = self.step + 1
        highest = last if self._fitting is None else self._fitting
        if self.encodings < _PREDICTIONS:
            self.step = min(max(guess, self._low), highest)
        elif self.encodings < _MOST_ENCODINGS:
            self.step = (self._low + highest) // 2
        else:
            self.step = highest
        return None


def check_budget(
    spec: CodecSpec, namespace: Namespace, *, limit_bytes: int, minimum_bits: int = 0
) -> None:
    """Raise `ConfigError` where no page of ordinary values encoded by `spec` can have so few bytes,
    whatever bits are taken from it.
    """
    layout = namespace.layout
    codecs = spec.section_codecs(layout)
    plan = PagePlan.build(namespace, codecs, _KEY_BYTES)
    ladder = Ladder(layout, codecs, minimum_bits)
    least = len(plan.header) + int(ladder.nominal_bytes[-1])
    for codec, size in zip(codecs, plan.stored_bytes.tolist(), strict=True):
        if codec.kind is not Kind.ECQ:
            least += pad64(1 if codec.kind.is_coded else size)
    if least <= limit_bytes:
        return
    ways = ["raise it"]
    how = "takes at least"
    bits = [codec.bits for codec in ladder.codecs(ladder.last_step) if codec.kind is Kind.ECQ]
    if bits:
        how = f"with its ecq sections at {min(bits) / 16:g} bits takes about"
        if min(bits) > ECQ_BITS[0]:
            ways.append("lower minimum_bits")
    elif layout.dtype.is_quantizable:
        ways.append("use an ecq codec, whose bits can follow the budget")
    raise ConfigError(
        f"max_page_bytes is {limit_bytes}, but a page of {layout.raw_bytes} raw bytes in "
        f"{spec.text!r} {how} {least}: {', '.join([*ways, 'or use pages of fewer tokens'])}"
    )
