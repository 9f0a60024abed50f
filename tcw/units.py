"""Sizes for people: decimal units out (1 MB = 1,000,000 bytes), decimal or binary units in."""

import re

from tcw.errors import UsageError

_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")
_COUNTS = ("", "K", "M", "B", "T")
_FACTORS = {
    "": 1, "B": 1,
    **{f"{p}{b}": 1000 ** (i + 1) for i, p in enumerate("KMGTP") for b in ("", "B")},
    **{f"{p}I{b}": 1024 ** (i + 1) for i, p in enumerate("KMGTP") for b in ("", "B")},
}  # fmt: skip


def show_bytes(count: float) -> str:
    """Write a number of bytes with a decimal unit: `269.1 MB`; whole bytes below 1,000."""
    return _scaled(count, _BYTES)


def show_count(count: float) -> str:
    """Write a large count with a letter: `134.5 M`; whole numbers below 1,000."""
    return _scaled(count, _COUNTS)


def _scaled(count: float, units: tuple[str, ...]) -> str:
    size, unit = float(count), 0
    # what would be printed as 1000.0 belongs to the next unit
    while abs(size) >= (999.5 if unit == 0 else 999.95) and unit < len(units) - 1:
        size /= 1000
        unit += 1
    return f"{size:.0f} {units[0]}".rstrip() if unit == 0 else f"{size:.1f} {units[unit]}"


def show_seconds(seconds: float) -> str:
    """Write a duration: `45 ms`, `8.2 s`, `3 min 05 s`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def parse_size(text: str) -> int:
    """Read `200MB` (decimal), `4GiB` (binary), `1.5 gb` or plain bytes. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*", text)
    factor = _FACTORS.get(match.group(2).upper()) if match else None
    size = int(float(match.group(1)) * factor) if match and factor else 0
    if size <= 0:
        raise UsageError(f"cannot read `{text}` as a size", "write for example `200MB`, `4GiB` or `1.5GB`")
    return size
