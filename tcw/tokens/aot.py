"""AOT: anchors of each frame take in its other tokens by optimal transport, a clip's first frame those of later ones.

    in a frame    half of its T anchors are the best of each of 3 x 3 windows by the attention of a shallow layer of the
                  tower, the others the best of all by its last one; each other token is shared out over the anchors
                      cost = (1 - cosine) + 0.5 · how far apart, the frame being 1 x 1        ε = 0.1
    in a clip     the first frame's anchors take in those of frame Δ later, less the more distant in time:
                      cost = (1 - cosine - the least of all) · (1 - exp(-Δ² / 2 σ²))           σ = 1.5, ε = 0.1
                  but the tokens that go to no anchor in particular (lowest greatest share) stay as they are

Li et al., Token Reduction via Local and Global Contexts Optimization for Efficient Video Large Language Models, CVPR
2026, https://arxiv.org/abs/2603.01400. Attention is what a token receives, or, in a tower with one, that of its class
token.

Where we differ. With uniform marginals an anchor's share of a frame is so small that the authors' update in a frame
hardly moves it, and what does is a tenth of the plain mean that they mix in; between frames they give tokens away
whole, and with ε = 0.1 nearly evenly, which makes all anchors alike. Here each token is given away exactly once, in a
frame as in a clip (`tcw.tokens.merges.ot`), there is no plain mean, and an anchor a becomes (1 - `strength`) · a +
`strength` · (the mean of all that it is given, and itself), `strength` being that tenth. The authors emit a clip's
anchors twice, before and after they took in others; here they are there once. T is such that exactly `keep` of all
tokens are left when `distinct` of a later frame's anchors stay; clips are longer than `clip` only where not each can
have an anchor. A single image is one frame; one in crops is two, its overview and the rest. In a plain tower the frames
come as a batch, which is planned as one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tcw.methods import option
from tcw.tokens import INPUT, Shape, Stage, TokenMethod
from tcw.tokens._frames import after, frames_of, joined, part_of
from tcw.tokens._similarity import unit
from tcw.tokens.allocates import apportion
from tcw.tokens.context import Context
from tcw.tokens.merges import ot, shared, transport
from tcw.tokens.plan import Plan
from tcw.tokens.scores import cls_attention
from tcw.tokens.selects import ranked, windows_top_k

EPSILON = 0.1
SIGMA = 1.5
SHALLOW = 0.2


def layers(depth: int) -> tuple[int, ...]:
    """A shallow layer of the tower (the paper: 5 of 27) and the last that has run; of one layer, that."""
    return tuple(dict.fromkeys((min(round(SHALLOW * depth), depth - 1), depth - 1)))


def shallow(depth: int) -> tuple[int, ...]:
    """The shallow one of `layers`."""
    return layers(depth)[:1]


def deep(depth: int) -> tuple[int, ...]:
    """The deep one of `layers`."""
    return layers(depth)[-1:]


def anchors(frame: Context, near: Tensor, far: Tensor, count: int) -> Tensor:
    """Half of `count` from windows by the scores `near` [N], the others by `far` [N]: int64 [count], ascending."""
    local = windows_top_k(3)(frame, near, count // 2)
    others = ranked(far.index_fill(0, local, -torch.inf))[: count - len(local)]
    return torch.cat([local, others]).sort().values


def budgets(sizes: Sequence[int], clips: Sequence[range], k: int, distinct: float) -> tuple[list[int], list[int]]:
    """Anchors of each frame, and how many of them stay when the clips were merged; these sum to k.

    A clip's first frame keeps all its anchors; of later ones about the share `distinct` of theirs stays.

    Args:
        sizes: tokens of each frame.
        clips: frames of each clip, in order.
        k: tokens left in all; at least one to a clip.
        distinct: see above.
    """
    first = [clip[0] for clip in clips]
    later = [frame for clip in clips for frame in clip[1:]]
    wanted = math.ceil(k / (len(first) + distinct * len(later)) - 1e-9)
    most = sum(sizes[f] for f in later)
    keys = max(min(k, wanted * len(first)), k - most)
    left = dict(zip(first, _evenly(keys, [1] * len(first), [sizes[f] for f in first]), strict=True))
    left |= dict(zip(later, _evenly(k - sum(left.values()), [0] * len(later), [sizes[f] for f in later]), strict=True))
    stay = [left[f] for f in range(len(sizes))]
    anchors = [stay[f] if f in first else max(min(wanted, sizes[f]), stay[f]) for f in range(len(sizes))]
    return anchors, stay


def _evenly(total: int, low: list[int], high: list[int]) -> list[int]:
    return apportion([1.0] * len(high), total, low, high)


@dataclass(frozen=True)
class Aot(TokenMethod):
    """Video: anchors of each frame, and of each clip, take in the others by optimal transport."""

    paper: ClassVar[str] = "arXiv 2603.01400"
    video: ClassVar[bool] = True

    keep: float = option(0.1, "share of all frames' visual tokens that is left")
    clip: int = option(8, "frames to a clip")
    distinct: float = option(
        0.3, "share of a later frame's anchors that stays: those that go to no anchor in particular"
    )

    strength: float = option(0.1, "weight of what an anchor is given in what it becomes; 1: the mean of all of it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip < 1:
            raise ValueError(f"`clip` is 1 or more, got {self.clip}")
        for name in ("distinct", "strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is between 0 and 1, got {getattr(self, name):g}")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut at the input."""
        return (Stage(INPUT, self._plan, self.keep, layers=layers, whole=True),)

    def _plan(self, context: Context, k: int | None) -> Plan:
        assert k is not None
        if k == context.tokens:
            return Plan.everything(context.size)
        frames = frames_of(context)
        length = max(self.clip, math.ceil(len(frames) / k))
        clips = [range(i, min(i + length, len(frames))) for i in range(0, len(frames), length)]
        counts, left = budgets([len(tokens) for tokens in frames], clips, k, self.distinct)
        near, far = cls_attention(shallow)(context), cls_attention(deep)(context)
        merge, parts = ot(EPSILON), []
        for tokens, count in zip(frames, counts, strict=True):
            frame = part_of(context, tokens)
            parts.append((tokens, merge(frame, anchors(frame, near[tokens], far[tokens], count))))
        within = softened(joined(context, parts), self.strength)
        return within.then(softened(between(after(context, within), clips, counts, left), self.strength))


