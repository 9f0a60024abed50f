"""One stage for the images of a batch: budgets, contexts, plans, and what is left of each image after it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.tokens import Stage
from tcw.tokens.context import Context, TowerView
from tcw.tokens.plan import Plan
from tcw.tokens.trace import Trace

if TYPE_CHECKING:
    from tcw.tokens.vision import Picture


@dataclass
class Image:
    """An image on its way through the stages.

    Attributes:
        picture: where it stands in the batch.
        trace: what became of it so far.
        alive: int64 [n], which of its N tokens are left.
        size: float32 [n], for how many of the N each stands.
    """

    picture: "Picture"
    trace: Trace
    alive: Tensor = field(init=False)
    size: Tensor = field(init=False)

    def __post_init__(self) -> None:
        columns = self.picture.columns
        self.alive = torch.arange(len(columns), device=columns.device)
        self.size = torch.ones(len(columns), device=columns.device)

    @property
    def columns(self) -> Tensor:
        """Where the tokens that are left stood in the row: int64 [n]."""
        return self.picture.columns[self.alive]

    def separators(self) -> Tensor:
        """Columns of the separators that stay: of a row of the image of which a token does, or of all of it."""
        of, closes = self.picture.separators, self.picture.closes
        counts = torch.bincount(closes[closes >= 0], minlength=len(of))
        left = closes[self.alive]
        alive = torch.bincount(left[left >= 0], minlength=len(of))
        return of[(alive > 0) | ((counts == 0) & (len(self.alive) > 0))]

    def tower(self) -> TowerView | None:
        """What the tower did with the tokens that are left."""
        view, alive = self.picture.tower, self.alive
        if view is None or len(alive) == len(self.picture.columns):
            return view
        arrange = view.arrange
        return replace(view, arrange=lambda x: arrange(x)[alive])

    def cut(self, name: str, plan: Plan) -> None:
        """Take note of a stage's plan for the tokens that were left."""
        before = self.trace.plan
        self.trace.cuts.append((name, plan if before is None else before.then(plan)))
        self.alive, self.size = self.alive[plan.keep], plan.size


def budget(keep: float, tokens: int) -> int:
    """How many of an image's tokens a share leaves. Raises UsageError where that is none."""
    k = math.floor(keep * tokens + 0.5)
    if k < 1:
        least = math.ceil(0.5 / tokens * 1e4) / 1e4
        raise UsageError(f"`keep={keep:g}` leaves none of an image's {tokens} tokens", f"keep at least {least:g}")
    return k


def budgets(stage: Stage, contexts: list[Context]) -> list[int | None]:
    """How many tokens each image of a sample keeps, at most those that are left. None: the plan decides."""
    if stage.keep is None:
        return [None] * len(contexts)
    if stage.allocate is not None:
        found = stage.allocate(contexts, stage.keep)
    else:
        found = [budget(stage.keep, context.original) for context in contexts]
    return [min(k, context.tokens) for k, context in zip(found, contexts, strict=True)]


def plan_of(stage: Stage, context: Context, k: int | None) -> Plan:
    """The plan of one image, checked. All tokens stay as they are where all fit the budget."""
    if k == context.tokens or context.tokens == 0:
        return Plan.everything(context.size)
    with torch.no_grad():
        plan = stage.plan(context, k)
    plan.check(context.tokens, k)
    return plan


def plan_stage(stage: Stage, images: Sequence[Image], context: Callable[[Image], Context]) -> list[Plan]:
    """Plan one stage for all images, those of a sample together (a budget may be shared out among them)."""
    plans: dict[int, Plan] = {}
    for sample in sorted({image.picture.sample for image in images}):
        mine = [n for n, image in enumerate(images) if image.picture.sample == sample]
        contexts = [context(images[n]) for n in mine]
        for n, one, k in zip(mine, contexts, budgets(stage, contexts), strict=True):
            plans[n] = plan_of(stage, one, k)
    return [plans[n] for n in range(len(images))]
