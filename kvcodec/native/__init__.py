"""libkvcodec, the C library that encodes and decodes pages, and its ctypes loader."""

__all__: list[str] = []
