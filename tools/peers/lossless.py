"""Compressors of bytes: zipnn, OpenZL and zstd, on the bytes of a whole page."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peers.base import Origin, Peer, Stored, installed


class BytesPeer(Peer):
    """Keys and values of a page, one behind the other, as 16-bit numbers."""

    is_lossless = True

    def encode(self, keys: Tensor, values: Tensor) -> Stored:
        """One object for the page."""
        page = torch.cat((keys.reshape(-1), values.reshape(-1))).view(torch.int16).numpy()
        stored = self.compress(page)
        return Stored((stored, keys.shape, values.shape), 8 * len(stored))

    def decode(self, payload: Any) -> tuple[Tensor, Tensor]:
        """The same bits, or the codec is broken."""
        stored, *shapes = payload
        page = torch.from_numpy(self.decompress(stored)).view(torch.bfloat16)
        count = shapes[0].numel()
        return page[:count].view(shapes[0]), page[count:].view(shapes[1])

    @abstractmethod
    def compress(self, page: np.ndarray) -> bytes:
        """int16 numbers (n,), as bytes."""

    @abstractmethod
    def decompress(self, stored: bytes) -> np.ndarray:
        """The numbers again."""


class ZipNN(BytesPeer):
    """Exponents by Huffman, one thread."""

    def __init__(self) -> None:
        origin = Origin(source="bytes of bfloat16, defaults", package=installed("zipnn"))
        super().__init__("zipnn", origin)
        import zipnn

        self._zipnn = zipnn.ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)

    def compress(self, page: np.ndarray) -> bytes:
        """It works in the memory it is given, so it gets its own."""
        return bytes(self._zipnn.compress(bytearray(page.tobytes())))

    def decompress(self, stored: bytes) -> np.ndarray:
        """As bytes, then as numbers."""
        return np.frombuffer(bytearray(self._zipnn.decompress(stored)), np.int16)


class OpenZL(BytesPeer):
    """Signs and fractions stored, exponents by its entropy coder."""

    def __init__(self) -> None:
        source = "BFloat16Deconstruct, Store, Entropy"
        super().__init__("OpenZL", Origin(source=source, package=installed("openzl")))
        import openzl.ext as zl

        self._zl = zl
        self._compressor = zl.Compressor()
        graph = zl.nodes.BFloat16Deconstruct()(
            self._compressor, sign_frac=zl.graphs.Store(), exponent=zl.graphs.Entropy()
        )
        self._compressor.select_starting_graph(graph)
        self._writer, self._reader = zl.CCtx(), zl.DCtx()

    def compress(self, page: np.ndarray) -> bytes:
        """A context forgets its parameters after each use."""
        self._writer.ref_compressor(self._compressor)
        self._writer.set_parameter(self._zl.CParam.FormatVersion, self._zl.MAX_FORMAT_VERSION)
        return self._writer.compress([self._zl.Input(self._zl.Type.Numeric, page.view(np.uint16))])

    def decompress(self, stored: bytes) -> np.ndarray:
        """A copy, because the result belongs to the context's object."""
        output = self._reader.decompress(stored)[0]
        return output.content.as_nparray().view(np.int16).copy()


class Zstd(BytesPeer):
    """The bytes as they are."""

    def __init__(self, level: int) -> None:
        origin = Origin(source="bytes as they are", package=installed("zstandard"))
        super().__init__(f"zstd -{level}", origin)
        import zstandard

        self._writer = zstandard.ZstdCompressor(level=level)
        self._reader = zstandard.ZstdDecompressor()

    def compress(self, page: np.ndarray) -> bytes:
        """One frame."""
        return self._writer.compress(page)

    def decompress(self, stored: bytes) -> np.ndarray:
        """A copy that may be written to."""
        return np.frombuffer(bytearray(self._reader.decompress(stored)), np.int16)


def peers() -> list[BytesPeer]:
    """Those that are installed; zstd at its fastest level and its default one."""
    return [ZipNN(), OpenZL(), Zstd(1), Zstd(3)]