def softened(plan: Plan, strength: float) -> Plan:
    """A plan that mixes, with kept tokens that stay themselves but for `strength` of what they would become."""
    assert plan.mix is not None, "tokens are shared out"
    own = torch.zeros_like(plan.mix).scatter_(1, plan.keep[:, None], 1.0)
    return replace(plan, mix=(1 - strength) * own + strength * plan.mix)


def between(context: Context, clips: Sequence[range], counts: Sequence[int], left: Sequence[int]) -> Plan:
    """Merge each clip's later frames into its first, but for their most distinct tokens.

    Args:
        context: anchors only.
        clips: frames of each clip.
        counts: anchors of each frame.
        left: how many of each frame's stay.
    """
    tokens = torch.arange(context.tokens, device=context.x.device)
    frames = tokens[context.place[:, 0].argsort(stable=True)].split(list(counts))
    parts = []
    for clip in clips:
        mine = torch.cat([frames[f] for f in clip]).sort().values
        local = [torch.searchsorted(mine, frames[f]) for f in clip]
        parts.append((mine, _clip(part_of(context, mine), local, [left[f] for f in clip])))
    return joined(context, parts)


def _clip(part: Context, frames: Sequence[Tensor], left: Sequence[int]) -> Plan:
    """Plan of one clip; `frames`: its tokens by frame."""
    units, first = unit(part.x), frames[0]
    keep, given, shares = [first], [], []
    for gap, (tokens, count) in enumerate(zip(frames[1:], left[1:], strict=True), 1):
        unlike = 1 - units[tokens] @ units[first].T
        cost = (unlike - unlike.min()) * (1 - math.exp(-(gap**2) / (2 * SIGMA**2)))
        share = transport(cost, EPSILON)
        order = ranked(-share.max(1).values)
        keep.append(tokens[order[:count]])
        given.append(tokens[order[count:]])
        shares.append(share[order[count:]])
    kept = torch.cat(keep).sort().values
    gone = torch.cat(given) if given else first[:0]
    to = part.x.new_zeros(len(gone), len(kept))
    if len(gone):
        to[:, torch.searchsorted(kept, first)] = torch.cat(shares)
    return shared(part, kept, gone, to)
