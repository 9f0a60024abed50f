"""First-token surprisal of paragraphs against one forward pass for each."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tcw.prompt import Prompt, Unit
from tcw.prompt.asap import Asap, anchored
from tcw.prompt.engine import Settings, compress
from tcw.prompt.scorer import load_scorer
from tcw.prompt.units import cut

STEPS = ["So we add 2 and 3.", "Wait, that is wrong.", "  Now take 7.", "Wait, that is wrong.", "Thus 12."]
TEXT = "\n\n".join(STEPS)


def prompt_of(text: str, question: str = "") -> Prompt:
    return Prompt(text, [Unit(*span) for span in cut(text, "paragraph")], question=question, device="cpu")


@pytest.mark.parametrize("question", ["", "What is 5 + 7?"])
def test_surprise_of_the_first_token(tiny_llama: Path, question: str) -> None:
    scorer = load_scorer(str(tiny_llama), "cpu")
    head = f"{question}\n\n" if question else ""
    expected = []
    for i in range(1, 4):  # every character is a token
        at = len(head) + TEXT.index("Now") if i == 2 else len(head) + len("\n\n".join(STEPS[:i])) + 2
        ids = scorer.tokenizer((head + TEXT)[: at + 1])["input_ids"]
        with torch.inference_mode():
            logits = scorer.model(input_ids=torch.tensor([ids[:-1]])).logits[0, -1].double()
        expected.append(float(-logits.log_softmax(-1)[ids[-1]]))
    found = Asap(model=str(tiny_llama)).scores(prompt_of(TEXT, question))
    np.testing.assert_allclose(found[1:4], expected, atol=1e-3)
    assert (found[[0, 4]] > found[1:4].max()).all(), "the first and the last go last"


def test_equal_paragraphs_are_told_apart(tiny_llama: Path) -> None:
    """The one that goes is the one of low surprise, not the first of its words."""
    scorer = load_scorer(str(tiny_llama), "cpu")
    method = Asap(model=str(tiny_llama))
    found = method.scores(prompt_of(TEXT))
    assert found[1] != found[3]
    result = compress(
        TEXT, method, target_tokens=len(TEXT) - len(STEPS[1]) - 2, tokenizer=scorer.tokenizer,
        settings=Settings(protect=(), device="cpu"),
    )  # fmt: skip
    least = int(np.argmin(found[1:4])) + 1
    assert not result.kept[least]


def test_code_fences_are_never_halved() -> None:
    text = "\n\n".join(
        ["Start.", "Think.", "```python\na = 1", "b = 2", "c = 3\n```", "More.", "```\nx\n```", "Go.", "End."]
    )
    assert anchored(prompt_of(text)).tolist() == [True, False, True, True, True, False, False, False, True]


def test_a_fence_that_never_closes_holds_the_rest() -> None:
    assert anchored(prompt_of("A.\n\nB.\n\n~~~\nx\n\ny\n\nz")).tolist() == [True, False, True, True, True]


def test_openers_are_reported(tiny_llama: Path) -> None:
    method = Asap(model=str(tiny_llama))
    notes = method.notes(prompt_of(TEXT), np.array([True, False, True, False, True]))
    assert notes == ["2 units cut; they begin with: Wait 2"]
    assert method.notes(prompt_of(TEXT), np.ones(5, bool)) == []


@pytest.mark.parametrize("text", ["", " \n\n ", "One."])
def test_next_to_nothing(tiny_llama: Path, text: str) -> None:
    prompt = prompt_of(text)
    found = Asap(model=str(tiny_llama)).scores(prompt)
    assert found.shape == (len(prompt.units),)
    assert np.isfinite(found).all()
