"""kvcodec: a self-describing, checksummed codec for KV-cache pages at rest.

The library is pure: it knows no network and no inference engine. ``kvcodec.sglang`` connects it to
SGLang's HiCache, ``kvcodec_backends`` holds the places where pages live.
"""

__all__: list[str] = []
