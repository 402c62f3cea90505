"""What SGLang's hierarchical cache lacks on a CPU; test and demo support, inert beside CUDA.

Importing this package is cheap and imports neither torch nor SGLang: it happens at the start of
every interpreter of a server (see ``startup/sitecustomize.py``).
"""

from sglang_cpu_bridge.environment import extensions_path, server_environment, startup_path
from sglang_cpu_bridge.stand_ins import STAND_IN_NAMES, install_stand_ins

__all__ = [
    "STAND_IN_NAMES",
    "extensions_path",
    "install_stand_ins",
    "server_environment",
    "startup_path",
]
