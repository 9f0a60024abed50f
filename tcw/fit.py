"""Choose what to do by size: the gentlest way that makes a model fit.

    lossless       the same bits
    lossless-fp8   8 bits a weight, entropy-coded; needs no calibration
    int8-safe      8 bits a weight, embeddings too; needs no calibration
    a dial         `ecq` at the most bits a weight that fit, from 8 down to 1.5, with embeddings in 8 bits

The first that fits is taken. With a method that has an option `bits` which takes fractions (`ecq`, `mixed`), only that
dial is turned. Sizes are predictions, as of `--dry-run`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tcw import methods, recipe
from tcw.errors import UsageError
from tcw.events import Report, silent
from tcw.recipe import Recipe, Step, make_step, stated_limits
from tcw.units import show_bytes

if TYPE_CHECKING:
    from tcw.report import Plan
    from tcw.source import Source

LADDER = ("lossless", "lossless-fp8", "int8-safe")
DIAL = "ecq"
_STEPS = [n / 4 for n in range(4, 33)]  # where a dial may begin and end: 1 to 8 bits a weight
_GRAIN = 100  # a dial is set to hundredths of a bit
_TRIES = 6


@dataclass(frozen=True)
class Dial:
    """A step whose option `bits` is free, and the bits a weight that it takes, `low` to `high`."""

    step: Step
    low: float
    high: float

    def at(self, bits: float) -> Recipe:
        """The recipe with the dial at `bits`; embeddings are stored in 8 bits, what is left is coded losslessly."""
        step = replace(self.step, options={**self.step.options, "bits": bits})
        rest = make_step("int8", {"algo": "rtn", "targets": "embedding"}), make_step("dfloat11", {})
        steps = (step, *rest)
        summary = f"{step.spec()}, chosen to fit a size"
        return Recipe(f"{step.method}-{bits:g}bit", steps, summary, stated_limits(steps))


def dial_of(step: Step) -> Dial:
    """The dial of a step. Raises UsageError when its method has no option `bits` that takes fractions."""
    if not isinstance(step.options.get("bits"), float):
        raise UsageError(
            f"`{step.method}` has no `bits` to set by size",
            "give `--fit` alone, or with `--method ecq` or `mixed`",
        )
    taken = [bits for bits in _STEPS if _takes(step, bits)]
    if not taken:
        raise UsageError(f"`{step.spec()}` takes no number of bits from {_STEPS[0]:g} to {_STEPS[-1]:g}")
    return Dial(step, taken[0], taken[-1])


def _takes(step: Step, bits: float) -> bool:
    try:
        methods.build(step.method, {**step.options, "bits": bits})
    except UsageError:
        return False
    return True


def choose(
    source: "Source", limit: int, *, method: Step | None = None, progress: Report = silent
) -> tuple[Recipe, "Plan"]:
    """Return the gentlest recipe whose predicted size is at most `limit` bytes, and its plan.

    Args:
        source: the model; it is only read.
        limit: bytes of all tensors, as a plan predicts them.
        method: turn the dial of this step instead of going down the ladder.
        progress: is told after every tensor.

    Raises:
        UsageError: nothing fits; the hint has the smallest prediction. Or the method has no dial.
    """
    from tcw import pipeline

    def plan(candidate: Recipe) -> "Plan":
        return pipeline.plan(source, candidate, progress=progress)

    for name in () if method else LADDER:
        candidate = recipe.load(name)
        found = plan(candidate)
        if found.predicted_bytes <= limit:
            return candidate, found
    return turn(dial_of(method or make_step(DIAL, {})), limit, plan, source.id)


def turn(dial: Dial, limit: int, plan: Callable[[Recipe], "Plan"], model: str) -> tuple[Recipe, "Plan"]:
    """Turn a dial to the most bits a weight that fit into `limit` bytes.

    Sizes are nearly a straight line in bits, so two plans say where to look and a few more settle it. Raises UsageError
    when nothing fits.
    """
    fits, smallest = dial.at(dial.low), plan(dial.at(dial.low))
    if smallest.predicted_bytes > limit:
        raise UsageError(
            f"nothing makes `{model}` fit into {show_bytes(limit)}",
            f"the smallest is `{fits.steps[0].spec()}` with about {show_bytes(smallest.predicted_bytes)}",
        )
    highest = plan(dial.at(dial.high))
    if highest.predicted_bytes <= limit:
        return dial.at(dial.high), highest
    low, high = (dial.low, smallest), (dial.high, highest)
    for _ in range(_TRIES):
        bits = _between(low[0], high[0], low[1].predicted_bytes, high[1].predicted_bytes, limit)
        if bits <= low[0]:
            break
        found = plan(dial.at(bits))
        if found.predicted_bytes <= limit:
            low = bits, found
        else:
            high = bits, found
    return dial.at(low[0]), low[1]


def _between(low: float, high: float, fits: int, exceeds: int, limit: int) -> float:
    """The bits on the line between two plans that should just fit, whole hundredths; below `high` in any case."""
    share = (limit - fits) / (exceeds - fits)
    bits = math.floor(round((low + share * (high - low)) * _GRAIN, 6)) / _GRAIN
    return min(bits, math.ceil(high * _GRAIN - 1) / _GRAIN)
