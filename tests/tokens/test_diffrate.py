"""DiffRate: one block against loops, and the search for a schedule."""

from functools import partial

import pytest
import torch

from tcw.tokens import Shape
from tcw.tokens._schedules import Schedule, even, search
from tcw.tokens.context import Context
from tcw.tokens.diffrate import Diffrate
from tcw.tokens.tower import TowerRun

from .contexts import best, cosines, image
from .models import TOWERS

TOWER = Shape(blocks=4, layers=0, has_cls=True, tokens=36)


def seen(seed: int) -> Context:
    return image((1, 4, 6), seed=seed, rows=1, text=1, alive=19)


@pytest.mark.parametrize(
    ("k", "pruned", "drops"), [(12, 0.5, 4), (12, 0.0, 0), (12, 1.0, 7), (1, 0.3, 5), (18, 0.5, 1)]
)
@pytest.mark.parametrize("sizes", ["counted", "similar"])
def test_a_block(k: int, pruned: float, drops: int, sizes: str) -> None:
    """The first by importance stay, the last are dropped, those between are merged: means of tokens, not of sizes."""
    context = seen(k)
    assert context.rows is not None
    (stage, *_) = Diffrate(pruned=pruned, sizes=sizes).stages(TOWER, {})
    plan = stage.plan(context, k)
    importance = context.rows.attention.double().mean((0, 1)).tolist()
    kept = best(importance, k)
    assert plan.keep.tolist() == kept
    rest = sorted((i for i in range(19) if i not in kept), key=lambda i: (-importance[i], i))
    alike, groups, size = cosines(context.x), {i: [i] for i in kept}, {i: float(context.size[i]) for i in kept}
    for i in rest[: len(rest) - drops]:
        to = max(kept, key=lambda j: (alike[i][j], -j))
        groups[to].append(i)
        size[to] += float(context.size[i]) * (max(0.0, alike[i][to]) if sizes == "similar" else 1.0)
    assert int((plan.assign < 0).sum()) == drops
    for row, total, token in zip(plan.apply(context.x), plan.size.tolist(), kept, strict=True):
        torch.testing.assert_close(row, context.x[groups[token]].mean(0), rtol=1e-5, atol=1e-6)
        assert total == pytest.approx(size[token], rel=1e-5)


def test_without_a_class_token() -> None:
    notes: list[str] = []
    context = image((1, 3, 3), rows=1, text=None)
    context.note = notes.append
    Diffrate().stages(TOWER, {})[0].plan(context, 4)
    assert len(notes) == 1
    assert "no class token" in notes[0]


def test_the_uniform_schedule() -> None:
    method = Diffrate(keep=0.4)
    assert [stage.keep for stage in method.stages(TOWER, {})] == pytest.approx([0.85, 0.7, 0.55, 0.4])
    assert not method.needs_calibration
    assert not Diffrate.needs_calibration
    assert Diffrate(schedule="search").needs_calibration
    assert not Diffrate(schedule="search").reads_text()


def test_even() -> None:
    assert even(3, 100, 30, 0.5) == [(5, 5)] * 3
    assert even(4, 10, 6, 0.0) == [(0, 2), (0, 1), (0, 2), (0, 1)]
    assert sum(map(sum, even(5, 37, 17, 0.3))) == 17
    assert sum(map(sum, even(4, 4, 100, 1.0))) == 3


def cost(schedule: Schedule) -> float:
    left, total = 40, 0.0
    for drops, merges in schedule:
        total += left**2 + 10 * left
        left -= drops + merges
    return total


@pytest.mark.parametrize("step", [1, 4])
def test_the_search_finds_what_errs_least(step: int) -> None:
    """An error that only grows with what the first block does, and with drops anywhere."""

    def error(schedule: Schedule) -> float:
        asked.append(schedule)
        return 10.0 * sum(schedule[0]) + sum(drops for drops, _ in schedule)

    asked: list[Schedule] = []
    start = even(4, 40, 24, 0.5)
    found = search(error, cost, start, 40, step=step, rounds=3)
    assert cost(found) <= cost(start)
    assert sum(found[0]) < sum(start[0])
    assert sum(drops for drops, _ in found) == 0
    tried = list(asked)
    assert error(found) == min(map(error, tried))
    for schedule in tried[1:]:
        assert all(sum(pair) % step == 0 for pair in schedule) or sum(map(sum, schedule)) == 39
    assert all(sum(map(sum, schedule)) < 40 for schedule in tried)


def test_the_start_stays_where_nothing_is_better() -> None:
    start = even(3, 40, 20, 0.5)
    assert search(lambda schedule: float(schedule != start), cost, start, 40, step=4) == start


@torch.no_grad()
def test_a_schedule_that_was_searched_for() -> None:
    """It costs no more than the uniform one and errs less, on the images that it was found on."""
    tower = TOWERS["dinov2"]()
    images = list(torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(2)))
    method = Diffrate(keep=0.4, schedule="search", granularity=2)
    learned = method.calibrate(tower, images)
    assert learned["schedule"].shape == (4, 2)
    assert learned["patches"] == 36
    pixels = torch.stack(images)
    dense = tower(pixels).last_hidden_state.double()

    def error(stages: list) -> float:
        with TowerRun(tower, stages) as run:
            hidden = tower(pixels)[0]
            patches = run.read_out(hidden).double()
        total = 0.0
        for number in range(3):
            off = [
                1 - float(torch.cosine_similarity(a, b, 0))
                for a, b in zip(patches[number], dense[number, 1:], strict=True)
            ]
            total += sum(off) / 36 + 1 - float(torch.cosine_similarity(hidden[number, 0].double(), dense[number, 0], 0))
        return total

    found = [(stage.at.of(4), stage) for stage in method.stages(TOWER, learned)]
    uniform = [(stage.at.of(4), stage) for stage in Diffrate(keep=0.4).stages(TOWER, {})]
    assert error(found) < error(uniform)

    left = 36 - learned["schedule"].sum(1).cumsum(0)
    assert [stage.keep for _, stage in found] == pytest.approx(
        [int(n) / 36 for n in left.unique_consecutive() if n < 36]
    )
    with TowerRun(tower, found) as run:
        tower(pixels)
        assert {plan.kept for plan in run.plans} == {int(left[-1])}


def test_what_is_refused() -> None:
    for options in ({"pruned": 1.5}, {"granularity": 0}, {"rounds": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            partial(Diffrate, **options)()
