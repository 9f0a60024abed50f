"""DivPrune: keep the tokens that are farthest from each other.

    next = argmax_i min_{j chosen} (1 - cos(v_i, v_j))          v: the projector's output

Alvar et al., DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, CVPR 2025,
https://arxiv.org/abs/2503.02175: greedy max-min diversity, the first token being the one whose nearest other is
farthest. Looks at no attention and at no text. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.tokens import INPUT, Shape, Stage, TokenMethod, choose
from tcw.tokens.merges import drop
from tcw.tokens.selects import max_min


@dataclass(frozen=True)
class Divprune(TokenMethod):
    """Keep the tokens that are farthest from each other; looks at neither attention nor text."""

    paper: ClassVar[str] = "arXiv 2503.02175"

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut."""
        return (Stage(INPUT, choose(max_min(), drop()), self.keep),)
