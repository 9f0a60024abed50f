"""Token-level correlation: crops with more information get more tokens, and those are what the class token looks at.

    a patch is redundant if more than `counterparts` of its crop have keys with a cosine above `alike`
    density of a crop  d = 1 - redundant / N          its budget  K_s ~ d_s · N_s
    in each crop the K_s patches stay that the class token looks at most

with keys and attention of the tower's last layer. Zhang et al., Token-level Correlation-guided Compression for
Efficient Multimodal Document Understanding, https://arxiv.org/abs/2407.14439: for documents that are cut into crops,
many of them nearly blank.

Where we differ. In the paper K_s = ⌈d_s · N_s⌉, so that what is left depends on the image; here `keep` of all tokens
are left, shared out over a sample's images and over an image's crops in proportion to that. The paper's thresholds are
not published with code; `alike` and `counterparts` (a share of the crop's patches) are ours. The others go into the
most similar token that stays in their crop, or are dropped. An image in one piece is one crop: by the class token
alone. In a tower without one, patches are ranked by the attention that they receive.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tcw.methods import option
from tcw.tokens import INPUT, Shape, Stage, TokenMethod
from tcw.tokens._frames import joined, part_of
from tcw.tokens._similarity import tower_keys
from tcw.tokens.allocates import apportion, by_density, density
from tcw.tokens.context import Context
from tcw.tokens.merges import drop, nearest_mean
from tcw.tokens.plan import Plan
from tcw.tokens.scores import cls_attention, last, tower_of
from tcw.tokens.selects import top_k


def crops_of(context: Context) -> list[Tensor]:
    """The tokens of each crop that the tower saw: int64, ascending."""
    tower = tower_of(context, "crops")
    looked = tower.looked[tower.depth - 1]
    patches = looked[0].keys.shape[1] - int(looked[0].cls)
    numbers = torch.arange(len(looked), device=context.x.device, dtype=torch.float32)
    crop = tower.arrange(numbers[:, None, None].expand(-1, patches, 1))[:, 0].round()
    return [(crop == one).nonzero()[:, 0] for one in crop.unique()]


@dataclass(frozen=True)
class TokenCorr(TokenMethod):
    """Crops share the budget by information density; in each, what the class token looks at stays."""

    paper: ClassVar[str] = "arXiv 2407.14439"

    keep: float = option(0.34, "share of the visual tokens that is left")
    alike: float = option(0.8, "cosine of keys above which two patches are counterparts")
    counterparts: float = option(0.02, "counterparts that make a patch redundant, a share of its crop's")
    merge: bool = option(True, "the others go into the most similar token that stays; off: they are dropped")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut at the input, its budget shared out over the sample's images."""
        shared = by_density(self.alike, self.counterparts, tower_keys)
        return (Stage(INPUT, self._crops, self.keep, shared, layers=last),)

    def _crops(self, context: Context, k: int | None) -> Plan:
        assert k is not None
        crops = crops_of(context)
        parts = [part_of(context, tokens) for tokens in crops]
        weights = [part.tokens * self._density(part) for part in parts]
        low = [int(k >= len(crops))] * len(crops)
        counts = apportion(weights, k, low, [part.tokens for part in parts])
        select, merge, score = top_k(), nearest_mean() if self.merge else drop(), cls_attention()
        plans = [merge(part, select(part, score(part), n)) for part, n in zip(parts, counts, strict=True)]
        return joined(context, list(zip(crops, plans, strict=True)))

    def _density(self, part: Context) -> float:
        return density(tower_keys(part), self.alike, math.ceil(self.counterparts * part.tokens))
