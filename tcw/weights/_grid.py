"""Searching the scale, and the zero, of each group of weights. Never min and max alone: that halves what 2 bits can do.

For a group of weights w with importances h (what an error in each column costs, see _gptq.py) we look
for the grid that minimises Σ h (w - ŵ)², ŵ the nearest value of the grid. A grid that reaches to the largest weight is
shrunk in steps, for each possible zero; the best is refitted in closed form, s = Σ h w c / Σ h c² with c the codes
less their zero, and its codes are taken anew. Every candidate is judged as it will be stored, its scale rounded.
"""

import numpy as np
from numba import njit

from tcw.codecs.compiled import inline, kernel, spread
from tcw.tensor import round_to_bf16
from tcw.weights._integer import Fit, Grid

_LEAST = 0.3  # the smallest share of the full reach that is tried
_STEPS = 64
_REFITS = 4
_STARTS = 6  # of the search with a free zero
_KINDS = {"symmetric": 0, "zero": 1, "midrise": 2, "float": 3}
_STORED = {"F32": 0, "BF16": 1, "F16": 2}


def search(weights: np.ndarray, importance: np.ndarray, grid: Grid, steps: int = _STEPS) -> Fit:
    """Find scales and zeros for weights float32 [out, in] whose columns have an importance float32 [in] >= 0."""
    out, width = weights.shape
    shape = (out, grid.groups(width))
    fit = Fit(np.empty(shape, np.float32), np.empty(shape, np.float32))
    weights, importance = np.ascontiguousarray(weights), np.ascontiguousarray(importance, np.float32)

    def work(first: int, last: int) -> None:
        _search_rows(
            weights[first:last], importance,
            fit.scale[first:last], fit.zero[first:last], (grid.span(width), _KINDS[grid.kind], grid.top, grid.middle),
            _STORED[grid.scale], _shrinks(grid.bits, steps),
        )  # fmt: skip

    spread(work, out)
    return fit


