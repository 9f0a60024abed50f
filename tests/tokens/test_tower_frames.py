"""Frames of a video as a batch of a tower, planned as one."""

import pytest
import torch
from torch import Tensor

from tcw.tokens.context import Context
from tcw.tokens.plan import Plan
from tcw.tokens.tower import TowerRun

from .models import TOWERS
from .towers import PATCHES, cut, into_first, sliced, special


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_frames_planned_as_one(name: str, pixels: Tensor) -> None:
    """Frames come out with different numbers of tokens; one has none left and spoils nothing."""
    tower = TOWERS[name]()
    kept = torch.tensor([3, 7, 40, 41, 45, 60])

    def plan(context: Context, k: int | None) -> Plan:
        assert (context.grid, context.original, k) == ((3, 6, 6), 108, 6)
        assert context.place[[0, 40, 107]].tolist() == [[0, 0, 0], [1, 0, 4], [2, 5, 5]]
        assert context.text is None or context.text.shape == (3, 32)
        return Plan.dropping(kept, context.size)

    def later(context: Context, k: int | None) -> Plan:
        assert context.tower is not None
        assert len(context.tower.cls((-1,))) == len(context.tower.keys()) == context.tokens
        assert context.rows is not None
        assert context.rows.attention.shape == (4, 1, 6)
        return Plan.merging(torch.tensor([0, 2, 3, 4, 5]), torch.tensor([0, 1, 1, 2, 3, 4]), context.size)

    left = [torch.tensor(keep) for keep in ([3, 7], [4, 5, 9, 24])]
    expected = [sliced(tower, image, [(1, keep)]) for image, keep in zip(pixels, left, strict=False)]
    stages = [cut(1, plan, 0.06, whole=True), cut(2, later, None, whole=True, layers=lambda n: (n - 1,))]
    with TowerRun(tower, stages[:1]) as run:
        hidden = tower(pixels)[0]
        assert len(run.plans) == 1
        assert run.traces()[0].grid == (3, 6, 6)
        assert hidden.shape[1] == special(tower) + 4
        for out, one in zip(hidden, expected, strict=False):
            torch.testing.assert_close(out[: len(one)], one, rtol=1e-5, atol=1e-5)
        read = run.read_out(hidden)
        assert read.shape == (3, PATCHES, 32)
        assert read.isfinite().all()
        assert torch.equal(read[1, 5], hidden[1, special(tower) + 1])
    with TowerRun(tower, stages) as run:
        hidden = tower(pixels)[0]
        assert torch.equal(run.plans[0].keep, kept[[0, 2, 3, 4, 5]])
        assert hidden.isfinite().all()
        assert torch.equal(run.read_out(hidden)[0, 7], hidden[1, special(tower)])


def test_one_by_one_after_frames_as_one(pixels: Tensor) -> None:
    tower = TOWERS["vit"]()

    def frames(context: Context, k: int | None) -> Plan:
        return Plan.dropping(torch.arange(0, 108, 2), context.size)

    seen: list[Context] = []

    def each(context: Context, k: int | None) -> Plan:
        seen.append(context)
        return into_first(context, k)

    with TowerRun(tower, [cut(1, frames, whole=True), cut(2, each, 0.25)]) as run:
        tower(pixels)
        (plan,) = run.plans
    assert [one.grid for one in seen] == [(1, 6, 6)] * 3
    assert [one.alive.tolist() for one in seen] == [list(range(0, 36, 2))] * 3
    assert [one.place[1].tolist() for one in seen] == [[0, 0, 2]] * 3
    assert plan.keep.tolist() == [36 * f + 2 * i for f in range(3) for i in range(9)]
    assert plan.assign[18 + 36] == 9
    assert plan.size.tolist() == [2.0] * 27
