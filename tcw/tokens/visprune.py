"""VisPruner: half of the tokens by attention, half as unlike each other as possible.

    important    the highest attention of the vision tower's class token
    diverse      of the others, what is left when the most alike are removed, eight at a time: tokens are dealt to two
                 sides in turn, and those of the first side go that are most similar to one of the second

Zhang et al., Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs, ICCV 2025,
https://arxiv.org/abs/2412.01818. A tower without a class token is scored by the attention that tokens receive, as the
authors advise. Where we differ: tokens stay in the image's order from round to round. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.methods import option
from tcw.tokens import INPUT, Shape, Stage, TokenMethod, choose
from tcw.tokens.merges import drop
from tcw.tokens.scores import cls_attention, last
from tcw.tokens.selects import important_then_diverse


@dataclass(frozen=True)
class Visprune(TokenMethod):
    """VisPruner: half of the tokens by attention, half as unlike each other as possible."""

    paper: ClassVar[str] = "arXiv 2412.01818"

    important: float = option(0.5, "share of the tokens left that are chosen by attention, 0..1")
    removed: int = option(8, "tokens removed a round, the most alike")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(f"`important` is between 0 and 1, got {self.important:g}")
        if self.removed < 1:
            raise ValueError(f"`removed` is 1 or more, got {self.removed}")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut."""
        select = important_then_diverse(self.important, self.removed)
        return (Stage(INPUT, choose(select, drop(), cls_attention(last)), self.keep, layers=last),)
