"""Searched scales and zeros: as stored, never worse than min and max, and near the best there is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcw.tensor import round_to_bf16
from tcw.weights._grid import nearest, search, stored, values
from tcw.weights._integer import GRIDS, Fit, Grid


def damage(weights: np.ndarray, importance: np.ndarray, fit: Fit, grid: Grid) -> float:
    error = weights.astype(np.float64) - values(nearest(weights, fit, grid), fit, grid)
    return float((importance * error**2).sum())


def to_the_ends(weights: np.ndarray, grid: Grid) -> Fit:
    """Grids that reach exactly to the smallest and largest weight of each row."""
    low, high = (f(weights, axis=1, keepdims=True) for f in (np.min, np.max))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    zero = np.full_like(low, grid.middle)
    if grid.kind == "symmetric":
        scale = np.maximum(-low / grid.middle, high / (grid.top - grid.middle))
    elif grid.kind == "midrise":
        scale = 2 * np.maximum(-low, high) / grid.top
    else:
        scale = (high - low) / grid.top
        zero = low if grid.kind == "float" else np.rint(-low / scale)
    return Fit(stored(scale, grid.scale), stored(zero, grid.scale))


def best_there_is(weights: np.ndarray, importance: np.ndarray, grid: Grid) -> float:
    """Brute force over many scales, both signs, and zeros, in float64 and unrounded."""
    least = np.inf
    reach = np.abs(weights).max() * 2.5 / grid.top
    for scale in np.linspace(-reach, reach, 401):
        zeros = {"symmetric": [grid.middle], "midrise": [grid.middle], "zero": range(grid.top + 1)}.get(grid.kind)
        for zero in zeros if zeros is not None else np.linspace(-0.5, grid.top + 0.5, 41):
            if scale == 0:
                continue
            codes = np.clip(np.rint(weights / scale + zero), 0, grid.top)
            least = min(least, float((importance * (weights - (codes - zero) * scale) ** 2).sum()))
    return least


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("skew", [0.0, 0.03])
def test_a_search_beats_min_and_max(kind: str, bits: int, scale: str, skew: float) -> None:
    rng = np.random.default_rng(bits)
    weights = (rng.standard_t(4, (30, 64)) * 0.02 + skew).astype(np.float32)
    importance = rng.gamma(1.0, 1.0, 64).astype(np.float32)
    grid = Grid(bits, kind, 0, scale)
    fit = search(weights, importance, grid)
    ends = damage(weights, importance, to_the_ends(weights, grid), grid)
    assert damage(weights, importance, fit, grid) <= ends * (0.8 if bits <= 3 else 1.0)
    assert np.array_equal(fit.scale, stored(fit.scale, scale))
    if kind == "zero":
        assert set(np.unique(fit.zero)) <= set(range(grid.top + 1))
    if kind == "float":
        assert np.array_equal(fit.zero, stored(fit.zero, scale))


@pytest.mark.parametrize(("kind", "slack"), [("symmetric", 1.03), ("midrise", 1.03), ("zero", 1.03), ("float", 1.25)])
@pytest.mark.parametrize("bits", [2, 3])
def test_a_search_is_near_the_best_there_is(kind: str, slack: float, bits: int) -> None:
    rng = np.random.default_rng(7)
    weights = rng.normal(0.005, 0.02, (12, 48)).astype(np.float32)
    importance = rng.gamma(2.0, 1.0, 48).astype(np.float32)
    grid = Grid(bits, kind, 0, "BF16")
    found = damage(weights, importance, search(weights, importance, grid), grid)
    assert found <= slack * sum(best_there_is(row, importance, grid) for row in weights.astype(np.float64))


@pytest.mark.parametrize("kind", GRIDS)
def test_groups_are_searched_apart_and_the_last_may_be_short(kind: str) -> None:
    rng = np.random.default_rng(3)
    weights = rng.normal(0, 0.02, (9, 100)).astype(np.float32)
    importance = rng.gamma(1.0, 1.0, 100).astype(np.float32)
    fit = search(weights, importance, Grid(3, kind, 32, "BF16"))
    assert fit.scale.shape == (9, 4)
    for g in range(4):
        columns = slice(32 * g, 32 * g + 32)
        alone = search(weights[:, columns], importance[columns], Grid(3, kind, 0, "BF16"))
        assert np.array_equal(fit.scale[:, g : g + 1], alone.scale)
        assert np.array_equal(fit.zero[:, g : g + 1], alone.zero)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("constant", [0.0, 0.5, -0.25])
def test_constant_rows_come_back(kind: str, constant: float) -> None:
    weights = np.full((3, 64), constant, np.float32)
    grid = Grid(4, kind, 32, "BF16")
    fit = search(weights, np.ones(64, np.float32), grid)
    assert np.allclose(values(nearest(weights, fit, grid), fit, grid), constant, rtol=0.005, atol=0)


@pytest.mark.parametrize("kind", GRIDS)
def test_no_importance_at_all_is_no_trouble(kind: str) -> None:
    weights = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    grid = Grid(2, kind, 32, "F16")
    fit = search(weights, np.zeros(64, np.float32), grid)
    assert np.isfinite(values(nearest(weights, fit, grid), fit, grid)).all()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(GRIDS), bits=st.sampled_from([2, 3, 4, 8]), dtype=st.sampled_from(["BF16", "F16", "F32"]),
    exponent=st.integers(-14, 4), seed=st.integers(0, 1 << 30), sparse=st.booleans(),
)  # fmt: skip
def test_any_weights_give_numbers(kind: str, bits: int, dtype: str, exponent: int, seed: int, sparse: bool) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.standard_cauchy((3, 40)) * 2.0**exponent).clip(-6e4, 6e4).astype(np.float32)
    if sparse:
        weights *= rng.random(weights.shape) < 0.1
    importance = (10 ** rng.uniform(-6, 6, 40)).astype(np.float32)
    grid = Grid(bits, kind, 16, dtype)
    fit = search(weights, importance, grid)
    back = values(nearest(weights, fit, grid), fit, grid)
    assert np.isfinite(back).all()
    if kind != "midrise" or not sparse:  # it has no zero, so sparse weights are not for it
        power = (importance * weights.astype(np.float64) ** 2).sum()
        assert (importance * (weights - back.astype(np.float64)) ** 2).sum() <= 1.01 * power


def test_bf16_scales_are_rounded_as_tensors_are() -> None:
    scale = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert np.array_equal(round_to_bf16(scale), stored(scale, "BF16").view(np.uint32) >> 16)
