"""The door to SGLang: the plugin entry point and the HiCacheStorage adapter.

This is the only package of the project that may import sglang or torch.
"""

__all__: list[str] = []
