"""Where layers cut, and what each cut leaves."""

import pytest

from tcw.errors import UsageError
from tcw.tokens import Shape
from tcw.tokens._layers import at_layer, at_layers, pyramid
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan


def everything(context: Context, k: int | None) -> Plan:
    return Plan.everything(context.size)


def placed(shape: Shape, depths: list[float]) -> list[tuple[int | None, float | None]]:
    cuts = [(depth, 1 - depth) for depth in depths]
    return [(stage.at.index, stage.keep) for stage in at_layers(shape, cuts, everything)]


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.125, 0.01])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_pyramid(keep: float, stages: int) -> None:
    shares = pyramid(keep, stages)
    assert shares[-1] == keep
    ratios = [b / a for a, b in zip((1.0, *shares), shares, strict=False)]
    assert ratios == pytest.approx([keep ** (1 / stages)] * stages)


def test_the_papers_pyramid() -> None:
    assert pyramid(0.125, 3) == pytest.approx((0.5, 0.25, 0.125))


def test_layers_by_depth() -> None:
    assert placed(Shape(24, 32, True), [0.25, 0.5, 0.75]) == [(8, 0.75), (16, 0.5), (24, 0.25)]
    assert placed(Shape(12, 0, True), [0.25, 0.5, 0.75]) == [(3, 0.75), (6, 0.5), (9, 0.25)]


def test_no_cut_into_the_deepstack() -> None:
    """Two cuts that would fall on one layer are the later one."""
    assert placed(Shape(24, 8, False, deepstack=3), [0.25, 0.5, 0.75]) == [(3, 0.75), (4, 0.5), (6, 0.25)]
    assert placed(Shape(24, 5, False, deepstack=3), [0.25, 0.5, 0.75]) == [(3, 0.5), (4, 0.25)]


def test_few_layers() -> None:
    assert placed(Shape(4, 2, True), [0.25, 0.5, 0.75]) == [(1, 0.25)]


def test_a_layer_by_number() -> None:
    assert at_layer(Shape(24, 32, True), 2, 0.5, everything, probe=-1).at.index == 2
    assert at_layer(Shape(24, 32, True, deepstack=3), 2, 0.5, everything).at.index == 3
    assert at_layer(Shape(12, 0, True), 11, 0.5, everything).at.index == 11


@pytest.mark.parametrize("layer", [0, -1, 32, 99])
def test_a_layer_that_there_is_not(layer: int) -> None:
    with pytest.raises(UsageError, match="no layer"):
        at_layer(Shape(24, 32, True), layer, 0.5, everything)
