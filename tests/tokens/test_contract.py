"""What every token method promises, on random images of many shapes: found by name, so a new method is tested, too."""

import dataclasses
import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tcw import methods
from tcw.tokens import Shape, Stage, TokenMethod
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan

from .contexts import image
from .models import TOWERS

NAMES = methods.names("tokens")
VLM = Shape(blocks=4, layers=6, has_cls=True, tokens=48)
TOWER = Shape(blocks=4, layers=0, has_cls=True, tokens=48)
SHAPES = {"vlm": VLM, "tower": TOWER}
GRIDS: tuple[tuple[tuple[int, int, int], int | None], ...] = (
    ((1, 1, 1), None), ((1, 1, 2), None), ((1, 1, 3), None), ((1, 1, 5), None), ((1, 4, 4), None), ((2, 3, 4), None),
    ((1, 6, 5), None), ((3, 3, 3), None), ((4, 4, 5), None), ((1, 8, 10), None), ((1, 8, 10), 23), ((4, 3, 5), 31),
)  # fmt: skip


def made(name: str, **options: Any) -> TokenMethod:
    method = methods.build(methods.qualified(name.removeprefix("tokens."), "tokens"), options)
    assert isinstance(method, TokenMethod)
    return method


@functools.cache
def learned_by(name: str) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(1)
    return made(name).calibrate(TOWERS["vit"](), [torch.randn(3, 48, 48, generator=source) for _ in range(4)])


def stages_of(name: str, shape: Shape, **options: Any) -> tuple[Stage, ...]:
    method = made(name, **options)
    return method.stages(shape, learned_by(name) if method.needs_calibration else {})


def seen(stage: Stage, shape: Shape, grid: tuple[int, int, int], alive: int | None, **changes: Any) -> Context:
    """An image as the engine shows it at this stage: with nothing that the stage did not ask for."""
    depth = 4
    inside = not shape.layers or stage.at.kind == "block"
    rows = None if stage.at.kind == "input" and not inside else 1 if inside else 3
    text = (1 if inside else 3) if changes.get("cls", True) or not inside else None
    values = {"layers": stage.layers(depth), "depth": depth, "text": text, "rows": rows, "alive": alive, **changes}
    return image(grid, **values)


def images(stage: Stage, shape: Shape) -> Iterator[Context]:
    for seed, (grid, alive) in enumerate(GRIDS):
        yield seen(stage, shape, grid, alive, seed=seed)
    yield seen(stage, shape, (1, 5, 6), None, seed=50, cls=False)
    yield seen(stage, shape, (2, 4, 3), 17, seed=51, cls=False, text=None)


def budgets(stage: Stage, context: Context) -> list[int | None]:
    if stage.keep is None:
        return [None]
    n = context.tokens
    return sorted({1, min(2, n), max(1, n // 4), max(1, n // 2), max(1, n - 1), n})


def same(a: Plan, b: Plan) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Plan)]
    return all(x is y or torch.equal(x, y) for x, y in pairs)


def check(plan: Plan, context: Context, k: int | None) -> None:
    plan.check(context.tokens, k)
    assert plan.keep.dtype == plan.assign.dtype == torch.int64
    assert torch.isfinite(plan.weight).all()
    total, merged = float(context.size.sum()), float(plan.size.sum())
    assert merged <= total * (1 + 1e-5)
    if plan.mix is None:
        own = [float(context.size[plan.assign == j].sum()) for j in range(plan.kept)]
        assert plan.size.tolist() == pytest.approx(own)
    else:
        assert plan.mix.shape == (plan.kept, context.tokens)
        assert bool((plan.mix >= 0).all())
        assert plan.mix.sum(1).tolist() == pytest.approx([1.0] * plan.kept, rel=1e-4)
    if bool((plan.assign >= 0).all()):
        assert merged == pytest.approx(total, rel=1e-4)
    left = plan.apply(context.x)
    assert left.shape == (plan.kept, context.x.shape[1])
    assert torch.isfinite(left).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_plans(name: str, shape: str) -> None:
    """Exactly as many tokens as asked for, ascending, unique; sizes add up; the same plan twice; all is all."""
    stages = stages_of(name, SHAPES[shape])
    assert stages, "a method that does nothing"
    for stage in stages:
        for context in images(stage, SHAPES[shape]):
            for k in budgets(stage, context):
                plan = stage.plan(context, k)
                check(plan, context, k)
                assert same(plan, stage.plan(context, k))
                if k == context.tokens:
                    assert torch.equal(plan.apply(context.x), context.x), "all tokens, as they are"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_are_all_alike(name: str, shape: str) -> None:
    """No score can tell them apart: still exactly k, and what is left is the same token."""
    for stage in stages_of(name, SHAPES[shape]):
        for grid in ((1, 4, 5), (3, 2, 4)):
            context = seen(stage, SHAPES[shape], grid, None, flat=True)
            for k in budgets(stage, context):
                plan = stage.plan(context, k)
                check(plan, context, k)
                torch.testing.assert_close(plan.apply(context.x), context.x[: plan.kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e4, 1e-6, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_features_of_any_size(name: str, scale: float) -> None:
    """The largest that float16 holds, tiny ones and none at all: nothing overflows, nothing is divided by zero."""
    for shape in SHAPES.values():
        for stage in stages_of(name, shape):
            context = seen(stage, shape, (2, 3, 4), None, scale=scale)
            for k in budgets(stage, context):
                check(stage.plan(context, k), context, k)


@pytest.mark.parametrize("name", NAMES)
def test_layers(name: str) -> None:
    """Layers of the tower that a stage looks at are among those that have run, in towers of any depth."""
    for shape in SHAPES.values():
        for stage in stages_of(name, shape):
            for depth in (1, 2, 3, 4, 5, 12, 23, 27):
                asked = stage.layers(depth)
                assert len(set(asked)) == len(asked)
                assert all(0 <= n < depth for n in asked)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shares(name: str, shape: str) -> None:
    """The share that `keep` names is what is left after the last cut that has one; no cut brings tokens back."""
    stages = [s for s in stages_of(name, SHAPES[shape], keep=0.3) if s.keep is not None]
    shares = [stage.keep or 0.0 for stage in stages]
    assert all(0 < share <= 1 for share in shares)
    assert all(a >= b for a, b in pairwise(shares))
    if shares:
        assert shares[-1] == pytest.approx(0.3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5])
def test_shares_that_make_no_sense(name: str, keep: float) -> None:
    with pytest.raises(Exception, match="keep"):
        made(name, keep=keep)
