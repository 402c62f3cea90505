"""kvcodec and LMCache, both ways.

`Connector` is an L2 adapter of LMCache's server: verified, quantized pages on any store of
kvcodec's. `kvcodec.lmcache.server_module` is an extension of the same server that lends LMCache's
memory to kvcodec, as the store ``lmcache://``.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcodec.lmcache.connector import Connector

__all__ = ["Connector"]


def __getattr__(name: str) -> object:
    """Import what is asked for: the server module needs no codec."""
    if name == "Connector":
        from kvcodec.lmcache.connector import Connector

        return Connector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
