"""Tokens of a tower's batch while stages cut them: which are left, what stands for the others."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from tcw.tokens.plan import Plan
from tcw.tokens.trace import Trace

Left = tuple[Tensor, Tensor]
"""Of one sequence: int64 [n], which of its patches are left, and float32 [n], their sizes."""


@dataclass
class Unit:
    """What is planned together: one sequence of the batch, or, where a stage is `whole`, all of them as frames.

    Attributes:
        rows: its sequences in the batch.
        grid: (rows, columns) of patches of one sequence; N patches in all, in frame-major order.
        device: of the tensors.
        alive: int64 [n], which of the N patches are left.
        size: float32 [n], for how many of the N each stands.
        stand: int64 [N], which of the n tokens stands for each patch, also for dropped ones: then the kept token
            that was most like it (cosine) where it was dropped.
        own: [N, D], what each patch was more than the token that stands for it, over all cuts; None: nothing yet.
        trace: the cuts so far.
    """

    rows: range
    grid: tuple[int, int]
    device: torch.device
    alive: Tensor = field(init=False)
    size: Tensor = field(init=False)
    stand: Tensor = field(init=False)
    own: Tensor | None = None
    trace: Trace = field(init=False)

    def __post_init__(self) -> None:
        frames, (height, width) = len(self.rows), self.grid
        self.alive = torch.arange(frames * height * width, device=self.device)
        self.stand = self.alive
        self.size = torch.ones(len(self.alive), device=self.device)
        axes = [torch.arange(n, device=self.device) for n in (frames, height, width)]
        place = torch.cartesian_prod(*axes).reshape(-1, 3).float()
        self.trace = Trace(self.rows.start, 0, (frames, height, width), place)

    @property
    def patches(self) -> int:
        """Of one sequence, before any cut."""
        return self.grid[0] * self.grid[1]

    def counts(self) -> list[int]:
        """Tokens that are left of each sequence."""
        return torch.bincount(self.alive // self.patches, minlength=len(self.rows)).tolist()

    def within(self, frames: range) -> Tensor:
        """Which of the n tokens belong to some of the sequences: bool [n]."""
        of = self.alive // self.patches
        return (of >= frames.start) & (of < frames.stop)

    def sequences(self, frames: range) -> list[Left]:
        """What is left of some of the sequences."""
        alive, counts = self.alive % self.patches, self.counts()
        found = list(zip(alive.split(counts), self.size.split(counts), strict=True))
        return found[frames.start : frames.stop]

    def plan(self) -> Plan:
        """All cuts as one plan of the N patches."""
        return self.trace.plan or Plan.everything(torch.ones_like(self.size))

    def gather(self, hidden: Tensor, special: int) -> Tensor:
        """The tokens that are left out of a batch [B, special + S, D]: [n, D]."""
        found = [hidden[row, special : special + n] for row, n in zip(self.rows, self.counts(), strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def cut(self, name: str, plan: Plan, x: Tensor, left: Tensor, remember: bool) -> None:
        """Carry out a plan of the n tokens.

        Args:
            name: of the stage.
            plan: what becomes of them.
            x: [n, D], what they were.
            left: [k, D], what those that stay have become.
            remember: keep what patches were more than what stands for them.
        """
        to = plan.assign.clone()
        gone = to < 0
        if bool(gone.any()):
            to[gone] = _most_like(x[gone], left)
        if remember:
            more = x[self.stand] - left[to[self.stand]]
            self.own = more if self.own is None else self.own + more
        self.stand, self.alive, self.size = to[self.stand], self.alive[plan.keep], plan.size
        before = self.trace.plan
        self.trace.cuts.append((name, plan if before is None else before.then(plan)))


def _most_like(x: Tensor, kept: Tensor) -> Tensor:
    """For each of `x` [m, D] the most similar of `kept` [k, D] by cosine, the first of equals: int64 [m]."""
    x, kept = (functional.normalize(one.detach().float(), dim=-1) for one in (x, kept))
    return (x @ kept.mT).argmax(1)


def join(plans: list[Plan]) -> Plan:
    """Plans of several sequences as one, of their tokens end to end."""
    if len(plans) == 1:
        return plans[0]
    tokens = [0, *torch.tensor([len(plan.assign) for plan in plans]).cumsum(0).tolist()]
    kept = [0, *torch.tensor([plan.kept for plan in plans]).cumsum(0).tolist()]
    return Plan(
        torch.cat([plan.keep + n for plan, n in zip(plans, tokens, strict=False)]),
        torch.cat([torch.where(p.assign >= 0, p.assign + n, -1) for p, n in zip(plans, kept, strict=False)]),
        torch.cat([plan.weight for plan in plans]),
        torch.cat([plan.size for plan in plans]),
        torch.block_diag(*[p.matrix() for p in plans]) if any(p.mix is not None for p in plans) else None,
    )
