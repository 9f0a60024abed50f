"""FastV: after an early layer of the language model, drop what the prompt's last token does not look at.

    score_j = mean over heads of A[last, j]       of layer `layer` - 1; cut before layer `layer`

Chen et al., An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language
Models, ECCV 2024, https://arxiv.org/abs/2403.06764: K is `layer`, R is 1 - `keep`.

Where we differ: one row of attention is computed from queries and keys, where the authors' code turns the whole map of
a layer on. Where the first layers get deepstack features, the cut comes after them. In a model that is only a tower,
the class token's row (without one: the attention that tokens receive) is that of the block of the cut.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.methods import option
from tcw.tokens import Shape, Stage, TokenMethod, choose
from tcw.tokens._layers import at_layer
from tcw.tokens.merges import drop
from tcw.tokens.scores import last_row
from tcw.tokens.selects import top_k


@dataclass(frozen=True)
class Fastv(TokenMethod):
    """After an early layer, keep the visual tokens that the prompt's last token looks at."""

    paper: ClassVar[str] = "arXiv 2403.06764"

    keep: float = option(0.5, "share of the visual tokens that is left after the cut")
    layer: int = option(2, "layer before which tokens are cut, counted from 0")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut, by the attention of the layer before it."""
        return (at_layer(shape, self.layer, self.keep, choose(top_k(), drop(), last_row()), probe=-1),)
