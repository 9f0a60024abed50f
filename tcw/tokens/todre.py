"""ToDRE: keep tokens far from each other; drop all of them where the text no longer looks at the image.

    input    greedily the token farthest from all chosen ones together, distance 1 - cosine      (`select=max-sum`)
             or the one whose nearest chosen one is farthest                                     (`select=max-min`)
    layers   from `exit_depth` on: at the first layer where the text gives an image less than `exit_ratio` of its
             attention, all tokens of that image that are left are dropped

Li et al., ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance, 2025,
https://arxiv.org/abs/2505.18757: v2 is max-sum, v1 was max-min. By the late layers what the image says has moved into
the text's tokens.

Ours, for the authors' values were not at hand: the first token is the one least like the mean, `exit_depth`,
`exit_ratio`, and that attention is the mean over heads and over the text tokens after the image: its rows are computed
at each layer from `exit_depth` on. `exit_ratio=1` drops at `exit_depth` whatever the text looks at and computes none,
`exit_ratio=0` never drops. A plain tower has no text, and no exit.
Calibration: none.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tcw.methods import option
from tcw.tokens import INPUT, Shape, Stage, TokenMethod, choose, layer
from tcw.tokens.context import Context
from tcw.tokens.merges import drop
from tcw.tokens.plan import Plan
from tcw.tokens.scores import text_rows
from tcw.tokens.selects import UNLIKE_MEAN, max_min, max_sum

_SELECTS = {"max-sum": max_sum, "max-min": max_min}


@dataclass(frozen=True)
class Todre(TokenMethod):
    """Keep tokens far from each other; drop them all where the text no longer looks at the image."""

    paper: ClassVar[str] = "arXiv 2505.18757"

    keep: float = option(0.1, "share of the visual tokens that is left at the input; at the end there may be none")
    select: str = option("max-sum", "how tokens are far from each other", choices=tuple(_SELECTS))
    exit_depth: float = option(0.5, "from where in the language model all tokens may be dropped, 0..1")
    exit_ratio: float = option(0.02, "share of the text's attention below which they are; 1: always, 0: never")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.exit_depth < 1:
            raise ValueError(f"`exit_depth` is between 0 and 1, got {self.exit_depth:g}")
        if not 0 <= self.exit_ratio <= 1:
            raise ValueError(f"`exit_ratio` is between 0 and 1, got {self.exit_ratio:g}")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """A cut at the input, and one before each layer at which tokens may leave."""
        first = Stage(INPUT, choose(_SELECTS[self.select](UNLIKE_MEAN), drop()), self.keep)
        start = max(math.ceil(self.exit_depth * shape.layers), shape.deepstack, 1)
        last = start + 1 if self.exit_ratio == 1 else shape.layers
        exits = range(start, min(last, shape.layers) if self.exit_ratio else start)
        return first, *(Stage(layer(n), self._leave) for n in exits)

    def _leave(self, context: Context, k: int | None) -> Plan:
        looked_at = 0.0 if self.exit_ratio == 1 or not context.tokens else float(text_rows()(context).sum())
        if looked_at >= self.exit_ratio:
            return Plan.everything(context.size)
        return Plan.dropping(torch.zeros(0, dtype=torch.int64, device=context.x.device), context.size)
