"""The sidecar process that serves pages over gRPC, so that engines need no codec of their own."""

__all__: list[str] = []
