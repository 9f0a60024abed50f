"""Random: keep any visual tokens. The control that every other way of choosing has to beat.

Drawn without replacement, each token as likely as any other. The same seed keeps the same tokens of every image of the
same size, whatever else is in the batch. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.methods import option
from tcw.tokens import Shape, Stage, TokenMethod, choose
from tcw.tokens._controls import PLACES, check_depth, place
from tcw.tokens.merges import drop
from tcw.tokens.scores import random_score
from tcw.tokens.selects import top_k


@dataclass(frozen=True)
class Random(TokenMethod):
    """Keep any visual tokens: the control that other methods have to beat."""

    paper: ClassVar[str] = "none: a control"
    static: ClassVar[bool] = True

    at: str = option("input", "cut at the language model's input, or before a layer of it", choices=PLACES)
    depth: float = option(0.5, "with at=layer: how far into the layers, 0..1")
    seed: int = option(0, "another seed keeps other tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_depth(self.depth)

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut."""
        return (Stage(place(self.at, self.depth), choose(top_k(), drop(), random_score(self.seed)), self.keep),)
