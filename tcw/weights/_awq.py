"""AWQ: scale up the inputs that matter before rounding, and let what comes before the layer scale them down again.

Lin et al., 2023, https://arxiv.org/abs/2306.00978, section 3.2. A linear layer does not change when W becomes
W·diag(s) and its input x / s, but its rounding does: a column that is scaled up is rounded more finely, at the cost of
its neighbours in the group. The paper takes s = a^α, with a the mean magnitude of each input, and searches α in 0..1
for the least error of the output.

We take a = sqrt(diag H), the root mean square instead of the mean magnitude, which needs no second statistic, and the
error of the output is tr(E H Eᵀ), E = Q(W·diag(s))·diag(s)⁻¹ - W, with Q rounding to nearest on searched scales. Of
large layers only some rows are tried.
"""

import dataclasses

import numpy as np

from tcw.weights import Statistics
from tcw.weights._grid import nearest, search, values
from tcw.weights._integer import Grid

_TRIES = 20
_ROWS = 256  # tried of each layer
_STEPS = 16  # of the scale search while alphas are compared
_REACH = 1e4  # largest ratio of two scales


def input_scale(weights: list[np.ndarray], statistics: Statistics, grid: Grid) -> np.ndarray | None:
    """Find the scale of the input that layers share, float32 [in]; None where none is better than no scaling.

    Args:
        weights: float32 [out, in] of each layer.
        statistics: of their input; without a finite Hessian there is no scaling.
        grid: that the layers will be rounded to.
    """
    hessian = statistics.hessian
    if hessian is None or not np.isfinite(hessian).all():
        return None
    power = np.maximum(np.diagonal(hessian).astype(np.float64), 0.0)
    if not power.mean() > 0:
        return None
    hessian = (hessian / power.mean()).astype(np.float32)
    magnitude = np.sqrt(np.maximum(power, power.max() / _REACH**2))
    grid = dataclasses.replace(grid, scale="F32")
    rows = [w[:: -(-len(w) // _ROWS)].astype(np.float32) for w in weights]
    rows = [np.where(np.isfinite(w), w, np.float32(0)) for w in rows]
    best, least = None, _damage(rows, np.ones(len(power), np.float32), hessian, grid)
    for alpha in np.arange(1, _TRIES + 1) / _TRIES:
        scale = magnitude**alpha
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        damage = _damage(rows, scale, hessian, grid)
        if damage < least:
            best, least = scale, damage
    return best


def _damage(rows: list[np.ndarray], scale: np.ndarray, hessian: np.ndarray, grid: Grid) -> float:
    """tr(E H Eᵀ) over all layers with the input scaled by 1 / `scale`."""
    importance = np.diagonal(hessian) / scale**2
    total = 0.0
    for weights in rows:
        scaled = weights * scale
        fit = search(scaled, importance, grid, _STEPS)
        errors = values(nearest(scaled, fit, grid), fit, grid) / scale - weights
        total += float(np.einsum("ij,ij->", errors @ hessian, errors, dtype=np.float64))
    return total
