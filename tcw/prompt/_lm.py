"""What methods that ask a causal language model have in common."""

from dataclasses import dataclass

import numpy as np

from tcw.methods import option
from tcw.prompt import Prompt, PromptMethod
from tcw.prompt.scorer import DEFAULT, Scorer, load_scorer


@dataclass(frozen=True)
class Asking(PromptMethod):
    """A method that asks a causal language model."""

    model: str = option(DEFAULT, "MODEL that scores the text: any causal language model that tcw reads")

    def reader(self) -> str:
        """The model whose tokenizer counts where the user names none."""
        return self.model

    def scorer(self, prompt: Prompt) -> Scorer:
        """The model, loaded."""
        return load_scorer(self.model, prompt.device)


def ahead(*parts: str) -> str:
    """What stands before a text: its parts that are not empty, each with an empty line after it."""
    return "".join(f"{part}\n\n" for part in parts if part)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks in [0, 1), float64 [n]: the lowest value has 0; of equal ones the later has the lower rank."""
    order = np.lexsort((-np.arange(len(values)), values))
    found = np.empty(len(values))
    found[order] = np.arange(len(values)) / max(1, len(values))
    return found
