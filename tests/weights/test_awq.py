"""AWQ's search: inputs that are strong get a larger scale, and the output is hurt less."""

import numpy as np
import pytest

from tcw.weights import Statistics
from tcw.weights._awq import input_scale
from tcw.weights._grid import nearest, search, values
from tcw.weights._integer import Grid
from tcw.weights.int4 import Int4
from tcw.weights.int8 import Int8

GRID = Grid(4, "symmetric", 64, "F32")


def outliers(out: int = 96, width: int = 128, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and the Hessian of inputs of which a few are much stronger than the rest."""
    rng = np.random.default_rng(seed)
    strength = np.ones(width)
    strength[rng.choice(width, 6, replace=False)] = 40
    inputs = rng.normal(size=(2000, width)) * strength
    return rng.normal(0, 0.02, (out, width)).astype(np.float32), (inputs.T @ inputs / 2000).astype(np.float32)


def lost(weights: np.ndarray, hessian: np.ndarray, scale: np.ndarray) -> float:
    """What plain rounding of the scaled weights does to the output."""
    scaled = (weights * scale).astype(np.float32)
    fit = search(scaled, np.ones(weights.shape[1], np.float32), GRID)
    error = (values(nearest(scaled, fit, GRID), fit, GRID) / scale - weights).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", error, hessian.astype(np.float64), error))


def test_the_output_is_hurt_less() -> None:
    weights, hessian = outliers()
    scale = input_scale([weights[:50], weights[50:]], Statistics(hessian=hessian), GRID)
    assert scale is not None
    assert scale.shape == (128,)
    assert scale.dtype == np.float32
    assert (scale > 0).all()
    strong = np.diagonal(hessian) > 100
    assert scale[strong].min() > scale[~strong].max()
    assert lost(weights, hessian, scale) < 0.8 * lost(weights, hessian, np.ones(128))


def test_even_inputs_are_left_alone_or_nearly() -> None:
    weights, _ = outliers()
    scale = input_scale([weights], Statistics(hessian=np.eye(128, dtype=np.float32)), GRID)
    assert scale is None


def test_dead_inputs_keep_a_scale_above_zero() -> None:
    weights, hessian = outliers()
    hessian[:10], hessian[:, :10] = 0, 0
    scale = input_scale([weights], Statistics(hessian=hessian), GRID)
    assert scale is not None
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    assert scale.max() / scale.min() <= 1.1e4


@pytest.mark.parametrize("hessian", [None, np.zeros((128, 128), np.float32), np.full((128, 128), np.nan, np.float32)])
def test_nothing_known_is_no_scaling(hessian: np.ndarray | None) -> None:
    assert input_scale([outliers()[0]], Statistics(hessian=hessian), GRID) is None


def test_only_algo_awq_scales() -> None:
    weights, hessian = outliers()
    for method in (Int4, Int8):
        assert not method(algo="gptq").prescales()
        assert method(algo="awq").prescales()
        assert method(algo="awq", group_size=64).prescale([weights], Statistics(hessian=hessian)) is not None
