"""The ``kvcodec`` command, for people who look at pages and stores from a shell."""

__all__: list[str] = []
