"""Backends that move opaque bytes whole; they know no layout and no codec.

Each one is found by its URL scheme through the entry point group ``kvcodec.backends``, the same way
a third party's backend is.
"""

__all__: list[str] = []
