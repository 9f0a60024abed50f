"""ADSC: keep every so-manyth visual token at three layers of the language model; no score at all. Not tuned here.

    before layers at 1/4, 1/2 and 3/4 of the depth: tokens ⌊(i + 1/2) · n / k⌋ of the n that are left, i = 0 .. k - 1

with k such that `keep`^(1/3), `keep`^(2/3), `keep` of the image's tokens are left. Attention-Driven Self-Compression
(Deniz et al., https://arxiv.org/abs/2602.12618): a language model that is tuned so (with LoRA, over ever stronger
compression) learns to move what it needs into the tokens that stay.

Where we differ: **we do not tune the model**. Without that this is a baseline, uniform downsampling, and the paper's
results do not hold for it. Depths and shares are ours.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.methods import option
from tcw.tokens import Shape, Stage, TokenMethod
from tcw.tokens._frames import evenly
from tcw.tokens._layers import at_layers, pyramid
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan

DEPTHS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Adsc(TokenMethod):
    """Keep every so-manyth token at three layers, without a score: a baseline, the model is not tuned."""

    paper: ClassVar[str] = "arXiv 2602.12618"
    static: ClassVar[bool] = True

    keep: float = option(0.25, "share of the visual tokens that is left after the last cut")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """A cut at each quarter of the depth."""
        cuts = list(zip(DEPTHS, pyramid(self.keep, len(DEPTHS)), strict=True))
        return at_layers(shape, cuts, _stride)


def _stride(context: Context, k: int | None) -> Plan:
    assert k is not None
    return Plan.dropping(evenly(context.tokens, k, context.x.device), context.size)
