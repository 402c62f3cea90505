"""The environment variables under which SGLang runs on a CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path


def startup_path() -> Path:
    """The directory for ``PYTHONPATH`` that installs the stand-ins in each new interpreter."""
    return Path(__file__).with_name("startup")


def extensions_path() -> Path:
    """Where SGLang's page hash is compiled to: beside the interpreter, not in the user's cache.

    The build names the paths of its environment, so two environments that share a folder make
    each other compile again, some 20 s each time.
    """
    return Path(sys.prefix) / "torch_extensions"


def server_environment(
    base: Mapping[str, str] | None = None, *, tp_size: int = 1, with_mla: bool = False
) -> dict[str, str]:
    """The environment for ``python -m sglang.launch_server --device cpu``.

    Args:
        base: the environment to extend; the present one by default.
        tp_size: how many scheduler processes there will be; each is bound to its own core,
            counted modulo the cores of this machine.
        with_mla: let ``torch_native`` attention serve MLA models.
    """
    environment = dict(os.environ if base is None else base)
    old_path = environment.get("PYTHONPATH")
    paths = [str(startup_path()), *([old_path] if old_path else [])]
    core_count = os.cpu_count() or 1
    environment.update(
        PYTHONPATH=os.pathsep.join(paths),
        SGLANG_USE_CPU_ENGINE="1",
        SGLANG_CPU_OMP_THREADS_BIND="|".join(str(r % core_count) for r in range(tp_size)),
        # Two threads make each small parallel region of torch cost some 12 ms instead of 0.2 ms.
        OMP_NUM_THREADS="1",
        # Compiling for the first request takes 8 s, which a short-lived server never earns back.
        TORCHDYNAMO_DISABLE="1",
        GLOO_SOCKET_IFNAME="lo",
        TORCH_EXTENSIONS_DIR=str(extensions_path()),
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    if with_mla:
        environment["CPU_BRIDGE_MLA"] = "1"
    return environment
