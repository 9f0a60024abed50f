"""PyramidKV: a straight line of whole tokens that adds up to the budget, and another method's scores."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcw.errors import UnknownName, UsageError
from tcw.kv import Group, LayerShape
from tcw.kv._layer_budgets import whole
from tcw.kv.pyramidkv import Pyramidkv
from tcw.methods import build

from .attention_calls import random_call, scored

BUDGETS = st.one_of(
    st.floats(0.01, 1).map(lambda share: {"ratio": share}), st.integers(40, 9000).map(lambda count: {"tokens": count})
)


def limits(method: Pyramidkv, layers: int, seen: int) -> list[int]:
    shapes = [LayerShape(2 * depth, depth, layers, 4, 2, 8, 8, torch.float32) for depth in range(layers)]
    return [method.groups(shape, {})[0].limit(seen) for shape in shapes]


def line(layers: int, mean: float, most: float, beta: int) -> list[float]:
    """The paper's code: the top layer, the bottom layer, and steps between."""
    top = mean / beta
    bottom = 2 * mean - top
    if bottom >= most:
        bottom = most
        top = 2 * mean - bottom
    return [bottom - depth * (bottom - top) / (layers - 1) for depth in range(layers)]


@pytest.mark.parametrize(("seen", "ratio"), [(1000, 0.25), (1000, 0.5), (1000, 0.8), (4000, 0.1)])
def test_the_papers_line(seen: int, ratio: float) -> None:
    found = limits(Pyramidkv(ratio=ratio), 30, seen)
    expected = line(30, ratio * seen - 36, seen - 36, 20)
    assert all(abs(f - 36 - e) < 1 for f, e in zip(found, expected, strict=True))
    assert sum(found) == 30 * round(ratio * seen)


@given(
    layers=st.integers(1, 90), seen=st.integers(0, 20000), beta=st.integers(1, 60),
    budget=BUDGETS,
)  # fmt: skip
def test_no_token_is_lost(layers: int, seen: int, beta: int, budget: dict) -> None:
    method = Pyramidkv(beta=beta, **budget)
    found = limits(method, layers, seen)
    mean = method.mean_tokens(seen, LayerShape(0, 0, layers, 4, 2, 8, 8, torch.float32))
    assert sum(found) == layers * mean
    assert all(min(seen, 36) <= f <= seen for f in found)
    assert all(later <= earlier + 1 for earlier, later in pairwise(found))


@given(st.lists(st.fractions(0, 50, max_denominator=97), max_size=40))
def test_rounding_keeps_every_first_sum(parts: list[Fraction]) -> None:
    found = whole(parts)
    for count in range(len(parts) + 1):
        assert abs(sum(found[:count]) - sum(parts[:count])) <= Fraction(1, 2)
    assert all(p // 1 <= f <= -(-p // 1) for p, f in zip(parts, found, strict=True))


def test_scores_are_the_named_methods() -> None:
    call, layer = random_call(queries=20), LayerShape(0, 0, 2, 4, 2, 8, 8, torch.float32)
    for name in ("snapkv", "h2o", "random"):
        theirs = build(name, {}).scorer(layer, Group((0, 1)), {})
        mine = Pyramidkv(score=name).scorer(layer, Group((0, 1)), {})
        torch.testing.assert_close(scored(mine, call), scored(theirs, call))


def test_what_the_named_method_needs() -> None:
    assert not Pyramidkv().needs_calibration
    assert not Pyramidkv().needs_rope
    assert not Pyramidkv.needs_calibration
    wanting = build("pyramidkv", {"score": "triattention"})
    assert wanting.needs_calibration
    assert wanting.needs_rope
    assert wanting == Pyramidkv(score="triattention")


def test_calibration_is_the_named_methods(monkeypatch) -> None:
    method = Pyramidkv(score="triattention")
    monkeypatch.setattr(type(method.scoring), "calibrate", lambda self, session: {"0.centre": session})
    assert method.calibrate("a session") == {"0.centre": "a session"}


def test_options_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="does not score"):
        build("pyramidkv", {"score": "kivi"})
    with pytest.raises(UsageError, match="no KV policy"):
        build("pyramidkv", {"score": "int8"})
    with pytest.raises(UnknownName):
        build("pyramidkv", {"score": "snapvk"})
    with pytest.raises(UsageError):
        build("pyramidkv", {"beta": 0})
