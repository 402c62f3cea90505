"""This project's own codec as the laboratory sees it: real pages, made and read by the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kvcodec.codec import Codec
from kvcodec.errors import ConfigError
from kvcodec.eval.protocol import RoundTrip
from kvcodec.format import EncodedPage, pad64
from kvcodec.identity import Identity, Namespace
from kvcodec.layout import DType, PageLayout, PageViews
from kvcodec.plan import PagePlan, check_spec
from kvcodec.rotary import Rotary
from kvcodec.spec import CodecSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SpecCodec"]

_KEY = "0" * 64  # as long as the keys of an engine, which are digests
_BATCH = 8  # pages encoded at a time


class SpecCodec:
    """A spec, measured in the bytes of its pages: headers, keys, checksums and padding included.

    `rotary` is how the model rotates its keys, for specs that can use it.
    """

    def __init__(
        self, text: str | CodecSpec, codec: Codec, name: str = "", rotary: Rotary | None = None
    ) -> None:
        self.spec = CodecSpec.load(text) if isinstance(text, str) else text
        self.name = name or (text if isinstance(text, str) else text.text)
        self._codec, self._rotary = codec, rotary

    def roundtrip_pages(self, keys: Tensor, values: Tensor) -> RoundTrip:
        """Encode every page, decode it into other memory, and count the bytes in between."""
        import torch

        kinds = {torch.bfloat16: DType.BF16, torch.float16: DType.FP16, torch.float32: DType.FP32}
        layout = PageLayout.mha(
            dtype=kinds[keys.dtype],
            token_count=keys.shape[3],
            layer_count=keys.shape[1],
            head_count=keys.shape[2],
            head_size=keys.shape[4],
            value_head_size=values.shape[4],
        )
        check_spec(self.spec, layout, 0)
        if self.spec.profile is not None:
            self.spec.profile.check(layout, is_whole=True)
        namespace = Namespace(Identity.of(model="eval"), layout)
        plan = PagePlan.for_spec(namespace, self.spec, len(_KEY), self._rotary)
        arrays = [_bits(keys), _bits(values)]
        decoded = [np.empty_like(array) for array in arrays]
        stored, sections = 0, np.zeros(layout.section_count, np.int64)
        for start in range(0, len(keys), _BATCH):
            batch = slice(start, start + _BATCH)
            raw, back = ([array[batch] for array in side] for side in (arrays, decoded))
            for page in self._pass(namespace, plan, raw, back):
                stored += len(page)
                sections += list(map(pad64, EncodedPage.parse(page.data).header.stored_bytes))
        found = [
            torch.from_numpy(array).view(tensor.dtype)
            for array, tensor in zip(decoded, (keys, values), strict=True)
        ]
        return RoundTrip(found[0], found[1], 8.0 * stored, sections.tolist())

    def _pass(
        self,
        namespace: Namespace,
        plan: PagePlan,
        raw: list[npt.NDArray[np.generic]],
        decoded: list[npt.NDArray[np.generic]],
    ) -> list[npt.NDArray[np.uint8]]:
        """The encoded pages."""
        page_keys = [_KEY.encode()] * len(raw[0])
        pages = [np.zeros(plan.page_bytes, np.uint8) for _ in page_keys]
        encoded = self._codec.encode_into(
            plan, page_keys, PageViews.of_arrays(plan.layout, raw), pages
        )
        if encoded.nonfinite_groups.any():
            raise ConfigError(
                f"{self.name}: the cache holds values that are not finite, so it would be kept raw"
            )
        sizes = encoded.page_bytes.tolist()
        pages = [page[:size] for page, size in zip(pages, sizes, strict=True)]
        problems = self._codec.decode_into(
            namespace, plan, page_keys, pages, PageViews.of_arrays(plan.layout, decoded)
        )
        for problem in problems:
            if problem is not None:
                raise problem
        return pages


def _bits(tensor: Tensor) -> npt.NDArray[np.generic]:
    """The numbers of a tensor as numpy holds them: bf16, which it lacks, as its 16 bits."""
    import torch

    whole = tensor.contiguous()
    array: npt.NDArray[np.generic] = whole.view(
        torch.int16 if whole.itemsize == 2 else torch.int32
    ).numpy()
    return array
