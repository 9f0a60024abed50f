"""Crops share a budget by their density, and keep what the class token looks at."""

import math
from dataclasses import replace

import pytest
import torch

from tcw.tokens import Shape
from tcw.tokens.context import Context, Looked, TowerView
from tcw.tokens.plan import Plan
from tcw.tokens.token_corr import TokenCorr, crops_of

from .contexts import best, class_row, cosines, image

VLM = Shape(blocks=24, layers=32, has_cls=True)


def planned(context: Context, k: int, **options: float | bool) -> Plan:
    plan = TokenCorr(**options).stages(VLM, {})[0].plan(context, k)  # type: ignore[arg-type]
    plan.check(context.tokens, k)
    return plan


def blank(context: Context, crop: int, patches: int) -> Context:
    """The same image with some patches of a crop that have the same key."""
    view = context.tower
    assert view is not None
    looked = list(view.looked[3])
    one = looked[crop]
    keys = one.keys.clone()
    keys[:, 1 : 1 + patches] = keys[:, 1:2]
    looked[crop] = Looked(one.queries, keys, one.scaling, one.cls)
    return replace(context, tower=replace(view, looked={3: looked}))


def densities(context: Context, alike: float, counterparts: float) -> list[float]:
    assert context.tower is not None
    found = []
    for one in context.tower.looked[3]:
        cosine = cosines(one.mean_keys())
        n = len(cosine)
        redundant = sum(
            sum(cosine[i][j] > alike for j in range(n) if j != i) > math.ceil(counterparts * n) for i in range(n)
        )
        found.append(1 - redundant / n)
    return found


def per_crop(plan: Plan, patches: int, crops: int) -> list[int]:
    return [int(((plan.keep // patches) == crop).sum()) for crop in range(crops)]


def test_crops() -> None:
    """Whatever the order in which the language model gets them, and after cuts."""
    context = image((3, 4, 5), seed=1, layers=(3,), alive=30)
    assert [tokens.tolist() for tokens in crops_of(context)] == [
        [i for i, one in enumerate(context.alive.tolist()) if one // 20 == crop] for crop in range(3)
    ]
    view = context.tower
    assert view is not None
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    mixed = replace(context, tower=TowerView(view.depth, True, view.looked, lambda x: view.arrange(x)[order]))
    assert sorted(torch.cat(crops_of(mixed)).tolist()) == list(range(30))
    for crop, tokens in enumerate(crops_of(mixed)):
        assert {int(context.alive[order[t]]) // 20 for t in tokens} == {crop}


@pytest.mark.parametrize("k", [6, 15, 24])
def test_budgets_go_by_density(k: int) -> None:
    context = blank(blank(image((3, 4, 5), seed=2, layers=(3,)), 1, 15), 2, 8)
    found = densities(context, 0.8, 0.02)
    assert found[0] > found[2] > found[1] > 0
    counts = per_crop(planned(context, k), 20, 3)
    assert sum(counts) == k
    for count, one in zip(counts, found, strict=True):
        assert abs(count - k * one / sum(found)) < 1


@pytest.mark.parametrize("k", [1, 2, 7, 30])
def test_in_each_crop_the_class_token_decides(k: int) -> None:
    context = image((3, 4, 5), seed=3, layers=(3,))
    assert context.tower is not None
    plan = planned(context, k)
    for crop, count in enumerate(per_crop(plan, 20, 3)):
        expected = best(class_row(context.tower.looked[3][crop]).tolist(), count)
        assert [i - 20 * crop for i in plan.keep.tolist() if i // 20 == crop] == expected


def test_merging_stays_in_the_crop() -> None:
    context = image((2, 4, 5), seed=4, layers=(3,))
    plan = planned(context, 9)
    cosine = cosines(context.x)
    for i, place in enumerate(plan.assign.tolist()):
        mine = [j for j in plan.keep.tolist() if j // 20 == i // 20]
        expected = i if i in mine else max(mine, key=lambda j: cosine[i][j])
        assert plan.keep[place] == expected
    assert float(plan.size.sum()) == 40
    dropped = planned(context, 9, merge=False)
    assert torch.equal(dropped.keep, plan.keep)
    assert not dropped.merges


def test_an_image_in_one_piece() -> None:
    context = image((1, 4, 5), seed=5, layers=(3,))
    assert context.tower is not None
    assert planned(context, 6).keep.tolist() == best(class_row(context.tower.looked[3][0]).tolist(), 6)


def test_images_of_a_sample_share_the_budget() -> None:
    stage = TokenCorr(keep=0.25).stages(VLM, {})[0]
    full = image((1, 4, 5), seed=6, layers=(3,))
    empty = blank(image((1, 4, 5), seed=7, layers=(3,)), 0, 18)
    assert stage.allocate is not None
    counts = stage.allocate([empty, full], 0.25)
    assert sum(counts) == 10
    assert counts[0] < counts[1]


def test_without_class_token() -> None:
    said: list[str] = []
    context = replace(image((2, 3, 4), seed=8, layers=(3,), cls=False, text=None), note=said.append)
    assert planned(context, 5).kept == 5
    assert "no class token" in said[0]
