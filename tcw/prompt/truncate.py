"""Truncate: keep the head of the text, its tail, or both ends. The control that every scorer has to beat.

    head    score of the i-th of n units = n − i
    tail    score = i
    ends    score = the distance from the middle: what is dropped is the middle

Chat programs and serving engines cut like this when a prompt is too long, and models read best what stands at the ends
of their context (Liu et al. 2023, "Lost in the middle", arXiv 2307.03172). What is protected stays wherever it stands.
To meet a budget exactly the last units at the cut may have a small hole.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tcw.methods import option
from tcw.prompt import Prompt, PromptMethod

HEAD, TAIL, ENDS = "head", "tail", "ends"


@dataclass(frozen=True)
class Truncate(PromptMethod):
    """Keep the start of the text, its end, or both: the control to beat."""

    paper: ClassVar[str] = "none: a control"

    side: str = option(HEAD, "what stays", choices=(HEAD, TAIL, ENDS))

    def scores(self, prompt: Prompt) -> np.ndarray:
        """Places, not contents: float64 [units]."""
        place = np.arange(len(prompt.units), dtype=np.float64)
        if self.side == ENDS:
            return np.abs(place - (len(place) - 1) / 2)
        return place if self.side == TAIL else -place
