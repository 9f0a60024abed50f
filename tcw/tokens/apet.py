"""ApET: keep the tokens that a few others describe worst; merge the rest. Looks at no attention.

    S = k tokens far apart (farthest-point sampling)        e_i = ‖x_i - (x_i Sᵀ (S Sᵀ + λI)⁻¹) S‖₂
    kept: S and the K - k largest e;  each other token goes into the most similar of the K - k, as a mean

Ma et al., ApET: Approximation-Error Guided Token Compression for Efficient VLMs, CVPR 2026,
https://arxiv.org/abs/2602.19870: once before the language model and once in the middle of it. Of 576 tokens the
authors' settings leave 96 and then 32, which is `layer_keep`; k = 10.

Where we differ. Sampling starts at the token farthest from the mean: theirs starts at a random one. λ goes with the
scale of the features. k is at most K // 2 (theirs needs K > k), and a note says so. Means count a token that was merged
before as often as what it stands for. The first stage looks at the projector's output, not its input: the space in
which what is merged is read. Positions are the tokens' own unless `positions=compact`, which is theirs. Calibration:
none.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tcw.methods import option
from tcw.tokens import INPUT, Shape, Stage, TokenMethod, layer
from tcw.tokens._similarity import farthest_points
from tcw.tokens.context import Context
from tcw.tokens.merges import into_nearest
from tcw.tokens.plan import Plan
from tcw.tokens.scores import residual
from tcw.tokens.selects import ranked


@dataclass(frozen=True)
class Apet(TokenMethod):
    """Keep the tokens that a few others describe worst, merge the rest; looks at no attention."""

    paper: ClassVar[str] = "arXiv 2602.19870"

    basis: int = option(10, "tokens that describe the others; they are always kept")
    layer_keep: float = option(0.333, "share of the first stage's tokens that the second leaves; 1: one stage only")
    depth: float = option(0.5, "where in the language model the second stage is, 0..1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis < 1:
            raise ValueError(f"`basis` is 1 or more, got {self.basis}")
        if not 0 < self.layer_keep <= 1:
            raise ValueError(f"`layer_keep` is a share between 0 and 1, got {self.layer_keep:g}")
        if not 0 < self.depth < 1:
            raise ValueError(f"`depth` is between 0 and 1, got {self.depth:g}")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """Two cuts; after the second the share `keep` is left, after the first keep / layer_keep."""
        second = Stage(layer(depth=self.depth), self._plan, self.keep)
        if self.layer_keep == 1:
            return (Stage(INPUT, self._plan, self.keep),)
        return Stage(INPUT, self._plan, min(1.0, self.keep / self.layer_keep)), second

    def _plan(self, context: Context, k: int | None) -> Plan:
        assert k is not None, "a share is given"
        if k >= context.tokens:
            return Plan.everything(context.size)
        count = max(1, min(self.basis, k // 2))
        if count < self.basis:
            context.note(f"where fewer than {2 * self.basis} tokens of an image stay, its basis is half of them")
        basis = farthest_points(context.x, count)
        error = residual(context.x, basis).index_fill(0, basis, -torch.inf)
        keep = torch.cat([basis, ranked(error)[: k - count]]).sort().values
        takers = ~torch.isin(keep, basis)
        return into_nearest(context, keep, takers if k > count else None)
