"""GPTQ against the algorithm as its paper writes it, and against inputs that would break it."""

import numpy as np
import pytest

from tcw.weights._gptq import gptq, loss, prepare
from tcw.weights._grid import nearest, search, values
from tcw.weights._integer import Fit, Grid


def layer(out: int, width: int, seed: int = 0, tokens: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Weights and the Hessian of inputs that are correlated, and of different strength, as real ones are."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(width, width)) * np.linspace(1.5, 0.02, width)[:, None]
    inputs = rng.normal(size=(tokens, width)) @ mix @ np.diag(np.exp(rng.normal(0, 0.7, width)))
    return rng.normal(0, 0.02, (out, width)).astype(np.float32), (inputs.T @ inputs / tokens).astype(np.float32)


def paper(weights: np.ndarray, hessian: np.ndarray, fit: Fit, grid: Grid, damp: float) -> np.ndarray:
    """Algorithm 1 of the paper with act-order and static groups: Cholesky factor of H⁻¹, one column at a time."""
    w, h = weights.astype(np.float64), hessian.astype(np.float64)
    width = w.shape[1]
    h = h + damp * np.diagonal(h).mean() * np.eye(width)
    order = np.argsort(-np.diagonal(hessian).astype(np.float64), kind="stable")
    inverse = np.linalg.inv(h[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    w = w[:, order]
    codes = np.zeros(w.shape, np.uint8)
    span = grid.group_size or width
    for j in range(width):
        scale, shift = (a[:, order[j] // span].astype(np.float64) for a in (fit.scale, fit.shift(grid.kind)))
        code = np.clip(np.rint((w[:, j] - shift) / scale), 0, grid.top)
        codes[:, order[j]] = code
        error = (w[:, j] - (code * scale + shift)) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    return codes


@pytest.mark.parametrize("kind", ["symmetric", "zero", "midrise", "float"])
@pytest.mark.parametrize(("bits", "group_size", "width"), [(2, 32, 96), (3, 0, 160), (4, 64, 300), (8, 100, 257)])
def test_codes_are_those_of_the_paper(kind: str, bits: int, group_size: int, width: int) -> None:
    weights, hessian = layer(40, width, seed=bits)
    grid = Grid(bits, kind, group_size, "F32")
    known = prepare(hessian, width, 0.01)
    assert known is not None
    fit = search(weights, known.importance, grid)
    codes = gptq(weights, known, fit, grid)
    expected = paper(weights, hessian, fit, grid, 0.01)
    # float32 may take the other side where a weight lies half-way between two codes, and its row goes on from there
    assert (codes != expected).any(axis=1).mean() <= 0.1
    ours, theirs = (loss(weights - values(c, fit, grid), known).sum() for c in (codes, expected))
    assert ours == pytest.approx(theirs, rel=0.01)


def test_one_row_is_rounded_as_it_is_among_others() -> None:
    weights, hessian = layer(50, 130)
    grid = Grid(3, "zero", 64, "BF16")
    known = prepare(hessian, 130, 0.01)
    assert known is not None
    fit = search(weights, known.importance, grid)
    codes = gptq(weights, known, fit, grid)
    alone = gptq(weights[7:8], known, Fit(fit.scale[7:8], fit.zero[7:8]), grid)
    assert np.array_equal(alone[0], codes[7])


def test_importance_is_what_an_error_costs_after_compensation() -> None:
    """1 / (H⁻¹)_jj of the columns from j on: the last column in order costs its whole diagonal's inverse."""
    _, hessian = layer(1, 60)
    known = prepare(hessian, 60, 0.02)
    assert known is not None
    ordered = known.matrix.astype(np.float64)[np.ix_(known.order, known.order)]
    for j in (0, 10, 59):
        conditional = 1 / np.linalg.inv(ordered[j:, j:])[0, 0]
        assert known.importance[known.order[j]] == pytest.approx(conditional, rel=1e-3)
    errors = np.random.default_rng(0).normal(size=(1, 60))
    whitened = errors[:, known.order] + errors[:, known.order] @ known.feedback
    assert (whitened**2 @ known.importance[known.order])[0] == pytest.approx(
        float((errors @ known.matrix.astype(np.float64) @ errors.T)[0, 0]), rel=1e-3
    )


@pytest.mark.parametrize("seed", range(3))
def test_it_loses_much_less_than_rounding(seed: int) -> None:
    weights, hessian = layer(96, 256, seed)
    grid = Grid(4, "symmetric", 64, "BF16")
    known = prepare(hessian, 256, 0.01)
    assert known is not None
    plain = search(weights, np.ones(256, np.float32), grid)
    rounded = loss(weights - values(nearest(weights, plain, grid), plain, grid), known).sum()
    fit = search(weights, known.importance, grid)
    codes = gptq(weights, known, fit, grid)
    assert loss(weights - values(codes, fit, grid), known).sum() <= 0.75 * rounded


def not_positive(width: int) -> np.ndarray:
    matrix = np.random.default_rng(0).normal(size=(width, width)).astype(np.float32)
    return matrix + matrix.T


@pytest.mark.parametrize("damp", [0.0, 0.01])
@pytest.mark.parametrize("case", ["zero", "dead", "rank one", "indefinite", "asymmetric", "huge", "tiny", "negative"])
def test_bad_hessians_still_give_codes(case: str, damp: float) -> None:
    weights, good = layer(33, 70)
    hessian = {
        "zero": np.zeros_like(good),
        "dead": good * (np.arange(70) % 3 > 0) * (np.arange(70) % 3 > 0)[:, None],
        "rank one": np.outer(good[0], good[0]),
        "indefinite": not_positive(70),
        "asymmetric": good + np.triu(good) * 0.5,
        "huge": good * np.float32(1e30),
        "tiny": good * np.float32(1e-35),
        "negative": -good,
    }[case].astype(np.float32)
    known = prepare(hessian, 70, damp)
    if case in ("zero", "negative"):
        assert known is None
        return
    assert known is not None
    assert all(np.isfinite(a).all() for a in (known.matrix, known.feedback, known.importance))
    assert (known.importance > 0).all()
    grid = Grid(4, "zero", 32, "BF16")
    fit = search(weights, known.importance, grid)
    error = weights - values(gptq(weights, known, fit, grid), fit, grid)
    assert np.isfinite(error).all()
    assert (error**2).sum() < (weights**2).sum()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_hessian_that_is_no_number_is_none(bad: float) -> None:
    hessian = np.eye(8, dtype=np.float32)
    hessian[2, 3] = bad
    assert prepare(hessian, 8, 0.01) is None
    assert prepare(None, 8, 0.01) is None


def test_the_hessian_is_not_touched() -> None:
    _, hessian = layer(1, 40)
    before = hessian.copy()
    hessian.flags.writeable = False
    prepare(hessian, 40, 0.0)
    assert np.array_equal(hessian, before)
