"""Tempo: share a budget out over the segments of a video by how much the question is about them.

    k_s = least + (k - S · least) · r_s / Σ r          r: relevance of the S segments, from 0 (lowest) to 1 (highest)

(adaptive token allocation, ATA, where the budget binds; no segment gets more than it has, and Σ k_s = k.) Fei et al.,
Small Vision-Language Models are Smart Compressors for Long Video Understanding, https://arxiv.org/abs/2604.08120.

Where we differ: **this is the allocation only**. In the paper a small vision-language model, trained for it in four
steps, condenses a segment into memory tokens, says by its yes or no how relevant it is, and puts what matters first, so
that a segment's tokens are cut at the end. Without that model, relevance is the mean cosine of a segment's tokens and
the text's (as features of the language model's input), and, as the tokens of a picture come in no order of importance,
they are taken evenly over the segment; `cut=head` takes the first ones, as the paper does. Where the question is about
no segment more than others, or there is no text, all get the same. A single image is one segment. In a plain tower the
frames come as a batch, which is planned as one, and class tokens stand for the text.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tcw.methods import option
from tcw.tokens import INPUT, Shape, Stage, TokenMethod
from tcw.tokens._frames import evenly, frames_of
from tcw.tokens.allocates import by_relevance
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan
from tcw.tokens.scores import text_similarity

EVEN, HEAD = "even", "head"


def relevance(context: Context) -> Tensor:
    """Mean cosine of each token and the text's: [N]; without text, all alike."""
    if context.text is None or not len(context.text):
        context.note("there is no text: all segments are of the same relevance")
        return torch.zeros(context.tokens, device=context.x.device)
    return text_similarity("mean")(context)


@dataclass(frozen=True)
class Tempo(TokenMethod):
    """Video: segments get tokens by how much they are about the question, taken evenly from each."""

    paper: ClassVar[str] = "arXiv 2604.08120"
    video: ClassVar[bool] = True

    keep: float = option(0.25, "share of all frames' visual tokens that is left")
    segment: int = option(1, "frames to a segment; more where not each can have a token")
    least: int = option(4, "tokens that each segment keeps, as far as the budget goes")
    cut: str = option(EVEN, "which tokens of a segment stay: evenly spread ones, or the first", (EVEN, HEAD))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment < 1 or self.least < 0:
            raise ValueError("`segment` is 1 or more, `least` 0 or more")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut at the input."""
        return (Stage(INPUT, self._plan, self.keep, whole=True),)

    def _plan(self, context: Context, k: int | None) -> Plan:
        assert k is not None
        frames, alike = frames_of(context), relevance(context)
        length = max(self.segment, math.ceil(len(frames) / k))
        parts = [torch.cat(frames[i : i + length]).sort().values for i in range(0, len(frames), length)]
        found = [float(alike[tokens].mean()) for tokens in parts]
        counts = by_relevance(found, k, [len(tokens) for tokens in parts], self.least)
        kept = [tokens[self._taken(len(tokens), n, tokens.device)] for tokens, n in zip(parts, counts, strict=True)]
        return Plan.dropping(torch.cat(kept), context.size)

    def _taken(self, count: int, k: int, device: torch.device) -> Tensor:
        return torch.arange(k, device=device) if self.cut == HEAD else evenly(count, k, device)
