"""All peers there are, and those that cannot run here, each with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peers import (
    bitsandbytes_peers,
    cachegen,
    casts,
    ggml,
    huggingface,
    kivi,
    kvtuner,
    lossless,
    nvfp4,
    turboquant,
)
from peers.base import MissingPackageError, Peer

#: In the order of tables.
FAMILIES: dict[str, Callable[[], Sequence[Peer]]] = {
    "KVTuner": kvtuner.peers,
    "KIVI": kivi.peers,
    "HF QuantizedCache": huggingface.peers,
    "fp8": casts.peers,
    "NVFP4": nvfp4.peers,
    "TurboQuant": turboquant.peers,
    "ggml": ggml.peers,
    "bitsandbytes": bitsandbytes_peers.peers,
    "CacheGen": cachegen.peers,
    "lossless": lossless.peers,
}

#: What is not measured, and why.
LEFT_OUT = {
    "KVTC": "no code was found; it needs a basis calibrated on the model",
    "nvCOMP ANS (FlexKV, TensorRT-LLM)": "runs on a GPU alone",
    "KVQuant, Palu, SVDq": "need calibration on the model",
    "GEAR, xKV": "look at many pages at once; a page is not decodable alone",
    "UCM's KVfold R200, R160": "its source was not found",
    "the kernels of KIVI, and of TurboQuant in vLLM and LMCache": (
        "run on a GPU alone; their numerics are re-implemented"
    ),
    "LMCache's kivi serde": "stores its input as it is",
}


def available() -> tuple[list[Peer], dict[str, str]]:
    """The peers that run here, and families whose packages are missing, with what is missing."""
    found: list[Peer] = []
    missing = {}
    for family, make in FAMILIES.items():
        try:
            found += make()
        except MissingPackageError as error:
            missing[family] = str(error)
    return found, missing


def codecs() -> list[Peer]:
    """For ``kvcodec eval --peer peers.registry:codecs``."""
    return available()[0]
