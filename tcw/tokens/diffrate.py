"""DiffRate: each block of the vision tower drops some tokens and merges some, as a schedule says.

    importance    what the class token attends to in this block, mean over heads
    order         by importance: the first stay, the next are merged, the last are dropped
    merge         each into the most similar (cosine) of those that stay; the mean of the tokens, whatever their sizes

Chen et al., DiffRate: Differentiable Compression Rate for Efficient Vision Transformers, ICCV 2023,
https://arxiv.org/abs/2305.17997. The paper learns how many tokens each block drops and merges by gradient descent
through soft masks, at a given cost. Here a schedule is

    uniform    the same number of tokens in each block, the share `pruned` of them dropped
    search     found on images: lowest error of the tower's output at the cost (FLOPs) of the uniform one
               (tcw/tokens/_schedules.py; patches as `read_out` copies them and class token, 1 - cosine each)

The search is ours; the paper trains on labels for three epochs. With it `keep` names a cost, and what is left at the
end may be less or more. Sizes in proportional attention: in the authors' code a merged token adds its size times its
similarity, so that a bad match counts less (`sizes=similar`); `counted` adds its size as it is, as ToMe does. In a
tower without a class token importance is the attention that tokens receive. Calibration: images, for `search` alone.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from tcw.methods import option
from tcw.tokens import Shape, Stage, TokenMethod, block
from tcw.tokens._schedules import Schedule, even, search
from tcw.tokens._similarity import most_similar, unit
from tcw.tokens._tower_blocks import leading
from tcw.tokens.context import Context
from tcw.tokens.flops import Blocks
from tcw.tokens.plan import Plan
from tcw.tokens.selects import ranked
from tcw.tokens.tower import TowerRun, batches

UNIFORM, SEARCH = "uniform", "search"
COUNTED, SIMILAR = "counted", "similar"
_AT_ONCE = 16  # images


class _WhenSearching:
    """Calibration is needed for a schedule that is searched for; of the class as a whole: no."""

    def __get__(self, method: "Diffrate | None", owner: type) -> bool:
        return method is not None and method.schedule == SEARCH


@dataclass(frozen=True)
class Diffrate(TokenMethod):
    """In each block of the tower, drop what the class token looks at least, and merge the next."""

    paper: ClassVar[str] = "arXiv 2305.17997"
    static: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = _WhenSearching()  # type: ignore[assignment]

    schedule: str = option(UNIFORM, "as many tokens in each block, or a search on images", (UNIFORM, SEARCH))
    pruned: float = option(0.5, "of the uniform schedule: share of the removed tokens that is dropped, not merged")
    sizes: str = option(COUNTED, "what a merged token adds: its size, or that times its similarity", (COUNTED, SIMILAR))
    granularity: int = option(4, "of the search: blocks remove multiples of this many tokens")
    rounds: int = option(1, "of the search: how often each block is tried")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.pruned <= 1:
            raise ValueError(f"`pruned` is a share between 0 and 1, got {self.pruned:g}")
        if self.granularity < 1 or self.rounds < 0:
            raise ValueError("`granularity` is 1 or more, `rounds` 0 or more")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """A cut in each block that removes tokens."""
        if self.schedule == UNIFORM:
            count = shape.blocks
            return tuple(
                Stage(block(n), partial(self._plan, self.pruned), 1 - (1 - self.keep) * (n + 1) / count)
                for n in range(count)
            )
        schedule = [(int(p), int(m)) for p, m in learned["schedule"][: shape.blocks].tolist()]
        return self.scheduled(schedule, int(learned["patches"]))

    def scheduled(self, schedule: Schedule, patches: int) -> tuple[Stage, ...]:
        """The cuts of a schedule for images of so many patches; of others the same shares are cut."""
        stages, left = [], patches
        for n, (drops, merges) in enumerate(schedule):
            if drops + merges:
                left -= drops + merges
                stages.append(Stage(block(n), partial(self._plan, drops / (drops + merges)), left / patches))
        return tuple(stages)

    def calibrate(self, model: Any, images: list[Tensor]) -> dict[str, Tensor]:
        """Search for a schedule.

        Returns:
            `schedule`: int64 [blocks, 2], how many of `patches` tokens (int64, a number) a block drops and merges.
        """
        with torch.no_grad():
            return _Trial(self, model, images).search()

    def _plan(self, pruned: float, context: Context, k: int | None) -> Plan:
        assert k is not None, "a share is given"
        assert context.rows is not None, "the stage is in a block"
        if context.text is None:
            context.note("the tower has no class token: tokens are ranked by the attention that they receive")
        order = ranked(context.rows.last())
        gone = len(order) - k
        merges = gone - int(gone * pruned + 0.5)
        keep, others = order[:k].sort().values, order[k : k + merges]
        alike, place = most_similar(unit(context.x), others, keep)
        assign = torch.full_like(order, -1)
        assign[keep] = torch.arange(k, device=order.device)
        assign[others] = place
        plan = Plan.merging(keep, assign, context.size, torch.ones_like(context.size))
        if self.sizes == COUNTED:
            return plan
        size = context.size[keep].index_add(0, place, context.size[others] * alike.clamp(min=0))
        return replace(plan, size=size)


class _Trial:
    """What schedules make of images: their error against the dense tower, and their cost."""

    def __init__(self, method: Diffrate, model: Any, images: list[Tensor]) -> None:
        weight = next(model.parameters())
        self.method, self.model, self.blocks = method, model, Blocks.of(model)
        self.batches = [batch.to(weight) for batch in batches(images, _AT_ONCE)]
        self.special = leading(model)
        self.dense = [model(pixel_values=batch).last_hidden_state for batch in self.batches]
        self.patches = self.dense[0].shape[1] - self.special

    def search(self) -> dict[str, Tensor]:
        """The best schedule found at the cost of the uniform one."""
        count, method = len(self.blocks.pair), self.method
        start = even(count, self.patches, (1 - method.keep) * self.patches, method.pruned)
        found = search(self.error, self.cost, start, self.patches, method.granularity, method.rounds)
        return {"schedule": torch.tensor(found), "patches": torch.tensor(self.patches)}

    def cost(self, schedule: Schedule) -> float:
        """FLOPs of an image."""
        left = [self.patches, *(self.patches - gone for gone in accumulate(map(sum, schedule)))]
        tokens = [self.special + n for n in left]
        return self.blocks.flops(tokens[:-1], tokens[1:])

    def error(self, schedule: Schedule) -> float:
        """1 - cosine to the dense tower, the mean over images and patches, and the same of the class token."""
        stages = [(stage.at.of(len(schedule)), stage) for stage in self.method.scheduled(schedule, self.patches)]
        total = 0.0
        with TowerRun(self.model, stages) as run:
            for batch, dense in zip(self.batches, self.dense, strict=True):
                hidden = self.model(pixel_values=batch).last_hidden_state
                full = torch.cat([hidden[:, : self.special], run.read_out(hidden)], 1)
                off = 1 - functional.cosine_similarity(full.float(), dense.float(), dim=-1)
                parts = [off[:, self.special :], *([off[:, :1]] if self.special else [])]
                total += sum(float(part.mean(1).sum()) for part in parts)
        return total
