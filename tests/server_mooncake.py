"""A real Mooncake master for tests, a process that lends it memory, and how to reach both."""

from __future__ import annotations

import os
import sys

from real_server import STORES, RealServer, answers_on, free_port, need

__all__ = ["ENVIRONMENT", "MooncakeMaster", "mooncake_provider", "use_mooncake"]

FOLDER = STORES / "mooncake"
#: Bytes pass through TCP, also between processes of one machine, and on its loopback alone.
ENVIRONMENT = {"MC_STORE_MEMCPY": "0", "MC_TCP_BIND_ADDRESS": "127.0.0.1", "MC_LOG_LEVEL": "ERROR"}

_PROVIDE = """
import sys, threading
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
code = store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[2]), 0, "tcp", "", sys.argv[1])
assert code == 0, code
print("lends", flush=True)
threading.Event().wait()
"""


def use_mooncake() -> None:
    """Let this process import Mooncake's client, as SGLang's backend does."""
    need(FOLDER / "mooncake" / "mooncake_master")
    os.environ.update(ENVIRONMENT)
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


class MooncakeMaster(RealServer):
    """mooncake_master: knows which objects there are and in whose memory, and has none itself."""

    def __init__(self, *options: str) -> None:
        self.port, metrics_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.url = (
            f"hicache+mooncake://?master_server_address={self.address}&local_hostname=127.0.0.1"
            "&metadata_server=P2PHANDSHAKE&protocol=tcp&global_segment_size=0"
        )
        command = [need(FOLDER / "mooncake" / "mooncake_master"), "-rpc_address", "127.0.0.1"]
        command += ["-rpc_port", str(self.port), "-metrics_host", "127.0.0.1"]
        super().__init__(
            [*command, "-metrics_port", str(metrics_port), *options],
            ready=answers_on(self.port),
            environment=ENVIRONMENT,
            start_seconds=20,
        )


def mooncake_provider(master: MooncakeMaster, size: int = 512 << 20) -> RealServer:
    """A process that lends `size` bytes of its memory to the objects of a master."""
    provider = RealServer(
        [sys.executable, "-c", _PROVIDE, master.address, str(size)],
        ready=lambda: "lends" in provider.log(),
        environment=ENVIRONMENT | {"PYTHONPATH": str(FOLDER)},
    )
    return provider
