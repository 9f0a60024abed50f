"""Codes of 1 to 8 bits back to weights, compiled: a model that stays quantised does this at every token."""

import numpy as np

from tcw.codecs.compiled import kernel, readonly
from tcw.tensor import TensorInfo
from tcw.weights._integer import Fit, Grid


def decode_rows(packed: np.ndarray, fit: Fit, grid: Grid, info: TensorInfo) -> np.ndarray:
    """Bytes uint8 [rows, in · itemsize] of rows whose codes are `packed` int32 [rows, words].

    Parts must have been checked: this reads as many codes as `info` has columns.
    """
    width = info.shape[1]
    out = np.empty((len(packed), width), np.uint32 if info.dtype != "BF16" else np.uint16)
    words = readonly(packed).view(np.uint32)
    _decode(words, readonly(fit.scale), readonly(fit.zero), grid.span(width), grid.bits, grid.kind == "float", out)
    if info.dtype == "F16":
        with np.errstate(over="ignore"):
            return out.view(np.float32).astype(np.float16).view(np.uint8)
    return out.view(np.uint8)


@kernel
def _decode(words, scale, zero, span, bits, free, out):  # type: ignore[no-untyped-def]
    """Fill `out` with BF16 (uint16) or float32 (uint32) bit patterns, rounded once to nearest, ties to even."""
    short = out.itemsize == 2
    mask = np.uint64((1 << bits) - 1)
    last = words.shape[1] - 1
    for r in range(out.shape[0]):
        for g in range(scale.shape[1]):
            s, z = scale[r, g], zero[r, g]
            for i in range(g * span, min((g + 1) * span, out.shape[1])):
                at = i * bits
                word = at >> 5
                pair = np.uint64(words[r, word]) | (np.uint64(words[r, min(word + 1, last)]) << np.uint64(32))
                code = np.float32(np.uint32((pair >> np.uint64(at & 31)) & mask))
                value = code * s + z if free else (code - z) * s
                pattern = np.float32(value).view(np.uint32)
                if short:
                    pattern += np.uint32(0x7FFF) + ((pattern >> np.uint32(16)) & np.uint32(1))
                    pattern >>= np.uint32(16)
                out[r, i] = pattern
