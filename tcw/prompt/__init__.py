"""Prompt compression, text in and text out: one method a file.

A text is cut into units (words, sentences, lines or paragraphs: spans of characters that together are the whole text).
A method says how much each unit matters; the engine (tcw/prompt/engine.py) keeps what is protected and the units that
matter most, in their order, until the text has exactly the tokens asked for, counted with the tokenizer of the model
that will read it. What comes out is made of spans of the original and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tcw.events import Report, silent
from tcw.methods import Method

if TYPE_CHECKING:
    import numpy as np

ENGINE: tuple[str, ...] = (
    "batch", "budget", "check", "engine", "protect", "report", "scorer", "units",
)  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """Characters [start, end) of the text; white space before a word belongs to it. Protected units always stay."""

    start: int
    end: int
    protected: bool = False


@dataclass(frozen=True)
class Prompt:
    """What a method scores.

    Attributes:
        text: what is to be compressed.
        units: all of it, in order, without gaps.
        question, instruction: what stands after and before the text, and is never compressed; "" for none.
        rate: the share of tokens that will be left, for methods that must know.
        count: text -> tokens of the model that will read it.
        device: as typed by the user.
        progress: is told on long work.
    """

    text: str
    units: Sequence[Unit]
    question: str = ""
    instruction: str = ""
    rate: float = 0.5
    count: Any = None
    device: str = "auto"
    progress: Report = field(default=silent)


class PromptMethod(Method):
    """A method that compresses text. `unit` is what it cuts by default: word, sentence, line or paragraph."""

    family: ClassVar[str] = "prompt"
    unit: ClassVar[str] = "word"

    def scores(self, prompt: Prompt) -> "np.ndarray":
        """How much each unit matters: float64 [units], higher stays; protected units may have any score.

        Raises UsageError: the method cannot score this text (no model, no question); the message says what to do.
        """
        raise NotImplementedError

    def reader(self) -> str:
        """The MODEL whose tokenizer counts tokens unless another is named; "" for any."""
        return ""

    def context_scores(self, contexts: Sequence[str], prompt: Prompt) -> "np.ndarray | None":
        """How much each of several contexts matters as a whole: float64 [contexts], higher stays; None: not asked.

        Of `prompt` all but `text` and `units` may be read.
        """
        return None

    def notes(self, prompt: Prompt, kept: "np.ndarray") -> Sequence[str]:
        """What the user should know of a choice of units (bool [units]), a line each."""
        return ()
