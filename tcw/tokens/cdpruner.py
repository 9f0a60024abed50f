"""CDPruner: keep the set of tokens that is most diverse, given what the text asks for.

    L = diag(r) C diag(r)        C_ij = cos(v_i, v_j)        r = likeness to the text, brought to 0..1
    greedily the set S with the largest det(L_S)

Zhang et al., Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs, NeurIPS 2025,
https://arxiv.org/abs/2506.10967. Each step is one row of a Cholesky factor.

Where we differ: the authors compare CLIP's image and text features where a model has CLIP's text tower; we always
compare the projector's output with the language model's embeddings of the sample's text, mean of the cosines, which any
model has. Their code takes minus the cosine, for CLIP features as LLaVA uses them point away from the text that fits;
we take it as it is, and `sign=-1` is theirs. Try both on a model whose answers matter. Without text (or in a plain
tower, where the class token stands for it): what `text_similarity` says. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.methods import option
from tcw.tokens import INPUT, Shape, Stage, TokenMethod, choose
from tcw.tokens.merges import drop
from tcw.tokens.scores import text_similarity
from tcw.tokens.selects import dpp


@dataclass(frozen=True)
class Cdpruner(TokenMethod):
    """Keep the most diverse set of tokens given the text: a determinantal point process."""

    paper: ClassVar[str] = "arXiv 2506.10967"

    sign: int = option(1, "1: what is like the text matters; -1: what is unlike it", choices=(1, -1))

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut."""
        return (Stage(INPUT, choose(dpp(), drop(), text_similarity(sign=self.sign)), self.keep),)
