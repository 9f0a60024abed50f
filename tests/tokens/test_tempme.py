"""TempMe: clips that are joined, and merging that stays within them."""

import pytest
import torch

from tcw.tokens import INPUT, Shape
from tcw.tokens._matching import matched
from tcw.tokens.context import Context
from tcw.tokens.tempme import Tempme
from tcw.tokens.tower import TowerRun

from .contexts import image
from .models import TOWERS

TOWER = Shape(blocks=12, layers=0, has_cls=True, tokens=36)


def test_stages() -> None:
    stages = Tempme().stages(TOWER, {})
    assert [stage.at.of(12) for stage in stages] == [8, 9, 10]
    assert [stage.keep for stage in stages] == pytest.approx([0.63, 0.397, 0.25], abs=1e-3)
    assert all(stage.whole for stage in stages)
    (one,) = Tempme().stages(Shape(12, 6, True, 36), {})
    assert (one.at, one.keep, one.whole) == (INPUT, 0.25, True)


def clip_of(context: Context, length: int) -> list[list[int]]:
    frame = context.place[:, 0].tolist()
    return [
        [i for i, f in enumerate(frame) if f // length == clip] for clip in sorted({int(f) // length for f in frame})
    ]


@pytest.mark.parametrize(("frames", "length", "k"), [(4, 2, 30), (5, 2, 38), (3, 4, 22), (1, 2, 8)])
def test_a_join(frames: int, length: int, k: int) -> None:
    """Each clip by itself: across by what tokens are, then within by keys; a clip's share is that of all."""
    (stage,) = [s for n, s in enumerate(Tempme().stages(TOWER, {})) if n == (length > 2)]
    context = image((frames, 3, 4), layers=[3])
    plan = stage.plan(context, k)
    assert context.tower is not None
    keys = context.tower.keys(3)
    for tokens in clip_of(context, length):
        kept = [i for i in plan.keep.tolist() if i in tokens]
        assert len(kept) == pytest.approx(k * len(tokens) / context.tokens, abs=1)
        share = len(kept) / len(tokens)
        between = round(len(tokens) * share ** (0.3566749 / (0.3566749 + 0.1053605)))  # -ln 0.7, -ln 0.9
        across = matched(context.x[tokens], context.size[tokens], between)
        within = matched(keys[tokens][across.keep], across.size, len(kept))
        both = across.then(within)
        assert [tokens[i] for i in both.keep.tolist()] == kept
        for i, to in zip(tokens, both.assign.tolist(), strict=True):
            assert plan.keep[plan.assign[i]] == tokens[both.keep[to]]


def test_all_joins_at_the_input_of_a_language_model() -> None:
    """Clips of 2, 4 and 12 frames: tokens of frames 0 and 13 never meet."""
    (stage,) = Tempme().stages(Shape(12, 6, True, 36), {})
    context = image((14, 2, 3), layers=[3])
    plan = stage.plan(context, 21)
    frame = context.place[:, 0]
    assert bool((frame // 12 == frame[plan.keep[plan.assign]] // 12).all())
    assert bool((frame // 4 != frame[plan.keep[plan.assign]] // 4).any())
    assert plan.size.sum() == 84


def test_fewer_tokens_than_clips() -> None:
    stage = Tempme().stages(TOWER, {})[0]
    context = image((6, 1, 2), layers=[3])
    plan = stage.plan(context, 2)
    assert plan.kept == 2
    assert plan.size.sum() == 12


def test_in_a_tower() -> None:
    """Twelve frames as a batch; each keeps its class token, and what is left of all is a quarter."""
    tower = TOWERS["clip"](num_hidden_layers=6)
    still = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(3))
    frames = still + 0.2 * torch.randn(12, 3, 48, 48, generator=torch.Generator().manual_seed(4))
    stages = [(stage.at.of(6), stage) for stage in Tempme().stages(TOWER, {})]
    with TowerRun(tower, stages) as run:
        hidden = tower(frames)[0]
        (trace,) = run.traces()
        read = run.read_out(hidden)
    assert [name for name, _ in trace.cuts] == ["block 4", "block 4", "block 5"]
    assert [plan.kept for _, plan in trace.cuts] == [272, 171, 108]
    assert len(hidden) == 12
    assert read.shape == (12, 36, 32)
    (_, last) = trace.cuts[-1]
    away = trace.place[:, 0] != trace.place[last.keep[last.assign], 0]
    assert bool(away.any())
    i = int(away.nonzero()[0])
    assert torch.equal(read[i // 36, i % 36], read.flatten(0, 1)[last.keep[last.assign[i]]])
