"""FlashVLM's score against loops in float64, and which half goes by it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tcw.tokens import Shape
from tcw.tokens.context import Context
from tcw.tokens.flashvlm import LEAST, Flashvlm, sharpened

from .contexts import best, class_row, image

VLM = Shape(blocks=24, layers=32, has_cls=True, tokens=576)


def to_unit(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(one - low) / (high - low) if high > low else 1.0 for one in values]


def slow_sharpened(relevance: list[float], temperature: float, power: float, spared: float) -> list[float]:
    weights = [math.exp((one - max(relevance)) / temperature) for one in relevance]
    found = to_unit([(one / sum(weights)) ** power for one in weights])
    ordered, at = sorted(found), (1 - spared) * (len(found) - 1)
    below = ordered[math.floor(at)]
    edge = below + (at - math.floor(at)) * (ordered[math.ceil(at)] - below)
    return to_unit([one if one >= edge - 1e-12 else 0.1 * one for one in found])


def slow_likeness(context: Context) -> list[float]:
    """The soft maximum over text tokens."""
    assert context.text is not None
    found = []
    for x in context.x.double():
        cosine = [float(x @ t / (x.norm() * t.norm())) for t in context.text.double()]
        weights = [math.exp(one / 0.05) for one in cosine]
        found.append(sum(w * c for w, c in zip(weights, cosine, strict=True)) / sum(weights))
    return found


@pytest.mark.parametrize(("temperature", "power", "spared"), [(0.5, 1.0, 0.3), (0.2, 2.5, 0.05), (1.0, 2.0, 1.0)])
def test_sharpened(temperature: float, power: float, spared: float) -> None:
    relevance = torch.rand(24, generator=torch.Generator().manual_seed(1))
    expected = slow_sharpened(relevance.double().tolist(), temperature, power, spared)
    assert sharpened(relevance, temperature, power, spared).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_score(share: float) -> None:
    """The weighted geometric mean of attention and likeness, neither below 1e-6."""
    method = Flashvlm(text=share, temperature=0.1)
    context = image((1, 4, 5), seed=3, layers=(3,))
    assert context.tower is not None
    attention = to_unit(class_row(context.tower.looked[3][0]).tolist())
    likeness = slow_sharpened(slow_likeness(context), 0.1, 2.5, 0.005)
    expected = [max(a, LEAST) ** (1 - share) * max(t, LEAST) ** share for a, t in zip(attention, likeness, strict=True)]
    assert method.score(context).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_half_by_score() -> None:
    """The first half is the highest scores; the others come from the rest."""
    method = Flashvlm(temperature=0.1)
    context = image((1, 5, 6), seed=4, layers=(3,))
    plan = method.stages(VLM, {})[0].plan(context, 10)
    assert set(best(method.score(context).tolist(), 5)) <= set(plan.keep.tolist())
    assert plan.kept == 10
    assert not plan.merges


def test_diverse_half_has_few_copies() -> None:
    """Two thirds of the tokens are one and the same; few of those stay."""
    context = image((1, 5, 6), seed=4, layers=(3,))
    x = context.x.clone()
    x[10:] = x[10]
    plan = Flashvlm(important=0.0).stages(VLM, {})[0].plan(replace(context, x=x), 12)
    assert int((plan.keep >= 10).sum()) <= 4


def words(context: Context) -> tuple[Context, list[str]]:
    said: list[str] = []
    return replace(context, note=said.append), said


@pytest.mark.parametrize("text", [None, torch.zeros(0, 12)])
def test_without_text(text: Tensor | None) -> None:
    """By attention alone, and it is said."""
    context, said = words(replace(image((1, 4, 5), seed=3, layers=(3,)), text=text))
    assert context.tower is not None
    expected = [max(one, LEAST) for one in to_unit(class_row(context.tower.looked[3][0]).tolist())]
    assert Flashvlm().score(context).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert "no text" in said[0]


def test_without_class_token() -> None:
    context, said = words(image((1, 4, 5), seed=3, layers=(3,), cls=False))
    assert Flashvlm().stages(VLM, {})[0].plan(context, 7).kept == 7
    assert "no class token" in said[0]


@pytest.mark.parametrize("options", [{"text": 1.5}, {"important": -0.1}, {"spared": 2.0}, {"temperature": 0.0}])
def test_options_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Flashvlm(**options)  # type: ignore[arg-type]
