"""PyramidDrop: drop the same share of what is left at three layers, by what the prompt's last token looks at.

    before layers at 1/4, 1/2 and 3/4 of the depth keep the top  keep^(1/3), keep^(2/3), keep  of all visual tokens
    score_j = mean over heads of A[last, j]       of the layer itself

so that `keep` is the share that is left at the end; on average over the layers it is (1 + Σ) / 4. The default, 1/8, is
the paper's λ = 0.5 at each of three stages: 1/2, 1/4, 1/8. Xing et al., PyramidDrop: Accelerating Your Large
Vision-Language Models via Pyramid Visual Redundancy Reduction, CVPR 2025, https://arxiv.org/abs/2410.17247.

Where we differ: tokens keep their positions unless `positions=compact` is asked for, as the authors' code does. Where
two cuts fall on one layer (few layers, deepstack features), the later one stands for both. In a model that is only a
tower, the class token's row stands for the prompt's last one.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.methods import option
from tcw.tokens import Shape, Stage, TokenMethod, choose
from tcw.tokens._layers import at_layers, pyramid
from tcw.tokens.merges import drop
from tcw.tokens.scores import last_row
from tcw.tokens.selects import top_k

DEPTHS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Pyramiddrop(TokenMethod):
    """Three cuts in the language model, each keeping the same share of what the prompt looks at."""

    paper: ClassVar[str] = "arXiv 2410.17247"

    keep: float = option(0.125, "share of the visual tokens that is left after the last cut")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """A cut at each quarter of the depth."""
        cuts = list(zip(DEPTHS, pyramid(self.keep, len(DEPTHS)), strict=True))
        return at_layers(shape, cuts, choose(top_k(), drop(), last_row()))
