"""Sharing out bits: against brute force, and in the cases where the answer is known."""

import itertools

import numpy as np
import pytest

from tcw.calibration.allocate import choose, spend
from tcw.weights import Curve


def exponential(name: str, numel: int, scale: float, rates: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)) -> Curve:
    """Damage scale * numel * 4^-bits, as high-rate theory has it."""
    return Curve(name, numel, {b: scale * numel * 4.0**-b for b in rates})


def average(curves: list[Curve], bits: dict[str, float]) -> float:
    return sum(c.numel * bits[c.name] for c in curves) / sum(c.numel for c in curves)


def at(curve: Curve, bits: float) -> float:
    """Damage by interpolation of its logarithm; the curves here are convex there."""
    known = sorted(curve.damage)
    return float(np.exp(np.interp(bits, known, [np.log(curve.damage[b]) for b in known])))


def test_high_rate_theory() -> None:
    """Four times the damage a weight buys one bit more."""
    curves = [exponential("a", 1000, 1.0), exponential("b", 3000, 4.0), exponential("c", 500, 16.0)]
    bits = spend(curves, 3.0, least=0.5, most=8.0)
    assert bits["b"] - bits["a"] == pytest.approx(1.0, abs=1e-9)
    assert bits["c"] - bits["a"] == pytest.approx(2.0, abs=1e-9)
    assert average(curves, bits) == pytest.approx(3.0, abs=1e-9)


@pytest.mark.parametrize("bits", [1.5, 2.37, 3.0, 4.8, 6.0])
def test_spend_is_no_worse_than_a_fine_grid(bits: float) -> None:
    rng = np.random.default_rng(0)
    curves = []
    for name in "abc":
        falls = rng.uniform(0.05, 0.1, 4) ** [1, 1, 1.5, 2]
        damage = dict(zip((1.0, 2.0, 4.0, 8.0), np.cumprod(falls).tolist(), strict=True))
        curves.append(Curve(name, int(rng.integers(100, 900)), damage))
    found = spend(curves, bits, least=1.0, most=8.0)
    assert average(curves, found) == pytest.approx(bits, abs=1e-9)
    total = sum(at(c, found[c.name]) for c in curves)
    grid = np.linspace(1, 8, 141)
    sizes = [c.numel for c in curves]
    for first, second in itertools.product(grid, grid):
        third = (bits * sum(sizes) - sizes[0] * first - sizes[1] * second) / sizes[2]
        if 1 <= third <= 8:
            other = sum(at(c, b) for c, b in zip(curves, (first, second, third), strict=True))
            assert total <= other * (1 + 1e-9)


def test_bounds_hold_and_the_rest_pays() -> None:
    curves = [exponential("tiny", 1000, 1e-9), exponential("huge", 1000, 1e9), exponential("plain", 1000, 1.0)]
    bits = spend(curves, 4.0, least=1.5, most=6.0)
    assert bits["tiny"] == pytest.approx(1.5)
    assert bits["huge"] == pytest.approx(6.0)
    assert average(curves, bits) == pytest.approx(4.0, abs=1e-9)


@pytest.mark.parametrize(("asked", "given"), [(0.2, 1.0), (1.0, 1.0), (8.0, 8.0), (9.0, 8.0)])
def test_what_cannot_be_met_goes_to_the_bound(asked: float, given: float) -> None:
    curves = [exponential("a", 10, 1.0), exponential("b", 20, 2.0)]
    assert list(spend(curves, asked, least=1.0, most=8.0).values()) == pytest.approx([given, given])


@pytest.mark.parametrize(
    "damage", [{2.0: 1.0}, {1.0: 0.0, 2.0: 0.0}, {1.0: 1.0, 2.0: 3.0, 3.0: 0.5}, {2.0: 1.0, 3.0: 1.0}]
)
def test_odd_curves_keep_the_total(damage: dict[float, float]) -> None:
    """One point, nothing to lose, damage that rises with bits: noise, not a reason to fail."""
    curves = [Curve("odd", 700, damage), exponential("plain", 300, 1.0)]
    bits = spend(curves, 3.0, least=1.0, most=8.0)
    assert average(curves, bits) == pytest.approx(3.0, abs=1e-6)
    assert all(1.0 <= b <= 8.0 for b in bits.values())


def test_nothing_to_share_out() -> None:
    assert spend([], 3.0, least=1.0, most=8.0) == {}
    assert choose([], 3.0) == {}


def brute(curves: list[Curve], bits: float) -> float:
    """Least damage over every choice within the budget."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.group or curve.name, []).append(curve)
    best = np.inf
    for pick in itertools.product(*(sorted(set.intersection(*(set(c.damage) for c in g))) for g in groups.values())):
        chosen = {c.name: b for g, b in zip(groups.values(), pick, strict=True) for c in g}
        if average(curves, chosen) <= bits + 1e-12:
            best = min(best, sum(c.damage[chosen[c.name]] for c in curves))
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bits", [2.0, 2.5, 3.3, 8.0])
def test_choose_against_brute_force(seed: int, bits: float) -> None:
    rng = np.random.default_rng(seed)
    curves = []
    for k in range(7):
        damage = np.sort(rng.exponential(1.0, 4))[::-1]
        options = dict(zip((2.0, 3.0, 4.0, 8.0), damage.tolist(), strict=True))
        if k == 3:
            del options[8.0]
        curves.append(Curve(f"t{k}", int(rng.integers(1, 50)) * 100, options, "fused" if k in (1, 2, 3) else ""))
    found = choose(curves, bits)
    assert average(curves, found) <= bits + 1e-3
    assert found["t1"] == found["t2"] == found["t3"]
    total = sum(c.damage[found[c.name]] for c in curves)
    assert brute(curves, bits + 1e-3) <= total + 1e-12
    assert total <= brute(curves, bits - 1e-3) + 1e-12


def test_too_few_bits_take_the_smallest() -> None:
    curves = [exponential("a", 100, 1.0), exponential("b", 50, 2.0)]
    assert choose(curves, 0.3) == {"a": 1.0, "b": 1.0}


def test_equal_sizes_can_all_be_had_exactly() -> None:
    curves = [exponential(f"t{k}", 100 + k, 1.0) for k in range(40)]
    assert set(choose(curves, 4.0).values()) == {4.0}
