"""What is said of a compressed prompt against plain forward passes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tcw.errors import UsageError
from tcw.prompt.check import Case, Checked, Reading, check, check_all, interval, summary, word_f1
from tcw.prompt.scorer import Scorer, load_scorer

CASE = Case(
    "The rain in Spain falls on the plain.", "rain Spain falls plain.", question="Where?", instruction="Answer:",
    controls={"truncate": "The rain in Spain falls"},
)  # fmt: skip


@pytest.fixture
def scorer(tiny_llama: Path) -> Scorer:
    return load_scorer(str(tiny_llama), "cpu")


def continued(scorer: Scorer, prompt: str, count: int) -> list[int]:
    ids, found = list(scorer.tokenizer(prompt)["input_ids"]), []
    for _ in range(count):
        with torch.inference_mode():
            found.append(int(scorer.model(input_ids=torch.tensor([[*ids, *found]])).logits[0, -1].argmax()))
        if found[-1] == 1:
            return found[:-1]
    return found


def losses(scorer: Scorer, prompt: str, answer: list[int]) -> np.ndarray:
    ids = list(scorer.tokenizer(prompt)["input_ids"])
    with torch.inference_mode():
        logits = scorer.model(input_ids=torch.tensor([[*ids, *answer]])).logits[0].double().log_softmax(-1)
    return np.array([float(-logits[len(ids) + i - 1, token]) for i, token in enumerate(answer)])


def test_the_greedy_answer_to_the_original_is_scored(scorer: Scorer) -> None:
    answer = continued(scorer, "Answer:\n\nThe rain in Spain falls on the plain.\n\nWhere?", 8)
    found = check(CASE, scorer, tokens=8)
    assert found.scored == "generated"
    assert found.answer_tokens == len(answer)
    assert found.original.answer == scorer.tokenizer.decode(answer)
    assert found.original.same == found.original.f1 == 1
    for text, reading in [(CASE.original, found.original), (CASE.compressed, found.compressed),
                          (CASE.controls["truncate"], found.controls["truncate"])]:  # fmt: skip
        prompt = f"Answer:\n\n{text}\n\nWhere?"
        expected = losses(scorer, prompt, answer)
        assert reading.nll == pytest.approx(expected.mean(), abs=1e-3)
        assert reading.worst == pytest.approx(expected.max(), abs=1e-3)
        assert reading.tokens == len(prompt)
        own = continued(scorer, prompt, 8)
        same = next(
            (i for i, (a, b) in enumerate(zip(own, answer, strict=False)) if a != b), min(len(own), len(answer))
        )
        assert reading.same == pytest.approx(same / max(len(own), len(answer)))
    assert found.rise == found.compressed.nll - found.original.nll
    assert found.better_than == {"truncate": found.compressed.nll < found.controls["truncate"].nll}


def test_a_given_answer_is_scored_as_it_stands(scorer: Scorer) -> None:
    case = Case("The rain in Spain", "rain Spain", answer=" falls mainly on the plain")
    found = check(case, scorer, tokens=10)
    assert (found.scored, found.answer_tokens) == ("given", 10)
    ids = list(scorer.tokenizer(" falls mai")["input_ids"])
    assert found.compressed.nll == pytest.approx(losses(scorer, "rain Spain", ids).mean(), abs=1e-3)


def test_the_same_prompt_changes_nothing(scorer: Scorer) -> None:
    found = check(Case(CASE.original, CASE.original), scorer, tokens=6)
    assert found.rise == 0
    assert found.compressed == found.original


def test_chat(tiny_llama: Path) -> None:
    import copy

    loaded = load_scorer(str(tiny_llama), "cpu")
    with pytest.raises(UsageError, match="chat template"):
        check(CASE, loaded, chat=True)
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    found = check(CASE, Scorer(loaded.model, tokenizer, "chat"), tokens=4, chat=True)
    prompt = f"<Answer:\n\n{CASE.original}\n\nWhere?>"
    assert found.original.tokens == len(prompt)
    assert found.original.answer == tokenizer.decode(continued(loaded, prompt, 4))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(" ", "a"), "no prompt"),
        (Case("a", ""), "nothing is left"),
        (Case("a" * 600, "a"), "reads 512"),
        (Case("a", "a", answer=""), "no answer"),
    ],
)
def test_refusals(scorer: Scorer, case: Case, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check(case, scorer, tokens=4)


def made(original: float, compressed: float, truncate: float, same: float = 1.0) -> Checked:
    def reading(nll: float, same: float = 1.0) -> Reading:
        return Reading(10, nll, nll, "yes", same, same)

    return Checked("m", "given", 4, reading(original), reading(compressed, same), {"truncate": reading(truncate)})


def test_summary_says_who_wins() -> None:
    found = summary([made(1, 1.1 + i / 100, 1.5) for i in range(5)])
    assert found["cases"] == 5
    assert found["variants"]["compressed"]["rise"] == pytest.approx(0.12)
    low, high = found["variants"]["compressed"]["rise_interval"]
    assert 0.1 <= low < 0.12 < high <= 0.14
    assert found["margins"]["truncate"]["mean"] == pytest.approx(0.38)
    assert found["verdict"] == "better than truncate, on 5 prompts"
    json.dumps(found)


def test_summary_says_when_nothing_is_won() -> None:
    found = summary([made(1, 1.5, 1.2, 0.5), made(1, 1.5, 1.7)])
    assert found["verdict"] == "no better than truncate, on 2 prompts"
    assert found["variants"]["compressed"]["equal"] == 0.5
    assert found["variants"]["compressed"]["same"] == 0.75
    assert summary([Checked("m", "given", 4, *2 * [made(1, 1, 1).original], {})])["verdict"] == "no control was run"
    with pytest.raises(ValueError, match="nothing"):
        summary([])


def test_check_all_tells_how_far_it_is(scorer: Scorer) -> None:
    events = []
    found = check_all([CASE, Case("a b", "b")], scorer, tokens=3, progress=events.append)
    assert [event.done for event in events] == [1, 2]
    assert found[0] == check(CASE, scorer, tokens=3)
    assert json.loads(json.dumps(found[0].to_json()))["rise"] == found[0].rise


def test_word_f1() -> None:
    assert word_f1("a b b", "b c") == pytest.approx(2 * 1 / 5)
    assert word_f1("", "") == 1
    assert word_f1("a", "") == 0


def test_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = interval(values)
    assert low == pytest.approx(values.mean() - 1.96 * 2 / 20, abs=0.05)
    assert high == pytest.approx(values.mean() + 1.96 * 2 / 20, abs=0.05)
    assert interval(values) == [low, high]
