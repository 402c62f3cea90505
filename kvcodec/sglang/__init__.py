"""The door to SGLang: the plugin entry point and the HiCacheStorage adapter.

This is the only package of the project that may import sglang or torch, and it does so only when
SGLang asks for `KVCodecStorage`.
"""

__all__ = ["KVCodecStorage"]


def __getattr__(name: str) -> object:
    """`KVCodecStorage` on demand: its base class is SGLang's."""
    if name == "KVCodecStorage":
        from kvcodec.sglang.storage import KVCodecStorage

        return KVCodecStorage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