def stored(scale: np.ndarray, dtype: str) -> np.ndarray:
    """Round scales to what is stored of them; the result is float32."""
    scale = np.ascontiguousarray(scale, np.float32)
    if dtype == "BF16":
        return (round_to_bf16(scale).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return scale.astype(np.float16).astype(np.float32) if dtype == "F16" else scale


def nearest(weights: np.ndarray, fit: Fit, grid: Grid) -> np.ndarray:
    """Codes uint8 [out, in] of the values nearest to the weights."""
    span = grid.span(weights.shape[1])
    scale, shift = (_by_column(a, span, weights.shape[1]) for a in (fit.scale, fit.shift(grid.kind)))
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint((weights - shift) / scale)
    return np.clip(np.nan_to_num(codes, nan=0.0), 0, grid.top).astype(np.uint8)


def values(codes: np.ndarray, fit: Fit, grid: Grid) -> np.ndarray:
    """What codes uint8 [out, in] stand for, float32, before it is rounded to the tensor's dtype."""
    span, width = grid.span(codes.shape[1]), codes.shape[1]
    scale, zero = _by_column(fit.scale, span, width), _by_column(fit.zero, span, width)
    return codes * scale + zero if grid.kind == "float" else (codes - zero) * scale


def _by_column(groups: np.ndarray, span: int, width: int) -> np.ndarray:
    return np.repeat(groups, span, axis=1)[:, :width]


def _shrinks(bits: int, steps: int) -> np.ndarray:
    least = _LEAST if bits <= 4 else 0.7
    return np.linspace(1.0, least, steps, dtype=np.float32)


@inline
def _rounded(value, how):  # type: ignore[no-untyped-def]
    """A scale as it is stored: 0 float32, 1 BF16, 2 F16 (11 bits; tiny ones coarser)."""
    value = np.float32(value)
    if how == 0 or value == 0:
        return value
    if how == 1:
        bits = value.view(np.uint32)
        return np.uint32(
            (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
        ).view(np.float32)
    step = 2.0 ** max(np.floor(np.log2(abs(np.float64(value)))) - 10, -24.0)
    return np.float32(np.rint(value / step) * step)


@njit(nogil=True, error_model="numpy", fastmath=True)  # only to let sums run in parallel lanes: there is no NaN here
def _error(w, h, scale, shift, top):  # type: ignore[no-untyped-def]
    """Σ h (w - ŵ)² of a group with the nearest values of a grid."""
    total, inverse = np.float32(0), np.float32(1) / scale
    for i in range(w.size):
        code = min(max(np.rint((w[i] - shift) * inverse), np.float32(0)), top)
        miss = w[i] - (code * scale + shift)
        total += h[i] * miss * miss
    return total


@njit(nogil=True, error_model="numpy", fastmath=True)
def _moments(w, h, scale, shift, top):  # type: ignore[no-untyped-def]
    """Σ h·(1, q, q², w, q w) of a group with the codes q nearest to its weights."""
    s0 = s1 = s2 = t0 = t1 = np.float32(0)
    inverse = np.float32(1) / scale
    for i in range(w.size):
        code = min(max(np.rint((w[i] - shift) * inverse), np.float32(0)), top)
        s0 += h[i]
        s1 += h[i] * code
        s2 += h[i] * code * code
        t0 += h[i] * w[i]
        t1 += h[i] * code * w[i]
    return np.float64(s0), np.float64(s1), np.float64(s2), np.float64(t0), np.float64(t1)


@inline
def _fixed(w, h, best, scale, middle, top, how, shrinks):  # type: ignore[no-untyped-def]
    """Try the shrinks of `scale` with the code `middle` for 0, then refit; `best` is (error, scale, middle)."""
    for shrink in shrinks:
        s = _rounded(scale * shrink, how)
        if s == 0:
            continue
        error = _error(w, h, s, -middle * s, top)
        if error < best[0]:
            best = (error, s, middle)
    return best


@inline
def _refit_fixed(w, h, best, top, how):  # type: ignore[no-untyped-def]
    for _ in range(_REFITS):
        scale, middle = best[1], best[2]
        s0, s1, s2, t0, t1 = _moments(w, h, scale, -middle * scale, top)
        below = s2 - 2 * middle * s1 + middle * middle * s0
        if not below > 0:
            break
        s = _rounded((t1 - middle * t0) / below, how)
        if s == 0 or s == scale:
            break
        error = _error(w, h, s, -middle * s, top)
        if not error < best[0]:
            break
        best = (error, s, middle)
    return best


@inline
def _zero(w, h, low, high, top, how, shrinks):  # type: ignore[no-untyped-def]
    """The best (error, scale, zero point): every zero at 2 bits and less, else those about where it belongs."""
    reach = (max(high, np.float32(0)) - min(low, np.float32(0))) / top
    best = (np.float32(np.inf), np.float32(1), np.float32(0))
    if top <= 3:
        for zero in range(int(top) + 1):
            # codes reach zero·s below 0 and (top - zero)·s above
            best = _fixed(w, h, best, reach * np.float32(1.5), np.float32(zero), top, how, shrinks)
    else:
        for shrink in shrinks:
            s = _rounded(reach * shrink, how)
            if s == 0:
                continue
            base = np.rint(top * np.float32(0.5) - np.float32(0.5) * (low + high) / s)
            for near in range(-1, 2):
                zero = min(max(base + np.float32(near), np.float32(0)), top)
                error = _error(w, h, s, -zero * s, top)
                if error < best[0]:
                    best = (error, s, zero)
    return _refit_fixed(w, h, best, top, how)


@inline
def _float(w, h, low, high, top, how, shrinks):  # type: ignore[no-untyped-def]
    """The best (error, scale, value of code 0): scale and zero in closed form in turns with the codes."""
    best = (np.float32(np.inf), np.float32(0), np.float32(0))
    for start in range(2 * _STARTS):
        scale = (high - low) * shrinks[(len(shrinks) - 1) * (start // 2) // _STARTS] / top
        shift = np.float32(0.5) * (high + low - scale * top)
        if start % 2:
            shift = scale * np.rint(shift / scale)  # 0 is a level: it may matter more than all others
        last = np.float32(np.inf)
        for _ in range(3 * _REFITS):
            s, z = _rounded(scale, how), _rounded(shift, how)
            if s == 0:
                break
            error = _error(w, h, s, z, top)
            if error < best[0]:
                best = (error, s, z)
            if not error < np.float32(0.999) * last:
                break
            last = error
            s0, s1, s2, t0, t1 = _moments(w, h, s, z, top)
            below = s0 * s2 - s1 * s1
            if not below > 1e-6 * s0 * s2:
                break
            scale = np.float32((s0 * t1 - s1 * t0) / below)
            shift = np.float32((s2 * t0 - s1 * t1) / below)
    return best


@kernel
def _search_rows(w, h, scale, zero, grid, how, shrinks):  # type: ignore[no-untyped-def]
    """Fill scale and zero [rows, groups] for w [rows, in] and h [in]."""
    span, kind, top, middle = grid[0], grid[1], np.float32(grid[2]), np.float32(grid[3])
    for r in range(w.shape[0]):
        for g in range(scale.shape[1]):
            first, last = g * span, min((g + 1) * span, w.shape[1])
            part, weight = w[r, first:last], h[first:last]
            low, high = part.min(), part.max()
            best = (np.float32(np.inf), np.float32(0), middle)
            if low == high and (kind == 3 or low == 0):  # constant: one value says it all
                best = (np.float32(0), np.float32(0 if kind >= 2 else 1), _rounded(low, how) if kind == 3 else middle)
            elif kind == 0:
                up = max(high / (top - middle), -low / middle)
                down = max(-low / (top - middle), high / middle)
                best = _fixed(part, weight, best, up, middle, top, how, shrinks)
                best = _fixed(part, weight, best, -down, middle, top, how, shrinks)
                best = _refit_fixed(part, weight, best, top, how)
            elif kind == 1:
                best = _zero(part, weight, low, high, top, how, shrinks)
            elif kind == 2:
                reach = np.float32(2) * max(high, -low) / top
                best = _fixed(part, weight, best, reach, middle, top, how, shrinks)
                best = _refit_fixed(part, weight, best, top, how)
            else:
                best = _float(part, weight, low, high, top, how, shrinks)
            scale[r, g], zero[r, g] = best[1], best[2]
