"""``python -m sglang_cpu_bridge.check`` imports SGLang as a server on this CPU would.

Also compiles SGLang's page hash, which would otherwise happen in the first server or test.
"""

from __future__ import annotations

import importlib
import os
import sys
from array import array

from sglang_cpu_bridge.environment import server_environment
from sglang_cpu_bridge.stand_ins import install_stand_ins


def main() -> int:
    """Returns 0 if the imports and the page hash work; raises otherwise."""
    os.environ.update(server_environment())
    install_stand_ins()
    from sglang.srt.mem_cache.pool_host import mha
    from sglang.srt.mem_cache.utils import get_hash_str
    from sglang.srt.plugins import load_plugins

    for module in ("sglang.srt.entrypoints.http_server", "sglang.srt.managers.scheduler"):
        importlib.import_module(module)
    load_plugins()
    if not hasattr(mha, "transfer_kv_per_layer"):
        print("sglang: the CPU transfer ops were not bound", file=sys.stderr)
        return 1
    page_hashes = get_hash_str(array("q", range(32)), None, page_size=16)
    if len(page_hashes) != 2:
        print(f"sglang: two pages have {len(page_hashes)} hashes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
