"""DUET-VLM: merge before the language model by what the tower looks at, then drop inside it by what the text looks at.

    vision to vision   by the class token's attention, of the tower's last layer:
                       the highest stay as they are; of the next `width` · c, every `width`-th becomes the centre of a
                       cluster, and the others go into the centre with the most similar key; what ranks lower is dropped
    text to vision     before layers at 1/2 and 3/4 of the depth keep what the text tokens after the image look at most,
                       mean over heads and tokens

Singh et al., DUET-VLM: Dual stage Unified Efficient Token reduction for VLM Training and Inference, CVPR 2026,
https://arxiv.org/abs/2602.18846. `keep` is the share that is left after the last cut; keep^(1/3) is left before the
language model and keep^(2/3) after its first cut. The default is about the authors' preset for LLaVA-1.5: 221 tokens,
of which 30 are clusters of 4, then 110, then 55.

Where we differ. The authors add the mean of a cluster's tokens to its centre, which about doubles the centre's length;
we take the mean of all of them. They give shares of 1/2 and 1/4 in the language model whatever the first stage leaves;
ours leave exactly `keep`. `text=salient` in the paper is nouns, verbs and the like, which needs a tagger; here words
are not known, only vectors, and salient are the text tokens that give the image more attention than the mean text token
does (the raters of SparseVLM): ours. In a plain tower the class token stands for the text.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tcw.methods import option
from tcw.tokens import INPUT, Shape, Stage, TokenMethod, choose
from tcw.tokens._layers import at_layers, pyramid
from tcw.tokens._similarity import tower_keys
from tcw.tokens.context import Context
from tcw.tokens.merges import drop, into_nearest
from tcw.tokens.plan import Plan
from tcw.tokens.scores import cls_attention, last, rows_of, text_rows
from tcw.tokens.selects import ranked, top_k

DEPTHS = (0.5, 0.75)
ALL, SALIENT = "all", "salient"


def salient_rows(context: Context) -> Tensor:
    """Attention from the text tokens that give the image at least as much as the mean text token does: [N]."""
    rows = rows_of(context).text().float()
    mass = rows.sum(1)
    return rows[mass >= mass.mean() * (1 - 1e-6)].mean(0)


@dataclass(frozen=True)
class DuetVlm(TokenMethod):
    """Keep and cluster what the class token looks at; in the language model drop what the text ignores."""

    paper: ClassVar[str] = "arXiv 2602.18846"

    keep: float = option(0.1, "share of the visual tokens that is left after the last cut")
    contextual: float = option(0.14, "share of clusters among the tokens that the language model gets")
    width: int = option(4, "tokens to a cluster, its centre included, where they are shared out evenly")
    text: str = option(ALL, "text tokens whose attention counts: all after the image, or salient ones", (ALL, SALIENT))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual <= 1:
            raise ValueError(f"`contextual` is a share between 0 and 1, got {self.contextual:g}")
        if self.width < 1:
            raise ValueError(f"`width` is 1 or more, got {self.width}")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """Clusters at the input, then two cuts in the language model."""
        first, *shares = pyramid(self.keep, 1 + len(DEPTHS))
        drops = choose(top_k(), drop(), salient_rows if self.text == SALIENT else text_rows())
        cuts = list(zip(DEPTHS, shares, strict=True))
        return Stage(INPUT, self._cluster, first, layers=last), *at_layers(shape, cuts, drops)

    def _cluster(self, context: Context, k: int | None) -> Plan:
        assert k is not None
        return clustered(context, cls_attention()(context), k, math.floor(self.contextual * k + 0.5), self.width)


def clustered(context: Context, score: Tensor, k: int, centres: int, width: int) -> Plan:
    """The k - `centres` highest scores as they are, and `centres` clusters made of the width · centres next ones."""
    order = ranked(score)
    stay, near = order[: k - centres], order[k - centres :][: width * centres]
    centre = near[torch.arange(centres, device=near.device) * len(near) // max(centres, 1)]
    keep = torch.cat([stay, centre]).sort().values
    given = torch.zeros(context.tokens, dtype=torch.bool, device=keep.device)
    given[near] = True
    return into_nearest(context, keep, torch.isin(keep, centre), given, tower_keys)
