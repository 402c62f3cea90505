"""Messages and service of package ``kvcodec.v1``; tools/generate_proto.sh writes all but this."""

__all__: list[str] = []
