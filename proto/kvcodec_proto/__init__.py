"""Bytes in flight: the sidecar's protobuf messages, in `v1`, and those of ``lmcache://``."""

__all__: list[str] = []
