"""Random: keep any units. The control that every scorer has to beat at the same number of tokens.

    score = a draw from [0, 1) with the seed (NumPy's PCG64)

Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tcw.methods import option
from tcw.prompt import Prompt, PromptMethod


@dataclass(frozen=True)
class Random(PromptMethod):
    """Keep any words: the control that other methods have to beat."""

    paper: ClassVar[str] = "none: a control"

    seed: int = option(0, "another seed keeps other words")

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"`seed` is 0 or more, not {self.seed}")

    def scores(self, prompt: Prompt) -> np.ndarray:
        """Draws: float64 [units]."""
        return np.random.default_rng(self.seed).random(len(prompt.units))
