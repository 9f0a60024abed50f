"""Parts of an image or video: frames, segments of alike frames, crops; and one plan made of those of the parts."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from tcw.tokens.context import Context, TowerView
from tcw.tokens.plan import Plan


def frames_of(context: Context) -> list[Tensor]:
    """The tokens of each frame that has any: int64, ascending; frames in their order."""
    frame = context.place[:, 0].round().long()
    return [(frame == one).nonzero()[:, 0] for one in frame.unique()]


def part_of(context: Context, tokens: Tensor) -> Context:
    """What a method sees of some tokens (int64, ascending) alone. Attention rows are left out."""
    tower = context.tower
    return replace(
        context,
        x=context.x[tokens],
        place=context.place[tokens],
        alive=context.alive[tokens],
        size=context.size[tokens],
        tower=None if tower is None else _arranged(tower, tokens),
        rows=None,
    )


def _arranged(tower: TowerView, tokens: Tensor) -> TowerView:
    return replace(tower, arrange=lambda x: tower.arrange(x)[tokens])


def after(context: Context, plan: Plan) -> Context:
    """What is left of a context after a plan."""
    part = part_of(context, plan.keep)
    return replace(part, x=plan.apply(context.x), size=plan.size)


def joined(context: Context, parts: Sequence[tuple[Tensor, Plan]]) -> Plan:
    """One plan of plans for parts that share no token and have all of them together: (tokens of the part, its plan)."""
    keep = torch.cat([tokens[plan.keep] for tokens, plan in parts])
    order = keep.argsort()
    number = order.argsort()
    assign = torch.full((context.tokens,), -1, dtype=torch.int64, device=keep.device)
    weight = context.size.float().clone()
    mixes = any(plan.mix is not None for _, plan in parts)
    mix = torch.zeros(len(keep) if mixes else 0, context.tokens, device=keep.device)
    first = 0
    for tokens, plan in parts:
        numbers = number[first : first + plan.kept]
        assign[tokens] = torch.where(plan.assign >= 0, numbers[plan.assign.clamp(min=0)], -1) if plan.kept else -1
        weight[tokens] = plan.weight.float()
        if mixes:
            mix[numbers[:, None], tokens] = plan.matrix()
        first += plan.kept
    size = torch.cat([plan.size for _, plan in parts])[order]
    return Plan(keep[order], assign, weight, size, mix if mixes else None)


def pooled(x: Tensor, frames: Sequence[Tensor]) -> Tensor:
    """The mean of each frame's tokens: [F, D]."""
    return torch.stack([x[tokens].mean(0) for tokens in frames])


def segments(frames: Tensor, threshold: float, least: int) -> list[range]:
    """Divide a video where neighbouring frames differ (DySeg of FlashVID).

    A cut comes between two frames whose cosine is under `threshold`; if that makes fewer than `least` segments, the
    least alike neighbours are parted as well, of those equally alike the first.

    Args:
        frames: [F, D], one vector for each frame.
        threshold: cosine.
        least: segments, or as many as there are frames.
    """
    count = len(frames)
    alike = functional.cosine_similarity(frames[:-1].float(), frames[1:].float(), dim=-1)
    wanted = max(int((alike < threshold).sum()), min(least, count) - 1)
    cuts = sorted((alike.sort(stable=True).indices[:wanted] + 1).tolist())
    return [range(a, b) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]


def evenly(count: int, k: int, device: torch.device) -> Tensor:
    """`k` of `count` places in equal steps, as far from the first end as from the other: int64 [k], ascending."""
    return (2 * torch.arange(k, device=device) + 1) * count // (2 * max(k, 1))
