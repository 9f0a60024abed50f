"""GPTQ: round a weight matrix column by column, and let the columns still to come make up for each error.

Frantar et al., 2022, https://arxiv.org/abs/2210.17323. With E = W - Ŵ and H = E[x xᵀ], a rounding Ŵ does to the layer's
output the damage

    tr(E H Eᵀ) = ‖E R‖²,   H = R Rᵀ, R upper triangular,   (E R)_j = R_jj · (E_j + Σ_{i<j} E_i R_ij / R_jj)

so, going from left to right, column j does best to round W_j + Σ_{i<j} E_i R_ij / R_jj. That is GPTQ: the paper writes
it with the Cholesky factor of H⁻¹, which is R⁻¹, and updates W; here nothing is inverted (Chee et al., 2023, arXiv
2307.13304, theorem 6 shows the two equal). Columns go in the order of falling H_jj ("act-order"), while groups stay
where they are and their scales are found beforehand ("static groups"), so nothing of the order is stored. Rows are
independent.

The formula also says what a search for scales must weigh errors with. The damage is the sum over columns of R_jj² times
the squared error of rounding: R_jj² is what an error costs once later columns have made up for what they can, and that
is less than H_jj, by very different shares.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tcw.codecs.compiled import kernel, spread
from tcw.weights._integer import Fit, Grid

_BLOCK = 128
_MOST_DAMPING = 100.0


@dataclass(frozen=True)
class Hessian:
    """A damped Hessian that is surely positive definite, and its factor.

    Attributes:
        matrix: float32 [in, in], symmetric, mean diagonal about 1.
        order: int64 [in], columns in the order they are rounded.
        feedback: float32 [in, in], R_ij / R_jj in that order; zero on and below the diagonal.
        importance: float32 [in], R_jj² of each column in natural order, above 0: what a rounding error there costs.
    """

    matrix: np.ndarray
    order: np.ndarray
    feedback: np.ndarray
    importance: np.ndarray


def prepare(hessian: np.ndarray | None, width: int, damp: float) -> Hessian | None:
    """Damp and factor a Hessian [width, width]; None where there is none to use (missing, not finite, or all zero).

    `damp` is the share of the mean diagonal that is added to the diagonal; it is raised tenfold until the factor
    exists, so a matrix that is not positive definite is taken for its diagonal at worst. An input that is always 0
    gets the damping alone.
    """
    if hessian is None or not np.isfinite(hessian).all():
        return None
    matrix = hessian + hessian.T
    diagonal = np.maximum(np.diagonal(matrix), 0.0).astype(np.float64)
    mean = float(diagonal.mean()) if width else 0.0
    if not mean > 0:
        return None
    matrix[diagonal == 0] = 0.0
    matrix[:, diagonal == 0] = 0.0
    matrix /= mean  # so that float32 can hold it whatever the unit of x
    diagonal /= mean
    order = np.argsort(-diagonal, kind="stable")
    while True:
        np.fill_diagonal(matrix, diagonal + damp)
        try:
            # only the factor is float64, and only while it is needed: wide layers have Hessians of a gigabyte
            lower = np.linalg.cholesky(matrix[np.ix_(order[::-1], order[::-1])].astype(np.float64))
            break
        except np.linalg.LinAlgError:
            damp = 10 * max(damp, 1e-6)
            if damp > _MOST_DAMPING:
                matrix = np.diag(diagonal + damp).astype(np.float32)
    pivots = np.diagonal(lower)[::-1].copy()
    importance = np.empty(width, np.float32)
    importance[order] = pivots**2
    lower /= pivots[::-1]
    np.fill_diagonal(lower, 0.0)
    feedback = np.ascontiguousarray(lower[::-1, ::-1], np.float32)
    return Hessian(matrix, order, feedback, importance)


def loss(errors: np.ndarray, hessian: Hessian) -> np.ndarray:
    """E H Eᵀ of each row, float64 [out], for errors float32 [out, in]."""
    return np.einsum("ij,ij->i", errors @ hessian.matrix, errors, dtype=np.float64)


def gptq(weights: np.ndarray, hessian: Hessian, fit: Fit, grid: Grid) -> np.ndarray:
    """Codes uint8 [out, in] for weights float32 [out, in] on the grid that `fit` gives."""
    group = (hessian.order // grid.span(weights.shape[1])).astype(np.int64)
    scale, shift = np.ascontiguousarray(fit.scale), np.ascontiguousarray(fit.shift(grid.kind))
    ordered = np.empty(weights.shape, np.uint8)

    def settle(rows: slice, goal: np.ndarray, own: np.ndarray, errors: np.ndarray, columns: tuple[int, int]) -> None:
        _block(
            goal, own, hessian.feedback, (scale[rows], shift[rows], group), ordered[rows], errors, columns, grid.top
        )  # fmt: skip

    sweep(weights, hessian, settle)
    codes = np.empty(weights.shape, np.uint8)
    codes[:, hessian.order] = ordered
    return codes


Settle = Callable[[slice, np.ndarray, np.ndarray, np.ndarray, tuple[int, int]], None]


def sweep(weights: np.ndarray, hessian: Hessian, settle: Settle) -> None:
    """Go over the columns of weights float32 [out, in] in the Hessian's order, block by block.

    `settle(rows, goal, own, errors, columns)` rounds a block of columns in some rows. It gets those rows of `goal`
    (each weight and what earlier errors ask of it; it adds to the columns of the block what their own errors ask) and
    of `own` (the weights), both in the Hessian's order, and writes what it missed of `own` to `errors` [rows, block].
    """
    width = weights.shape[1]
    goal = weights[:, hessian.order]
    own, errors = goal.copy(), np.empty((len(weights), _BLOCK), np.float32)
    for start in range(0, width, _BLOCK):
        columns = start, min(start + _BLOCK, width)

        def work(first: int, last: int, columns: tuple[int, int] = columns) -> None:
            rows = slice(first, last)
            settle(rows, goal[rows], own[rows], errors[rows], columns)

        spread(work, len(weights))
        # not in `work`: a matrix product uses all cores itself, and two that do so at once hinder each other
        goal[:, columns[1] :] += errors[:, : columns[1] - start] @ hessian.feedback[start : columns[1], columns[1] :]


@kernel
def _block(goal, own, feedback, levels, codes, errors, columns, top):  # type: ignore[no-untyped-def]
    """Round the columns start..end of all rows, feeding each error to the columns of the block that follow."""
    scale, shift, group = levels
    start, end = columns
    for r in range(goal.shape[0]):
        for j in range(start, end):
            s, z = scale[r, group[j]], shift[r, group[j]]
            code = np.float32(0)
            if s != 0:
                code = min(max(np.rint((goal[r, j] - z) / s), np.float32(0)), np.float32(top))
            error = own[r, j] - (code * s + z)
            codes[r, j] = np.uint8(code)
            errors[r, j - start] = error
            for k in range(j + 1, end):
                goal[r, k] += error * feedback[j, k]
