"""After GPTQ: better scales for its codes, and better codes for those scales, in turns.

GPTQ chooses codes for scales that were found before any error was fed back. Given the codes q of a row, the best
scales are a small least-squares problem: with B [in, groups] the codes less their zero, each in its group's column,

    ŵ = B s,   s = (Bᵀ H B)⁻¹ Bᵀ H w,   minimising (w - ŵ)ᵀ H (w - ŵ)

(and twice as many unknowns where the zero is a free number). This is the shrink towards the mean that a coarse
rounding needs, as the LMMSE factors and rescalers of WaterSIC (arXiv 2603.04956) are for its column steps.

Given the scales, each code in its turn takes the value that is best while all others stay: cyclic coordinate descent,
as in QuantEase (Behdin et al., 2023, https://arxiv.org/abs/2309.01885). GPTQ decides a column before it knows what
later columns can make up for; this looks again. Both steps only ever lower tr(E H Eᵀ), except that a scale is rounded
to what is stored of it; the best round is kept.

SignRound (Cheng et al., 2023, https://arxiv.org/abs/2309.05516) and EfficientQAT (Chen et al., 2024,
https://arxiv.org/abs/2407.11062) learn rounding, scales and zeros by gradient descent on the output of a whole block,
with data. Here the loss is that of one layer, a quadratic form, so its minimum over scales is a formula and its
minimum over one code is another: there is no step size and no data beyond H. What this cannot do is let one layer make
up for another. SignRound's signed steps on this same loss came out worse than GPTQ alone where they began from plain
rounding, and found nothing better where they began from GPTQ.
"""

import numpy as np

from tcw.codecs.compiled import kernel, readonly, spread
from tcw.weights._gptq import Hessian, gptq, loss, prepare
from tcw.weights._grid import nearest, search, stored, values
from tcw.weights._integer import Fit, Grid

_RIDGE = 1e-6
_BLOCK = 128
_EQUATIONS = 1 << 22  # coefficients held at a time


def quantise(
    weights: np.ndarray, hessian: np.ndarray | None, grid: Grid, damp: float, rounds: int
) -> tuple[np.ndarray, Fit]:
    """Codes uint8 [out, in] and their scales for weights float32 [out, in], by all that is known of the layer's inputs.

    Without a usable Hessian [in, in]: searched scales and the nearest values. With one: scales searched by importance,
    GPTQ, and `rounds` turns of better scales and better codes.
    """
    known = prepare(hessian, weights.shape[1], damp)
    if known is None:
        fit = search(weights, np.ones(weights.shape[1], np.float32), grid)
        return nearest(weights, fit, grid), fit
    fit = search(weights, known.importance, grid)
    codes = gptq(weights, known, fit, grid)
    if not rounds:
        return codes, fit
    best = codes, fit
    least = loss(weights - values(codes, fit, grid), known).sum()
    for _ in range(rounds):
        fit = rescale(weights, codes, known, fit, grid)
        codes, damage = descend(weights, codes, known, fit, grid)
        if damage < least:
            best, least = (codes, fit), damage
    return best


