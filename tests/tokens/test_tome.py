"""ToMe: matching against loops in float64, and how many tokens each block leaves."""

import pytest
import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.tokens import INPUT, Shape
from tcw.tokens._matching import edges, matched, merged, shares
from tcw.tokens.tome import Tome
from tcw.tokens.tower import TowerRun

from .contexts import cosines, image
from .models import TOWERS, VLMS

TOWER = Shape(blocks=4, layers=0, has_cls=True, tokens=36)


def slow_edges(features: Tensor) -> list[tuple[float, int, int]]:
    """Of each even token: how alike the most similar odd one is, both numbers."""
    alike = cosines(features)
    found = []
    for a in range(0, len(features), 2):
        odd = range(1, len(features), 2)
        best = max(odd, key=lambda b: (alike[a][b], -b))
        found.append((alike[a][best], a, best))
    return found


def random(tokens: int, seed: int) -> Tensor:
    return torch.randn(tokens, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [2, 3, 7, 12, 25])
def test_edges(tokens: int) -> None:
    features = random(tokens, tokens)
    alike, a, b = edges(features)
    expected = slow_edges(features)
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == [(i, j) for _, i, j in expected]
    assert alike.tolist() == pytest.approx([one for one, _, _ in expected], abs=1e-6)
    assert [len(part) for part in edges(features[:1])] == [0, 0, 0]


@pytest.mark.parametrize(("tokens", "k"), [(2, 1), (7, 5), (12, 6), (12, 11), (25, 13)])
def test_the_strongest_edges_are_merged(tokens: int, k: int) -> None:
    """By size: a token that stands for three counts three times."""
    features, size = (
        random(tokens, 1),
        torch.randint(1, 4, (tokens,), generator=torch.Generator().manual_seed(2)).float(),
    )
    strongest = sorted(slow_edges(features), key=lambda edge: (-edge[0], edge[1]))[: tokens - k]
    groups = {i: [i] for i in range(tokens)}
    for _, a, b in strongest:
        groups[b] += groups.pop(a)
    plan = matched(features, size, k)
    assert plan.keep.tolist() == sorted(groups)
    x = random(tokens, 9)
    for token, row, total in zip(plan.keep.tolist(), plan.apply(x), plan.size.tolist(), strict=True):
        weights = size[groups[token]].double()
        mean = (x[groups[token]].double() * weights[:, None]).sum(0) / weights.sum()
        torch.testing.assert_close(row.double(), mean, rtol=1e-5, atol=1e-6)
        assert total == weights.sum()


def test_matching_again_where_half_is_not_enough() -> None:
    features, size = random(20, 4), torch.ones(20)
    once = matched(features, size, 10)
    twice = matched(once.apply(features), once.size, 6)
    plan = matched(features, size, 6)
    assert torch.equal(plan.keep, once.then(twice).keep)
    assert torch.equal(plan.assign, once.then(twice).assign)
    slowly = matched(features, size, 14, most=0.2)
    first = matched(features, size, 16)
    assert torch.equal(slowly.assign, first.then(matched(first.apply(features), first.size, 14, most=0.2)).assign)
    assert matched(features, size, 20).kept == 20
    assert matched(features, size, 1).size.tolist() == [20.0]


def test_two_edges_into_one_token() -> None:
    plan = merged(torch.tensor([0, 4]), torch.tensor([3, 3]), torch.tensor([1.0, 1, 1, 2, 3]))
    assert plan.keep.tolist() == [1, 2, 3]
    assert plan.assign.tolist() == [2, 0, 1, 2, 2]
    assert plan.size.tolist() == [1, 1, 6]


def test_shares() -> None:
    assert shares(0.4, [1.0] * 3) == pytest.approx([0.8, 0.6, 0.4])
    assert shares(1.0, [1.0] * 3) == pytest.approx([1, 1, 1])
    falling = shares(0.4, [2.0, 1.0, 0.0])
    assert falling == pytest.approx([0.6, 0.4, 0.4])
    tight = shares(0.1, [1.0] * 4)
    assert tight[-1] == 0.1
    steps = [a / b for a, b in zip(tight, [1.0, *tight], strict=False)]
    assert min(steps) >= 0.5 - 1e-9
    gone = [a - b for a, b in zip([1.0, *tight], tight, strict=False)]
    assert gone[0] == pytest.approx(gone[1])
    assert steps[-1] == pytest.approx(0.5)
    with pytest.raises(UsageError, match=r"keep=0\.05.*leave 0\.0625"):
        shares(0.05, [1.0] * 4)


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        (Tome(keep=0.5), [32, 27, 23, 18]),
        (Tome(keep=0.5, first=2), [27, 18]),
        (Tome(keep=0.5, schedule="decreasing"), [27, 21, 18]),
        (Tome(keep=0.2, schedule="single"), [7]),
    ],
)
def test_in_a_tower(method: Tome, kept: list[int]) -> None:
    tower = TOWERS["dinov2"]()
    stages = [(stage.at.of(4), stage) for stage in method.stages(TOWER, {})]
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with TowerRun(tower, stages) as run:
        hidden = tower(pixels)[0]
        traces = run.traces()
    assert hidden.shape == (2, 1 + kept[-1], 32)
    for trace in traces:
        assert [plan.kept for _, plan in trace.cuts] == kept
        assert all(float(plan.size.sum()) == 36 for _, plan in trace.cuts)


def test_it_looks_at_keys() -> None:
    (stage,) = Tome(keep=0.6, schedule="single").stages(TOWER, {})
    context = image((1, 4, 5), layers=stage.layers(4))
    keys = context.tower.looked[3][0].keys[:, 1:].double().mean(0) if context.tower else torch.zeros(0)
    plan = stage.plan(context, 16)
    strongest = sorted(slow_edges(keys), reverse=True)[:4]
    assert sorted(set(range(20)) - set(plan.keep.tolist())) == sorted(a for _, a, _ in strongest)


def test_where_the_tower_needs_its_grid() -> None:
    (stage,) = Tome().stages(Shape(blocks=4, layers=6, has_cls=False, merges_inside=False), {})
    assert stage.at == INPUT
    assert stage.keep == 0.25


def test_in_a_vision_language_model() -> None:
    model = VLMS["llava"]()
    tower = model.model.vision_tower
    stages = [(stage.at.of(3), stage) for stage in Tome(keep=0.5).stages(Shape(3, 5, True, 36), {})]
    with TowerRun(tower, stages, restore=True) as run:
        options = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "return_dict": True}
        (features,) = model.model.get_image_features(torch.randn(1, 3, 48, 48), **options).pooler_output
        (plan,) = run.plans
    assert len(features.unique(dim=0)) == plan.kept == 18
    assert torch.equal(features, features[plan.keep][plan.assign])


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="first"):
        Tome(first=-1)
    with pytest.raises(ValueError, match="depth"):
        Tome(depth=1.0)
    with pytest.raises(UsageError, match="first=4"):
        Tome(first=4).stages(TOWER, {})
    with pytest.raises(UsageError, match="half of the tokens"):
        Tome(keep=0.05).stages(TOWER, {})
