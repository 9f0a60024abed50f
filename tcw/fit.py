"""Choose a recipe by size: the gentlest one that comes with tcw and makes the model fit."""

from typing import TYPE_CHECKING

from tcw import methods, recipe
from tcw.errors import UsageError
from tcw.events import Report, silent
from tcw.units import show_bytes

if TYPE_CHECKING:
    from tcw.pipeline import Plan
    from tcw.source import Source


def is_lossless(candidate: recipe.Recipe) -> bool:
    """Say whether every step of a recipe keeps the model bit for bit."""
    return all(methods.get(step.method).lossless for step in candidate.steps)


def choose(source: "Source", limit: int, *, progress: Report = silent) -> tuple[recipe.Recipe, "Plan"]:
    """Return the first recipe whose predicted size is at most `limit` bytes, and its plan.

    Lossless recipes come first, then the others by predicted size, largest first: what takes the most bytes
    is taken to do the least harm. Raises UsageError, with the smallest prediction, when none fits.
    """
    from tcw import pipeline

    smallest: tuple[int, str] | None = None
    candidates = [recipe.load(name) for name in recipe.names()]
    for lossless in (True, False):
        plans = [(c, pipeline.plan(source, c, progress=progress)) for c in candidates if is_lossless(c) is lossless]
        for candidate, plan in sorted(plans, key=lambda pair: -pair[1].predicted_bytes):
            if plan.predicted_bytes <= limit:
                return candidate, plan
            smallest = min(smallest or (plan.predicted_bytes, candidate.name), (plan.predicted_bytes, candidate.name))
    if smallest is None:
        raise UsageError("no recipe comes with this tcw", "choose methods with `--method`")
    raise UsageError(
        f"no recipe makes `{source.id}` fit into {show_bytes(limit)}",
        f"the smallest is `--recipe {smallest[1]}` with about {show_bytes(smallest[0])}",
    )
