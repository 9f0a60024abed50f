"""KV-cache policies: one policy a file."""

ENGINE: tuple[str, ...] = ()  # modules here that are not methods