def sample_errors(
    weights: np.ndarray, hessian: np.ndarray | None, grids: list[Grid], damp: float, rows: int
) -> list[np.ndarray]:
    """Estimate what rounding to each grid does to each output: squared error, mean over tokens, float64 [out].

    About `rows` rows are quantised by GPTQ and judged by `hessian` as it is given; each of the others is taken to lose
    the same share of its weights' power. Without a Hessian all inputs count the same.
    """
    out, width = weights.shape
    known = prepare(hessian, width, damp)
    true = np.eye(width, dtype=np.float32) if known is None or hessian is None else hessian.astype(np.float32)
    some = weights[:: -(-out // rows)]
    power = np.einsum("ij,ij->i", weights, weights, dtype=np.float64)
    results = []
    for grid in grids:
        if known is None:
            fit = search(some, np.ones(width, np.float32), grid)
            codes = nearest(some, fit, grid)
        else:
            fit = search(some, known.importance, grid)
            codes = gptq(some, known, fit, grid)
        missed = some - values(codes, fit, grid)
        lost = np.einsum("ij,ij->i", missed @ true, missed, dtype=np.float64)
        whole = power[:: -(-out // rows)].sum()
        results.append(power * (max(float(lost.sum()), 0.0) / whole if whole > 0 else 0.0))
    return results


def descend(weights: np.ndarray, codes: np.ndarray, hessian: Hessian, fit: Fit, grid: Grid) -> tuple[np.ndarray, float]:
    """Let each code [out, in] in turn take its best value; returns the codes and their loss tr(E H Eᵀ)."""
    out, width = weights.shape
    group = np.arange(width) // grid.span(width)
    codes, scale = codes.copy(), np.ascontiguousarray(fit.scale)
    errors = weights - values(codes, fit, grid)

    for start in range(0, width, _BLOCK):
        columns = start, min(start + _BLOCK, width)
        pull = errors @ hessian.matrix[:, slice(*columns)]  # in the caller, as in `gptq`
        within = readonly(hessian.matrix[slice(*columns), slice(*columns)])

        def work(first: int, last: int, given: tuple = (pull, within, columns)) -> None:
            rows, (pull, within, columns) = slice(first, last), given
            _descend(errors[rows], pull[rows], within, codes[rows], (scale[rows], group), columns, grid.top)

        spread(work, out)
    return codes, float(loss(errors, hessian).sum())


@kernel
def _descend(errors, pull, within, codes, levels, columns, top):  # type: ignore[no-untyped-def]
    """One pass over the columns start..end of all rows; `pull` is E H of those columns and is kept up to date."""
    scale, group = levels
    start, end = columns
    for r in range(errors.shape[0]):
        for j in range(start, end):
            s, b = scale[r, group[j]], j - start
            if s == 0:
                continue
            old = np.float32(codes[r, j])
            new = np.rint(old + pull[r, b] / (within[b, b] * s))
            new = min(max(new, np.float32(0)), np.float32(top))
            if new != old:
                change = (old - new) * s
                codes[r, j] = np.uint8(new)
                errors[r, j] += change
                for k in range(end - start):
                    pull[r, k] += change * within[b, k]


def rescale(weights: np.ndarray, codes: np.ndarray, hessian: Hessian, fit: Fit, grid: Grid) -> Fit:
    """The best scales (and free zeros) for codes uint8 [out, in] of weights float32 [out, in], as they are stored.

    Rows whose equations have no clear answer keep what they had.
    """
    out, width = weights.shape
    starts = np.arange(0, width, grid.span(width))
    scale, zero = fit.scale.copy(), fit.zero.copy()

    groups = len(starts)
    step = max(1, _EQUATIONS // (4 * groups**2))
    for first in range(0, out, step):
        rows = slice(first, first + step)
        found = _solve(weights[rows], codes[rows], hessian.matrix, fit.zero[rows], starts, grid)
        good = np.isfinite(found).all(axis=1)
        scale[rows][good] = stored(found[good, :groups], grid.scale)
        if grid.kind == "float":
            zero[rows][good] = stored(found[good, groups:], grid.scale)
    return Fit(scale, zero)


def _solve(weights, codes, matrix, zero, starts, grid):  # type: ignore[no-untyped-def]
    width = weights.shape[1]
    sizes = np.diff(np.append(starts, width))
    free = grid.kind == "float"
    levels = codes.astype(np.float32)
    if not free:
        levels -= np.repeat(zero, sizes, axis=1)
    groups = len(starts)
    unknowns = groups * (2 if free else 1)
    left = np.empty((len(weights), unknowns, unknowns))
    pull = weights @ matrix
    right = np.empty((len(weights), unknowns))
    right[:, :groups] = np.add.reduceat(pull * levels, starts, axis=1)
    if free:
        right[:, groups:] = np.add.reduceat(pull, starts, axis=1)
        blocks = np.add.reduceat(matrix, starts, axis=0)  # [groups, in]
        left[:, groups:, groups:] = np.add.reduceat(blocks, starts, axis=1)
    for g, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        reach = levels[:, start : start + size] @ matrix[start : start + size]
        left[:, g, :groups] = np.add.reduceat(reach * levels, starts, axis=1)
        if free:
            left[:, g, groups:] = np.add.reduceat(reach, starts, axis=1)
            left[:, groups:, g] = left[:, g, groups:]
    diagonal = np.einsum("rii->ri", left)
    diagonal += _RIDGE * diagonal.mean(axis=1, keepdims=True) + 1e-30
    return np.linalg.solve(left, right[..., None])[..., 0]
