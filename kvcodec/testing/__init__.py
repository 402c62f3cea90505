"""Test tools for people who write a backend: conformance suite and hypothesis strategies.

This package needs pytest and hypothesis; nothing else in kvcodec imports it.
"""

__all__: list[str] = []
