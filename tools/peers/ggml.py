"""ggml's block formats, which llama.cpp offers for its cache: the library itself, through ctypes.

pywhispercpp's wheel carries libggml; llama.cpp's own package has to be compiled first. bf16 becomes
float32 and back by ggml's functions, as its formats need it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.metadata import files
from typing import Any

import torch
from torch import Tensor

from peers.base import MissingPackageError, Origin, Stored, TensorPeer, bits_of, installed

_PACKAGE = "pywhispercpp"
#: Name -> numbers of a block, and its bytes.
FORMATS = {
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q4_0": (32, 18),
    "iq4_nl": (32, 18),
    "mxfp4": (32, 17),
    "nvfp4": (64, 36),
}


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """libggml-base and libggml-cpu, which needs it and a libgomp of the wheel's own."""
    installed(_PACKAGE)
    shipped = {file.name: str(file.locate()) for file in files(_PACKAGE) or []}
    loaded = {}
    for library in ("libgomp-", "libggml-base-", "libggml-cpu-"):
        paths = [path for name, path in shipped.items() if name.startswith(library)]
        if not paths:
            raise MissingPackageError(f"{_PACKAGE} carries no {library[:-1]} here")
        try:
            loaded[library] = ctypes.CDLL(paths[0], ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise MissingPackageError(f"{paths[0]} cannot be loaded: {error}") from error
    loaded["libggml-cpu-"].ggml_cpu_init()
    return loaded["libggml-base-"], loaded["libggml-cpu-"]


def _version() -> str:
    base = _libraries()[0]
    base.ggml_version.restype = ctypes.c_char_p
    return f"ggml {base.ggml_version().decode()} ({installed(_PACKAGE)})"


class Ggml(TensorPeer):
    """One format."""

    def __init__(self, name: str) -> None:
        origin = Origin(source="llama.cpp's cache types", package=_version())
        super().__init__(f"ggml {name}", origin)
        self.numbers, self.bytes = FORMATS[name]
        base, cpu = _libraries()
        self._widen, self._narrow = base.ggml_bf16_to_fp32_row, base.ggml_fp32_to_bf16_row
        self._quantize = getattr(cpu, f"quantize_row_{name}")
        self._dequantize = getattr(base, f"dequantize_row_{name}")
        for function in (self._widen, self._narrow, self._quantize, self._dequantize):
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
            function.restype = None

    def encode_tensor(self, tensor: Tensor, *, is_key: bool) -> Stored:
        """Blocks along the head."""
        del is_key
        count = tensor.numel()
        wide = torch.empty(count, dtype=torch.float32)
        self._widen(tensor.data_ptr(), wide.data_ptr(), count)
        stored = torch.empty(count // self.numbers * self.bytes, dtype=torch.uint8)
        self._quantize(wide.data_ptr(), stored.data_ptr(), count)
        return Stored((stored, tensor.shape), bits_of(stored))

    def decode_tensor(self, payload: Any, *, is_key: bool) -> Tensor:
        """bf16 again."""
        del is_key
        stored, shape = payload
        wide = torch.empty(shape, dtype=torch.float32)
        self._dequantize(stored.data_ptr(), wide.data_ptr(), wide.numel())
        narrow = torch.empty(shape, dtype=torch.bfloat16)
        self._narrow(wide.data_ptr(), narrow.data_ptr(), wide.numel())
        return narrow


def peers() -> list[Ggml]:
    """What llama.cpp takes as types of a cache, and two more of 4 bits."""
    return [Ggml(name) for name in FORMATS]
