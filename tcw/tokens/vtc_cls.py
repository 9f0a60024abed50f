"""VTC-CLS: keep the tokens that the vision tower's class token looks at.

    score_j = Σ_{l in the last third of the layers} mean_h A_l[h, CLS, j]

Wang et al., [CLS] Token Tells Everything Needed for Training-free Efficient MLLMs, 2024,
https://arxiv.org/abs/2412.05819: layers agree on what matters better than one does. In LLaVA-1.5 the sum goes over
layers 16 to 22 of the 23 that its features come from; we take the same third of any tower. A tower without a class
token is scored by the attention that tokens receive. Attention rows are computed from queries and keys, so no attention
map is needed. Where we differ: any number of tokens and images; the authors' code knows 576 and one. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.tokens import INPUT, Shape, Stage, TokenMethod, choose
from tcw.tokens.merges import drop
from tcw.tokens.scores import cls_attention, last_third
from tcw.tokens.selects import top_k


@dataclass(frozen=True)
class VtcCls(TokenMethod):
    """Keep the tokens that the vision tower's class token looks at, over its last layers."""

    paper: ClassVar[str] = "arXiv 2412.05819"

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut."""
        return (Stage(INPUT, choose(top_k(), drop(), cls_attention(last_third)), self.keep, layers=last_third),)
