"""Scales and codes in turns: each step is the minimum it says it is."""

import itertools

import numpy as np
import pytest

from tcw.weights._gptq import Hessian, gptq, loss, prepare
from tcw.weights._grid import search, values
from tcw.weights._integer import Fit, Grid
from tcw.weights._tune import descend, quantise, rescale, sample_errors


def layer(out: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(3000, width)) @ (rng.normal(size=(width, width)) * np.linspace(1, 0.05, width)[:, None])
    return rng.normal(0, 0.02, (out, width)).astype(np.float32), (inputs.T @ inputs / 3000).astype(np.float32)


def start(
    kind: str, group_size: int, width: int = 100, bits: int = 2
) -> tuple[np.ndarray, Hessian, Grid, Fit, np.ndarray]:
    weights, hessian = layer(24, width)
    grid = Grid(bits, kind, group_size, "F32")
    known = prepare(hessian, width, 0.01)
    assert known is not None
    fit = search(weights, known.importance, grid)
    return weights, known, grid, fit, gptq(weights, known, fit, grid)


@pytest.mark.parametrize("kind", ["symmetric", "zero", "midrise", "float"])
@pytest.mark.parametrize("group_size", [0, 32])
def test_rescale_is_least_squares(kind: str, group_size: int) -> None:
    weights, known, grid, fit, codes = start(kind, group_size)
    found = rescale(weights, codes, known, fit, grid)
    root = np.linalg.cholesky(known.matrix.astype(np.float64)).T
    span, groups = grid.span(100), grid.groups(100)
    member = np.arange(100)[:, None] // span == np.arange(groups)
    for r in range(len(weights)):
        zero = 0.0 if kind == "float" else np.repeat(fit.zero[r], span)[:100]
        design = member * (codes[r] - zero)[:, None]
        if kind == "float":
            design = np.hstack([design, member.astype(float)])
        exact, *_ = np.linalg.lstsq(root @ design, root @ weights[r], rcond=None)
        assert np.allclose(found.scale[r], exact[:groups], rtol=2e-3, atol=1e-5)
        if kind == "float":
            assert np.allclose(found.zero[r], exact[groups:], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["symmetric", "zero", "midrise", "float"])
def test_no_single_code_can_be_bettered_after_enough_passes(kind: str) -> None:
    weights, known, grid, fit, codes = start(kind, 32, 60)
    before = loss(weights - values(codes, fit, grid), known).sum()
    for _ in range(60):
        codes, damage = descend(weights, codes, known, fit, grid)
        assert damage <= before * (1 + 1e-5)
        before = damage
    matrix = known.matrix.astype(np.float64)
    shift = fit.shift(kind)
    for r, i in itertools.product(range(0, 24, 6), range(60)):
        scale = float(fit.scale[r, i // 32])
        row = values(codes, fit, grid)[r].astype(np.float64)
        costs = []
        for code in range(grid.top + 1):
            row[i] = code * scale + float(shift[r, i // 32])
            error = weights[r] - row
            costs.append(error @ matrix @ error)
        assert costs[codes[r, i]] <= min(costs) * (1 + 1e-4)


@pytest.mark.parametrize("kind", ["zero", "midrise", "float"])
def test_tuning_pays_at_two_bits(kind: str) -> None:
    weights, hessian = layer(64, 192)
    grid = Grid(2, kind, 64, "BF16")
    known = prepare(hessian, 192, 0.01)
    assert known is not None
    lost = {}
    for rounds in (0, 1, 8):
        codes, fit = quantise(weights, hessian, grid, 0.01, rounds)
        lost[rounds] = loss(weights - values(codes, fit, grid), known).sum()
    assert lost[8] <= lost[1] <= lost[0]
    assert lost[8] <= 0.95 * lost[0]


def test_without_a_hessian_weights_are_rounded_to_nearest() -> None:
    weights, _ = layer(20, 64)
    grid = Grid(4, "symmetric", 32, "BF16")
    codes, fit = quantise(weights, None, grid, 0.01, 5)
    step = np.abs(np.repeat(fit.scale, 32, axis=1))
    inside = (codes > 0) & (codes < 15)
    assert (np.abs(weights - values(codes, fit, grid))[inside] <= 0.5001 * step[inside]).all()
    nothing = quantise(weights, np.zeros((64, 64), np.float32), grid, 0.01, 5)
    assert np.array_equal(nothing[0], codes)


def test_rows_that_are_zero_stay_zero() -> None:
    weights, hessian = layer(8, 64)
    weights[3], weights[:, 5] = 0, 0
    for kind in ("symmetric", "zero", "midrise", "float"):
        grid = Grid(2, kind, 32, "BF16")
        codes, fit = quantise(weights, hessian, grid, 0.01, 3)
        back = values(codes, fit, grid)
        assert np.isfinite(back).all()
        assert not back[3].any()


def test_samples_tell_what_all_rows_lose() -> None:
    weights, hessian = layer(600, 96)
    grids = [Grid(b, "zero", 32, "BF16") for b in (2, 3, 4)]
    guesses = sample_errors(weights, hessian, grids, 0.01, 100)
    assert guesses[0].sum() > 2 * guesses[1].sum() > 4 * guesses[2].sum() > 0
    for grid, guess in zip(grids, guesses, strict=True):
        codes, fit = quantise(weights, hessian, grid, 0.01, 0)
        error = (weights - values(codes, fit, grid)).astype(np.float64)
        true = np.einsum("ij,jk,ik->i", error, hessian.astype(np.float64), error)
        assert guess.shape == (600,)
        assert guess.sum() == pytest.approx(true.sum(), rel=0.1)
