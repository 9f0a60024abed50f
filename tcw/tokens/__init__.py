"""Token pruning and merging: one method a file."""

ENGINE: tuple[str, ...] = ()  # modules here that are not methods
