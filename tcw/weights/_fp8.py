"""E4M3 in NumPy: float32 to FP8 bytes and back, and where the scales of a matrix lie.

E4M3 ("FN": finite, with NaN) has a sign, 4 bits of exponent with a bias of 7 and 3 bits of mantissa:

    e > 0   (-1)^s 2^(e-7) (1 + m/8)      2^-6 .. 448
    e = 0   (-1)^s 2^-6 (m/8)             0, 2^-9 .. 7·2^-9
    0x7F and 0xFF are NaN; there is no infinity

Micikevicius et al., FP8 Formats for Deep Learning, 2022, https://arxiv.org/abs/2209.05433, section 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

LARGEST = 448.0
BLOCK = 128  # rows and columns of a block that shares a scale
_BAND = 1 << 18  # weights that are worked on at once: what is in between stays in the cache


def _table() -> np.ndarray:
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    values = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    values[byte & 0x7F == 0x7F] = np.nan
    return np.where(byte & 0x80, -values, values).astype(np.float32)


VALUES = _table()  # float32 [256]: what each byte stands for
VALUES.flags.writeable = False


def to_e4m3(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest E4M3, ties to even; what lies beyond ±448 becomes ±448, a NaN stays one.

    Args:
        values: float32, any shape, contiguous.

    Returns:
        uint8 of that shape.
    """
    bits = values.view(np.uint32)
    size = bits & 0x7FFFFFFF
    # from 2^-6 on: drop 20 bits of mantissa, rounding to even, and take the bias from 127 to 7
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # below: 2^14 is so large that a sum with it is a multiple of 2^-9, and the processor rounds it to even
    small = (np.fmin(np.abs(values), np.float32(1)) + np.float32(2**14)).view(np.uint32) - 0x46800000
    codes = np.where(size < 121 << 23, small, np.minimum(normal, 0x7E))
    codes = np.where(size > 0x7F800000, 0x7F, codes)
    return (codes | ((bits >> 24) & 0x80)).astype(np.uint8)


@dataclass(frozen=True)
class Grid:
    """Where the scales of a matrix [rows, columns] lie: one a row ("channel"), one in all ("tensor"), one a "block"."""

    kind: str
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the scales."""
        if self.kind == "tensor":
            return (1,)
        return (self.rows, 1) if self.kind == "channel" else (-(-self.rows // BLOCK), -(-self.columns // BLOCK))

    def bands(self) -> Iterator[np.ndarray]:
        """Cut the rows into bands that share no block: ascending indices, int64."""
        height = max(1, _BAND // max(self.columns, 1) // BLOCK) * BLOCK
        for first in range(0, self.rows, height):
            yield np.arange(first, min(first + height, self.rows))

    def largest(self, values: np.ndarray, rows: np.ndarray, out: np.ndarray) -> None:
        """Raise `out`, float32 [*shape], to the largest absolute values of a band, float32 [len(rows), columns]."""
        sizes = np.abs(values)
        if self.kind == "tensor":
            out[0] = np.maximum(out[0], sizes.max(initial=0))
        elif self.kind == "channel":
            out[rows, 0] = sizes.max(axis=1, initial=0)
        elif sizes.size:
            down = np.maximum.reduceat(sizes, np.arange(0, len(rows), BLOCK), axis=0)
            out[rows[::BLOCK] // BLOCK] = np.maximum.reduceat(down, np.arange(0, self.columns, BLOCK), axis=1)

    def spread(self, scales: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """What to multiply some rows with, broadcasting to [len(rows), columns], from `scales` of this shape."""
        if self.kind == "tensor":
            return scales
        if self.kind == "channel":
            return scales[rows]
        return np.repeat(scales[rows // BLOCK], BLOCK, axis=1)[:, : self.columns]
