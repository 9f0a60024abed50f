"""Frames, segments and plans put together of parts, against loops."""

import itertools

import pytest
import torch

from tcw.tokens._frames import after, evenly, frames_of, joined, part_of, pooled, segments
from tcw.tokens.merges import nearest_mean, ot
from tcw.tokens.plan import Plan

from .contexts import image


def slow_segments(x: torch.Tensor, threshold: float, least: int) -> list[list[int]]:
    x = x.double()
    alike = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.pairwise(x)]
    cuts = [i for i, one in enumerate(alike) if one < threshold]
    for i in sorted(range(len(alike)), key=lambda i: (alike[i], i)):
        if len(cuts) + 1 < least and i not in cuts:
            cuts.append(i)
    found: list[list[int]] = [[]]
    for frame in range(len(x)):
        found[-1].append(frame)
        if frame in cuts:
            found.append([])
    return [one for one in found if one]


@pytest.mark.parametrize("frames", [1, 2, 5, 11])
@pytest.mark.parametrize("least", [1, 3, 20])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.4, 1.1])
def test_segments(frames: int, least: int, threshold: float) -> None:
    x = torch.randn(frames, 3, generator=torch.Generator().manual_seed(frames))
    found = segments(x, threshold, least)
    assert [list(one) for one in found] == slow_segments(x, threshold, least)


def test_segments_end_where_the_scene_changes() -> None:
    scenes = torch.eye(3)[[0, 0, 0, 1, 1, 2]] + 0.01
    assert [list(one) for one in segments(scenes, 0.9, 1)] == [[0, 1, 2], [3, 4], [5]]
    assert [list(one) for one in segments(torch.ones(4, 2), 0.9, 3)] == [[0], [1], [2, 3]]  # all alike: the first ones


def test_frames_with_tokens_missing() -> None:
    context = image((4, 3, 5), seed=3, alive=17)
    frames = frames_of(context)
    assert torch.cat(frames).tolist() == list(range(17))
    for tokens in frames:
        assert context.place[tokens, 0].unique().numel() == 1
    means = pooled(context.x, frames)
    for tokens, mean in zip(frames, means, strict=True):
        expected = sum(context.x[i].double() for i in tokens) / len(tokens)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_part_sees_its_own_tokens() -> None:
    context = image((2, 3, 4), seed=1, layers=(3,), alive=20)
    tokens = torch.tensor([2, 7, 11])
    part = part_of(context, tokens)
    assert part.alive.tolist() == context.alive[tokens].tolist()
    assert part.tower is not None
    assert context.tower is not None
    torch.testing.assert_close(part.tower.cls((3,)), context.tower.cls((3,))[tokens])


@pytest.mark.parametrize("merge", [nearest_mean(), ot()])
def test_joined(merge) -> None:  # type: ignore[no-untyped-def]
    """The plan of all does to each part what the part's plan does; parts may be interleaved."""
    context = image((1, 4, 5), seed=2, alive=18)
    parts = [torch.arange(0, 18, 2), torch.arange(1, 18, 2)]
    plans = [merge(part_of(context, tokens), torch.tensor([1, 4, 6])) for tokens in parts]
    plan = joined(context, list(zip(parts, plans, strict=True)))
    plan.check(18, 6)
    left = plan.apply(context.x)
    for tokens, one in zip(parts, plans, strict=True):
        expected = one.apply(context.x[tokens])
        for j, token in enumerate(tokens[one.keep].tolist()):
            place = plan.keep.tolist().index(token)
            torch.testing.assert_close(left[place], expected[j])
            assert plan.size[place] == one.size[j]
    assert float(plan.size.sum()) == pytest.approx(float(context.size.sum()), rel=1e-5)


def test_joined_with_a_part_of_which_nothing_stays() -> None:
    context = image((1, 1, 6), seed=2)
    parts = [torch.tensor([0, 2]), torch.tensor([1, 3, 4, 5])]
    none = Plan.dropping(torch.zeros(0, dtype=torch.int64), context.size[parts[0]])
    plan = joined(context, [(parts[0], none), (parts[1], Plan.dropping(torch.tensor([3, 0]), context.size[parts[1]]))])
    assert plan.keep.tolist() == [1, 5]
    assert plan.assign.tolist() == [-1, 0, -1, -1, -1, 1]


def test_after() -> None:
    context = image((1, 4, 5), seed=4, alive=12)
    plan = nearest_mean()(context, torch.tensor([0, 5, 9]))
    left = after(context, plan)
    assert left.alive.tolist() == context.alive[[0, 5, 9]].tolist()
    torch.testing.assert_close(left.x, plan.apply(context.x))
    assert torch.equal(left.size, plan.size)


@pytest.mark.parametrize("count", [1, 2, 7, 24])
def test_evenly(count: int) -> None:
    for k in range(1, count + 1):
        found = evenly(count, k, torch.device("cpu")).tolist()
        assert found == sorted(set(found))
        assert len(found) == k
        assert found[0] >= 0
        assert found[-1] < count
        assert abs(found[0] - (count - 1 - found[-1])) <= 1  # as far from one end as from the other
        steps = {b - a for a, b in itertools.pairwise(found)}
        assert not steps or max(steps) - min(steps) <= 1
    assert evenly(5, 0, torch.device("cpu")).tolist() == []
