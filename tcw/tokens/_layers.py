"""Where the layers of a language model cut, by depth, and what share of the tokens each cut leaves."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tcw.errors import UsageError
from tcw.tokens import Shape, Stage, layer, no_layers

if TYPE_CHECKING:
    from tcw.tokens.context import Context
    from tcw.tokens.plan import Plan

Planner = Callable[["Context", "int | None"], "Plan"]
Layers = Callable[[int], tuple[int, ...]]


def pyramid(keep: float, stages: int) -> tuple[float, ...]:
    """Shares of the image's tokens that are left after each of `stages` cuts, each the same share of the one before.

    The last is `keep` itself: keep ** (i / stages).
    """
    return *(keep ** (i / stages) for i in range(1, stages)), keep


def at_layers(
    shape: Shape,
    cuts: Sequence[tuple[float, float]],
    plan: Planner,
    probe: int = 0,
    layers: Layers = no_layers,
    whole: bool = False,
) -> tuple[Stage, ...]:
    """Stages at layers of the language model (or at blocks of a model that is only a tower).

    No cut comes before the first layer or into the deepstack. In a model of so few layers that two cuts fall on one,
    the later cut stands for both.

    Args:
        shape: the model's.
        cuts: (depth 0..1, share of the image's tokens left), ascending in depth.
        plan: of all of them.
        probe: see `Stage.probe`.
        layers: see `Stage.layers`.
        whole: see `Stage.whole`.
    """
    count = shape.layers or shape.blocks
    last: dict[int, float] = {}
    for depth, share in cuts:
        last[min(max(round(depth * count), shape.deepstack, 1), count - 1)] = share
    return tuple(Stage(layer(n), plan, share, layers=layers, probe=probe, whole=whole) for n, share in last.items())


def at_layer(shape: Shape, index: int, keep: float, plan: Planner, probe: int = 0) -> Stage:
    """A stage at the layer with this number, or at the first one after the deepstack.

    Raises UsageError where the model has no such layer.
    """
    count = shape.layers or shape.blocks
    if not 1 <= index < count:
        raise UsageError(f"the model has no layer {index} to cut at", f"its layers are 1 to {count - 1}")
    return Stage(layer(max(index, shape.deepstack)), plan, keep, probe=probe)
