"""TempMe: join neighbouring clips of a video three times, and merge across each joined clip, then within.

    clips      of 1 frame; at 8/12, 9/12 and 10/12 of the tower's blocks 2, 2 and 3 neighbours are joined to one
    across     pairs of tokens of a joined clip that are alike as they are (x) are merged, 30 %
    within     then those whose keys are alike, 10 %

both by ToMe's matching (tcw/tokens/_matching.py), so that of 12 frames one clip is left, with 25 % of their tokens.
Shen et al., TempMe: Video Temporal Token Merging for Efficient Text-Video Retrieval, ICLR 2025,
https://arxiv.org/abs/2409.01156. `keep` scales all shares alike.

The authors train it (LoRA on queries, keys and values, and embeddings of a frame's place in its clip). This is its
merging alone, untuned: a baseline, not their method's quality.

Where we differ further. In a tower, which is given the frames as a batch, attention stays within a frame: the tokens
of a joined clip merge but do not attend to each other, each frame keeps its class token, and both merges come after
attention, where the authors merge across before it. Their two merges a block before the first join are left out. In a
vision-language model all is done at the language model's input, by its tokens and the tower's last keys. A single image
is one clip. Calibration: none.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from tcw.tokens import INPUT, Shape, Stage, TokenMethod, block
from tcw.tokens._frames import after, joined, part_of
from tcw.tokens._matching import matched
from tcw.tokens._similarity import tower_keys
from tcw.tokens.allocates import apportion
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan
from tcw.tokens.scores import last

DEPTHS, JOINS = (8 / 12, 9 / 12, 10 / 12), (2, 2, 3)
_ACROSS = math.log(1 - 0.3) / math.log((1 - 0.3) * (1 - 0.1))
"""Of what a join takes, in proportion, the part that is merged across."""


@dataclass(frozen=True)
class Tempme(TokenMethod):
    """Video: merge alike tokens in clips of 2, then 4, then 12 frames. Untuned: the authors train it."""

    paper: ClassVar[str] = "arXiv 2409.01156"
    video: ClassVar[bool] = True

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """Three cuts in a tower; in a vision-language model all three at its input."""
        frames = [math.prod(JOINS[: n + 1]) for n in range(len(JOINS))]
        if shape.layers:
            return (Stage(INPUT, partial(_merge, tuple(frames)), self.keep, layers=last, whole=True),)
        return tuple(
            Stage(block(depth=depth), partial(_merge, (length,)), self.keep ** ((n + 1) / 3), layers=last, whole=True)
            for n, (depth, length) in enumerate(zip(DEPTHS, frames, strict=True))
        )


def _merge(lengths: tuple[int, ...], context: Context, k: int | None) -> Plan:
    """Merge in clips of so many frames, one length after the other, until k tokens are left."""
    assert k is not None, "a share is given"
    plan, tokens = Plan.everything(context.size), context.tokens
    for n, length in enumerate(lengths):
        left = max(k, round(tokens * (k / tokens) ** ((n + 1) / len(lengths)))) if n + 1 < len(lengths) else k
        step = _join(context, length, left)
        plan, context = plan.then(step), after(context, step)
    return plan


def _join(context: Context, length: int, k: int) -> Plan:
    """Merge across clips of `length` frames, then within, until k tokens are left of all; one clip if k is too few."""
    clip = context.place[:, 0].round().long() // length
    clips = [(clip == one).nonzero()[:, 0] for one in clip.unique()]
    if k < len(clips):
        clips = [torch.arange(context.tokens, device=clip.device)]
    sizes = [len(tokens) for tokens in clips]
    budgets = apportion([float(n) for n in sizes], k, [1] * len(clips), sizes)
    return joined(context, [(some, _clip(part_of(context, some), n)) for some, n in zip(clips, budgets, strict=True)])


def _clip(part: Context, k: int) -> Plan:
    """Merge the tokens of one clip: those that are alike, then those whose keys are."""
    between = round(part.tokens * (k / part.tokens) ** _ACROSS)
    across = matched(part.x, part.size, max(k, between))
    return across.then(matched(tower_keys(after(part, across)), across.size, k))
