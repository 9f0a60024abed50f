"""IDPruner: keep tokens that matter and are unlike those kept already (maximal marginal relevance).

    next = argmax_i λ · importance_i - (1 - λ) · max_{j chosen} cos(v_i, v_j)

Tan et al., IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs, 2026,
https://arxiv.org/abs/2602.13315. Importance is brought to 0..1, the first token is the most important one, λ = 0.5.

Where we differ: the authors' importance is a trained network that belongs to one model. Here it is any of our scores
(`score`), so their numbers are not to be expected. Importances and cosines spread differently: where cosines are all
alike, a λ of 0.5 is nearly importance alone. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.methods import option
from tcw.tokens import INPUT, Score, Shape, Stage, TokenMethod, choose, no_layers
from tcw.tokens.merges import drop
from tcw.tokens.scores import approximation_error, cls_attention, last, norm, received_attention, text_similarity
from tcw.tokens.selects import mmr

_SCORES: dict[str, Score] = {
    "cls": cls_attention(last),
    "received": received_attention(last),
    "norm": norm(),
    "error": approximation_error(),
    "text": text_similarity(),
}


@dataclass(frozen=True)
class Idpruner(TokenMethod):
    """Keep tokens that matter and are unlike those kept already; takes any score."""

    paper: ClassVar[str] = "arXiv 2602.13315"

    score: str = option("cls", "what matters: attention (cls, received), norm, error, text", choices=tuple(_SCORES))
    lam: float = option(0.5, "how much importance counts, 0..1; the rest is unlikeness")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lam <= 1:
            raise ValueError(f"`lam` is between 0 and 1, got {self.lam:g}")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut."""
        layers = last if self.score in ("cls", "received") else no_layers
        plan = choose(mmr(self.lam), drop(), _SCORES[self.score])
        return (Stage(INPUT, plan, self.keep, layers=layers),)
