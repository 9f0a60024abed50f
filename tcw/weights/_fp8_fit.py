"""FP8 with more care than rounding each weight to the nearest: which scale a row takes, and GPTQ on the grid of E4M3.

Any scale s from max|w| / 448 to twice that keeps every weight in range at about the same precision, and which weights
lie near a value of the grid depends on s: of 32 scales, evenly spread over that octave, the best has some 15 % less
squared error than the first.

GPTQ rounds column after column and lets those still to come make up for each error; tcw/weights/_gptq.py has the
derivation and prepares the Hessian.
"""

import numpy as np
from numba import njit

from tcw.codecs.compiled import inline, kernel, readonly, spread
from tcw.weights._fp8 import to_e4m3
from tcw.weights._gptq import Hessian, sweep

_STEPS = (2.0 ** (np.arange(32) / 32)).astype(np.float32)


def row_scales(values: np.ndarray, least: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Scales of rows, float32 [rows], BF16 numbers, that minimise Σ importance · (w - s q)².

    Args:
        values: float32 [rows, columns].
        least: float32 [rows], the smallest that keeps a row within ±448; above 0.
        importance: float32 [columns], >= 0.
    """
    best = np.empty(len(values), np.float32)
    args = readonly(values), readonly(least), readonly(importance), readonly(_STEPS)
    spread(lambda first, last: _search(*args, best, first, last), len(values))
    return best


def gptq(weights: np.ndarray, hessian: Hessian, scale: np.ndarray, span: int) -> np.ndarray:
    """Codes uint8 [out, in] for weights float32 [out, in].

    Args:
        weights: the matrix.
        hessian: of its input, prepared.
        scale: float32 [out, groups].
        span: columns of a group.
    """
    group = (hessian.order // span).astype(np.int64)
    rounded = np.empty(weights.shape, np.float32)

    def settle(rows: slice, goal: np.ndarray, own: np.ndarray, errors: np.ndarray, columns: tuple[int, int]) -> None:
        _block(goal, own, hessian.feedback, scale[rows], group, rounded[rows], errors, columns)

    sweep(weights, hessian, settle)
    codes = np.empty(weights.shape, np.uint8)
    codes[:, hessian.order] = to_e4m3(rounded)
    return codes


@inline
def _nearest(x):  # type: ignore[no-untyped-def]
    """The E4M3 number nearest to float32 x, ties to even."""
    x = np.float32(min(max(x, np.float32(-448)), np.float32(448)))
    power = np.uint32(max(x.view(np.uint32) & np.uint32(0x7F800000), np.uint32(121 << 23)))
    # 1.5 · 2^(e+20): so large that a sum with it is a multiple of 2^(e-3)
    large = np.uint32(power + np.uint32((20 << 23) | (1 << 22))).view(np.float32)
    return (x + large) - large


@njit(nogil=True, error_model="numpy", fastmath=True)  # only to let the sum run in parallel lanes
def _sum(miss, importance):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(miss.size):
        total += importance[i] * miss[i] * miss[i]
    return total


@kernel
def _search(values, least, importance, steps, best, first, last):  # type: ignore[no-untyped-def]
    miss = np.empty(values.shape[1], np.float32)
    for r in range(first, last):
        lowest = np.inf
        for step in steps:
            s = np.uint32(np.float32(least[r] * step).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            inverse = np.float32(1) / s
            for i in range(miss.size):
                x = values[r, i] * inverse
                miss[i] = x - _nearest(x)
            error = np.float64(_sum(miss, importance)) * np.float64(s) * np.float64(s)  # float32 may overflow
            if error < lowest:
                lowest, best[r] = error, s


@kernel
def _block(goal, own, feedback, scale, group, rounded, errors, columns):  # type: ignore[no-untyped-def]
    """Round a block of columns in all rows, feeding each error to the columns of the block that follow."""
    start, end = columns
    for r in range(goal.shape[0]):
        for j in range(start, end):
            s = scale[r, group[j]]
            rounded[r, j] = _nearest(goal[r, j] / s)
            error = own[r, j] - rounded[r, j] * s
            errors[r, j - start] = error
            for k in range(j + 1, end):
                goal[r, k] += error * feedback[j, k]
