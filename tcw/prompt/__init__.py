"""Prompt compression, text in and text out: one method a file."""

ENGINE: tuple[str, ...] = ()  # modules here that are not methods
