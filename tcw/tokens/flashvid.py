"""FlashVID: in each segment of a video, salient and diverse tokens, and trees of what stays alike from frame to frame.

    segments (DySeg)   cut between two frames whose mean tokens have a cosine under `cut`, `segments` at least
    ADTS               `chosen` of a frame's tokens: the highest  a · e · (distance to those chosen before)
    TSTM               each other token links to the most similar other one of the frame before, if the cosine is above
                       `link`; trees grow, and of those a segment keeps as many as its budget has left
    clusters           the roots of a frame are clustered (DPC-kNN) where there are more than that
    language model     before a layer at 5/7 of the depth: what the prompt's last token looks at

a is the class token's attention (or the attention received), e how much a token is like its segment's frames. Fan et
al., FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging, ICLR
2026, https://arxiv.org/abs/2602.08024. `keep` is the share of all frames' tokens left at the end; the language model
gets keep / `late`, evenly over frames. The default is the authors' 25 % for Qwen2.5-VL, which is the average over its
layers: 31 % before layer 20 of 28, and 30 % of those, 9.4 %, from there on.

Where we differ. e is (1 + mean cosine) / 2, where the authors' mean product may be negative and then turns the order
round; the first token of a frame is the most isolated one, whatever its a and e. In a segment of one frame their code
clusters the chosen tokens again with the others; a token is in one place here. A tree's mean is that of all its tokens,
and so is a cluster's. Roots of a frame that has no cluster go to the most similar one of their segment; where the
chosen tokens are the whole budget, the others are dropped. Of a single image: salient and diverse tokens, and clusters;
one in crops is two frames, its overview and the rest. In a plain tower the frames come as a batch, which is planned as
one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tcw.methods import option
from tcw.tokens import INPUT, Shape, Stage, TokenMethod, choose
from tcw.tokens._frames import after, frames_of, joined, part_of, pooled, segments
from tcw.tokens._layers import at_layers
from tcw.tokens._similarity import Cosine, unit
from tcw.tokens.allocates import apportion
from tcw.tokens.context import Context
from tcw.tokens.merges import dpc_knn, drop, linked
from tcw.tokens.plan import Plan
from tcw.tokens.scores import cls_attention, last, last_row
from tcw.tokens.selects import max_min, top_k

DEPTH = 5 / 7
NEIGHBOURS = 7


def event(part: Context) -> Tensor:
    """How much each token of a segment is like its frames, 0 to 1: [N]."""
    frames = pooled(part.x, frames_of(part))
    return (1 + (unit(part.x) @ unit(frames).T).mean(1)) / 2


def clustered(forest: Context, fixed: Tensor, left: int) -> Plan:
    """Cluster a segment's trees frame by frame until `left` of them are there.

    Args:
        forest: the segment's trees, each as the mean of its tokens in its root's place; and tokens that are in none.
        fixed: bool [N], the latter; they stay as they are.
        left: at least 1, and no more than there are trees.
    """
    own = torch.arange(forest.tokens, device=fixed.device)
    frames = [tokens[~fixed[tokens]] for tokens in frames_of(forest)]
    roots = [len(tokens) for tokens in frames]
    low = [int(n > 0 and left >= len(roots)) for n in roots]
    head = own.clone()
    for tokens, count in zip(frames, apportion([float(n) for n in roots], left, low, roots), strict=True):
        head[tokens] = -1
        if count:
            centres, nearest = dpc_knn(forest.x[tokens], count, NEIGHBOURS)
            head[tokens] = tokens[centres][nearest]
    centres, orphans = own[~fixed & (head == own)], own[head < 0]
    if len(orphans):
        head[orphans] = centres[Cosine(forest.x).nearest(orphans, centres)[1]]
    keep, assign = head.unique(return_inverse=True)
    return Plan.merging(keep, assign, forest.size)


@dataclass(frozen=True)
class Flashvid(TokenMethod):
    """Video: diverse tokens of each frame, trees of what stays alike; then what the text looks at."""

    paper: ClassVar[str] = "arXiv 2602.08024"
    video: ClassVar[bool] = True

    keep: float = option(0.094, "share of the visual tokens that is left at the end")
    late: float = option(0.3, "share of the tokens that the language model gets that is left after its cut")
    chosen: float = option(0.7, "share of a frame's budget that is salient, diverse tokens; the others are trees")
    link: float = option(0.8, "cosine above which a token joins the tree of one in the frame before")
    cut: float = option(0.9, "cosine of two frames under which a segment ends")
    segments: int = option(8, "segments, at least")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.late <= 1 or not 0 < self.chosen <= 1:
            raise ValueError("`late` and `chosen` are shares above 0, up to 1")
        if self.segments < 1:
            raise ValueError(f"`segments` is 1 or more, got {self.segments}")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """Trees at the input, then one cut in the language model."""
        first = Stage(INPUT, self._trees, min(1.0, self.keep / self.late), layers=last, whole=True)
        drops = choose(top_k(), drop(), last_row())
        return first, *at_layers(shape, [(DEPTH, self.keep)], drops, probe=-1, whole=True)

    def _trees(self, context: Context, k: int | None) -> Plan:
        assert k is not None
        frames = frames_of(context)
        quotas = apportion([1.0] * len(frames), k, [0] * len(frames), [len(tokens) for tokens in frames])
        salience = cls_attention()(context)
        parts = []
        for run in segments(pooled(context.x, frames), self.cut, self.segments):
            tokens = torch.cat([frames[i] for i in run]).sort().values
            parts.append((tokens, self._segment(part_of(context, tokens), salience[tokens], [quotas[i] for i in run])))
        return joined(context, parts)

    def _segment(self, part: Context, salience: Tensor, quotas: Sequence[int]) -> Plan:
        chosen = self._chosen(part, salience * event(part), quotas)
        left = sum(quotas) - len(chosen)
        if not left:
            return Plan.dropping(chosen, part.size)
        free = torch.ones(part.tokens, dtype=torch.bool, device=part.x.device)
        free[chosen] = False
        roots, tree = linked(part, self.link, free, left).unique(return_inverse=True)
        forest = Plan.merging(roots, tree, part.size)
        return forest.then(clustered(after(part, forest), torch.isin(roots, chosen), left))

    def _chosen(self, part: Context, worth: Tensor, quotas: Sequence[int]) -> Tensor:
        """Salient, diverse tokens of each frame."""
        found = []
        for tokens, quota in zip(frames_of(part), quotas, strict=True):
            if quota:
                one = part_of(part, tokens)
                found.append(tokens[max_min()(one, worth[tokens], math.ceil(self.chosen * quota))])
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=part.x.device)
