"""FlashVLM: half of the tokens by what the text is about and the tower looks at, half diverse ones of the rest.

    r = soft maximum over text tokens w of cos(x_i, w)                    (softmax at temperature 0.05)
    t = sharpen(r):  softmax over tokens at 0.01, to the power 2.5, to 0..1, below its 0.995 quantile times 0.1, to 0..1
    s = a^(1 - η) · t^η                                                   a: class token's attention, to 0..1

x and w are in the language model's space, so text and image can be compared. Cai et al., FlashVLM: Text-Guided Visual
Token Selection for Large Multimodal Models, https://arxiv.org/abs/2512.20561; constants are those of the authors' code,
and sharp: the half that goes by score is close to the few tokens nearest to the text. The other half is what is left
when, of the remaining tokens, the most alike are removed eight at a time (`bipartite_dedup`), and more of images with
more than 576 tokens (ours: rounds are as many).

Where we differ: a and t are at least 1e-6, so that a zero of one does not hide the other. Without text the score is a
alone. In a tower without class token a is the attention that tokens receive. In a plain tower the class token's vector
stands for the text.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tcw.methods import option
from tcw.tokens import INPUT, Shape, Stage, TokenMethod, choose
from tcw.tokens.context import Context
from tcw.tokens.merges import drop
from tcw.tokens.scores import cls_attention, last, min_max, text_similarity
from tcw.tokens.selects import important_then_diverse

LEAST = 1e-6
DAMPED = 0.1


def sharpened(relevance: Tensor, temperature: float, power: float, spared: float) -> Tensor:
    """Likeness to the text [N] -> 0..1, of which all but about the share `spared` is damped to a tenth or less."""
    found = min_max((relevance.float() / temperature).softmax(0) ** power)
    found = torch.where(found < torch.quantile(found, 1 - spared), DAMPED * found, found)
    return min_max(found)


@dataclass(frozen=True)
class Flashvlm(TokenMethod):
    """Half of the tokens by likeness to the text and the class token's attention, half diverse ones."""

    paper: ClassVar[str] = "arXiv 2512.20561"

    keep: float = option(0.22, "share of the visual tokens that is left")
    text: float = option(0.5, "weight of the text in the score (η), 0 to 1; the class token has the rest")
    important: float = option(0.5, "share of the tokens left that goes by score; the others are diverse")
    temperature: float = option(0.01, "of the softmax over tokens: lower is sharper")
    power: float = option(2.5, "to which likeness to the text is raised: higher is sharper")
    spared: float = option(0.005, "share of tokens whose likeness to the text is not damped to a tenth")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text", "important", "spared"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is between 0 and 1, got {getattr(self, name):g}")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` is above 0, got {self.temperature:g}")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut at the input."""
        return (
            Stage(INPUT, choose(important_then_diverse(self.important), drop(), self.score), self.keep, layers=last),
        )

    def score(self, context: Context) -> Tensor:
        """Attention of the class token and likeness to the text, as a weighted geometric mean: [N]."""
        attention = min_max(cls_attention()(context)).clamp(min=LEAST)
        if context.text is None or not len(context.text):
            context.note("there is no text: tokens are chosen by the attention of the class token alone")
            return attention
        likeness = sharpened(text_similarity("soft", 0.05)(context), self.temperature, self.power, self.spared)
        return ((1 - self.text) * attention.log() + self.text * likeness.clamp(min=LEAST).log()).exp()
