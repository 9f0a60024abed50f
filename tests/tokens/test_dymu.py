"""DyMU: thresholds against loops, and what they merge."""

import pytest
import torch
from torch import Tensor

from tcw.tokens import Shape
from tcw.tokens.dymu import Dymu
from tcw.tokens.tower import TowerRun
from tcw.tokens.watch import Recording

from .contexts import image
from .models import TOWERS
from .test_tome import slow_edges

TOWER = Shape(blocks=4, layers=0, has_cls=True, tokens=36)


@pytest.fixture
def images() -> list[Tensor]:
    """Some of one colour but for noise, some not."""
    source = torch.Generator().manual_seed(4)
    plain = [torch.randn(3, 1, 1, generator=source) + 0.3 * torch.randn(3, 48, 48, generator=source) for _ in range(3)]
    return [*plain, *torch.randn(3, 3, 48, 48, generator=source)]


def test_the_thresholds_of_the_first_block(images: list[Tensor]) -> None:
    """The first edge that is not among the r·b strongest of a batch; the mean over batches, and their spread."""
    tower = TOWERS["clip"]()
    learned = Dymu(keep=0.5, batch=2).calibrate(tower, images)
    recording = Recording(tower, [0])
    tower(torch.stack(images))
    ((_, keys, _),) = recording.calls[0]
    recording.detach()
    found = []
    for first in (0, 2, 4):
        strengths: list[float] = []
        for one in keys[first : first + 2]:
            strengths += [alike for alike, _, _ in slow_edges(one[:, 1:].double().mean(0))]
        strengths.sort(reverse=True)
        found.append(strengths[9])  # r is 36 / 8 a picture, and there are 2
    expected = torch.tensor(found, dtype=torch.float64)
    assert learned["thresholds"].dtype == torch.float32
    torch.testing.assert_close(learned["thresholds"][0].double(), expected.mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(learned["spread"][0].double(), expected.std(correction=0), rtol=1e-4, atol=1e-5)
    assert learned["thresholds"].shape == learned["spread"].shape == (4,)
    assert bool((learned["thresholds"] >= 0).all())


def run(method: Dymu, learned: dict[str, Tensor], images: Tensor) -> list[int]:
    tower = TOWERS["clip"]()
    stages = [(stage.at.of(4), stage) for stage in method.stages(TOWER, learned)]
    with TowerRun(tower, stages) as tokens:
        tower(images)
        return [plan.kept for plan in tokens.plans]


def test_the_batch_that_it_was_learned_on(images: list[Tensor]) -> None:
    """It merges as much as ToMe would, but more of plain pictures; the thresholds know nothing of the batch."""
    method = Dymu(keep=0.5)
    learned = method.calibrate(TOWERS["clip"](), images)
    assert not learned["spread"].any()
    kept = run(method, learned, torch.stack(images))
    assert sum(kept) == 6 * 36 - 4 * 27  # round(4.5 x 6) a block
    assert max(kept[:3]) < min(kept[3:])
    alone = [run(method, learned, one[None])[0] for one in images]
    assert alone == kept


def test_pictures_of_several_sizes(images: list[Tensor]) -> None:
    tower = TOWERS["dinov2"]()
    learned = Dymu(batch=4).calibrate(tower, [*images, torch.randn(3, 32, 64)])
    assert learned["thresholds"].isfinite().all()
    assert learned["spread"].any()


def test_only_what_is_above_the_threshold() -> None:
    learned = {"thresholds": torch.tensor([0.2, 1.1, -1.1, 0.5])}
    stages = Dymu().stages(TOWER, learned)
    context = image((1, 5, 5), layers=[3])
    assert context.tower is not None
    keys = context.tower.looked[3][0].keys[:, 1:].double().mean(0)
    for stage, threshold in zip(stages, learned["thresholds"].tolist(), strict=True):
        assert stage.keep is None
        gone = sorted(a for alike, a, _ in slow_edges(keys) if alike > threshold)
        plan = stage.plan(context, None)
        assert sorted(set(range(25)) - set(plan.keep.tolist())) == gone
        assert plan.size.sum() == 25


def test_a_model_that_reads_fewer_blocks() -> None:
    assert len(Dymu().stages(Shape(3, 5, True, 36), {"thresholds": torch.ones(4)})) == 3


def test_options() -> None:
    assert Dymu.needs_calibration
    assert not Dymu().reads_text()
    assert Dymu().expand
    with pytest.raises(ValueError, match="batch"):
        Dymu(batch=0)
