"""The protobuf messages of kvcodec: bytes in flight, a typed view of the header at rest."""

__all__: list[str] = []
