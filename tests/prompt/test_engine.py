"""What the engine promises of any method: extractive, exact, protected, deterministic, and clear errors."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcw.errors import TcwError, UnknownName, UsageError
from tcw.prompt import Prompt, PromptMethod, engine, protect
from tcw.prompt.budget import Counter, Fit
from tcw.prompt.engine import Result, Settings, compress, controls, method_of
from tcw.prompt.units import UNITS, Layout, cut

TEXTS = st.text(st.sampled_from(list('abN 9.\n"`-é章の')), min_size=1, max_size=80)
LONG = "The cat sat on the mat and did not move, while 3 dogs ran by https://x.org today. " * 5


def words(text: str) -> int:
    return len(text.split())


def made(text: str | Sequence[str], method: str | PromptMethod = "random", **options: Any) -> Result:
    amount = {key: options.pop(key) for key in ("rate", "target_tokens", "question", "instruction") if key in options}
    return compress(text, method, tokenizer=options.pop("tokenizer", words), settings=Settings(**options), **amount)


def any_fits(text: str, unit: str, target: int, held: bool) -> bool:
    """Whether a unit is small enough, or something stays anyway."""
    return held or any(words(text[a:b]) <= target for a, b in cut(text, unit))


@dataclass(frozen=True)
class By(PromptMethod):
    """Scores what a function says; remembers nothing."""

    rule: Callable[[Prompt], Any] = lambda prompt: np.zeros(len(prompt.units))
    contexts: Callable[[Sequence[str]], Any] = lambda contexts: None

    def scores(self, prompt: Prompt) -> np.ndarray:
        return self.rule(prompt)

    def context_scores(self, contexts: Sequence[str], prompt: Prompt) -> np.ndarray | None:
        return self.contexts(contexts)

    def notes(self, prompt: Prompt, kept: np.ndarray) -> list[str]:
        return [f"{int(kept.sum())} of {len(prompt.units)}"]

    def options(self) -> dict[str, Any]:
        return {}


# ---- what is promised


@given(TEXTS, st.sampled_from(UNITS), st.integers(0, 5), st.floats(0.05, 1))
def test_extractive_exact_protected_and_the_same_again(text: str, unit: str, seed: int, rate: float) -> None:
    settings: dict[str, Any] = {
        "unit": unit, "seed": seed, "rate": rate, "protect": ("numbers", "code"), "keep": ("N.",), "markup": False,
    }  # fmt: skip
    held = protect.find(text, ("numbers", "code"), ("N.",)).spans
    least = Layout(text, cut(text, unit), held).join(protect.touched(cut(text, unit), held))
    target = max(1, int(rate * words(text) + 1e-9))
    if target < words(text) and (words(least) > target or not any_fits(text, unit, target, bool(held))):
        with pytest.raises(UsageError, match=r"protected alone|fits into"):
            made(text, **settings)
        return
    result = made(text, **settings)
    assert "".join(text[a:b] for a, b in result.spans) == result.text
    assert [a for span in result.spans for a in span] == sorted({a for span in result.spans for a in span})
    assert words(result.text) == result.after <= result.target
    assert all(any(a <= start and end <= b for a, b in result.spans) for start, end in held)
    assert all(kept for kept, each in zip(result.kept, result.units, strict=True) if each.protected)
    again = made(text, **settings)
    assert (again.text, again.spans, again.fidelity) == (result.text, result.spans, result.fidelity)


@given(st.text(max_size=60), st.sampled_from(UNITS))
def test_rate_1_is_the_text(text: str, unit: str) -> None:
    result = made(text, rate=1, unit=unit, markup=False)
    assert (result.text, result.rate, result.notes) == (text, 1, ())
    assert result.spans == (((0, len(text)),) if text else ())


@pytest.mark.parametrize("target", range(1, 80))
def test_every_target_is_met(target: int) -> None:
    result = made(LONG, target_tokens=target, protect=())
    assert result.after == result.target == target == words(result.text)


@pytest.mark.parametrize(("rate", "target"), [(0.29, 29), (0.005, 1), (0.5, 50), (0.999, 99)])
def test_a_rate_is_rounded_down_to_at_least_one(rate: float, target: int) -> None:
    assert made("x " * 100, rate=rate).after == target


def test_what_fits_comes_back_whole_and_says_so() -> None:
    result = made("  a b\n c \n", target_tokens=3, keep=("b",))
    assert result.text == "  a b\n c \n"
    assert result.notes == ("the text fits already: 3 tokens, 3 asked for",)
    assert (result.scores, result.protected) == (None, 1)
    short = made("one", rate=0.5)
    assert (short.text, short.notes) == ("one", ("the text fits already: 1 tokens, 1 asked for",))


def test_short_texts_are_compressed_too() -> None:
    assert made("a b c d", rate=0.5).after == 2


def test_the_best_scores_stay_and_ties_go_to_the_earlier() -> None:
    result = made("a b c d e", By(lambda p: np.array([0, 1, 1, 0, 1.0])), target_tokens=2)
    assert result.text == "b c"
    assert result.notes == ("2 of 5",)


def test_what_a_method_is_told() -> None:
    seen: list[Prompt] = []

    def look(prompt: Prompt) -> np.ndarray:
        seen.append(prompt)
        return np.zeros(len(prompt.units))

    made("a <keep>b</keep> c 4", By(look), rate=0.75, question="q", instruction="i", device="cpu")
    (prompt,) = seen
    assert (prompt.text, prompt.question, prompt.instruction, prompt.rate, prompt.device) == (
        "a b c 4",
        "q",
        "i",
        0.75,
        "cpu",
    )
    assert [unit.protected for unit in prompt.units] == [False, True, False, True]
    assert prompt.count("x y") == 2


def test_default_presets_by_unit() -> None:
    text = "No, 3 MB.\n```\ncode\n```\nplain words here"
    assert set(made(text, rate=0.9).protection) == {"numbers", "negation", "caps", "code"}
    assert set(made(text, rate=0.9, unit="line").protection) == {"code"}
    assert made(text, rate=0.9, protect=()).protection == {}


def test_fidelity_and_report() -> None:
    result = made("alpha 12 beta not NASA get_it 7", "truncate", target_tokens=4, protect=("caps",))
    assert result.text == "alpha 12 beta NASA"
    assert result.fidelity == {
        "extractive": True,
        "numbers_recall": 0.5,
        "identifiers_recall": 0.5,
        "negation_recall": 0.0,
    }
    data = json.loads(json.dumps(result.to_json()))
    assert data["tokens"] == {"before": 7, "after": 4, "target": 4, "saved": 3, "protected": 1, "counter": "words"}
    assert (data["text"], data["method"], data["options"], data["unit"]) == (
        result.text,
        "truncate",
        {"side": "head"},
        "word",
    )
    assert data["rate"] == 4 / 7
    assert data["units"] == {"before": 7, "after": 4}
    assert data["protection"] == {"caps": 1}
    assert 0 < data["score_seconds"] < data["seconds"]
    assert data["break_even_tokens_per_second"] == 3 / data["seconds"]


def test_json_is_warned_of() -> None:
    assert "the text is JSON" in made('{"a": 1, "b": [2, 3]}', rate=0.5, protect=()).notes[0]
    assert made("{ not json }", rate=0.5, protect=()).notes == ()


def test_elision_counts_against_the_budget() -> None:
    result = made("a b c d e f g h", "truncate:side=ends", target_tokens=5, elide="[{n} words]")
    assert result.text == "a b [5 words] h"
    assert result.pieces == ((0, 3), " [5 words]", (13, 15))
    assert "".join(p if isinstance(p, str) else result.original[slice(*p)] for p in result.pieces) == result.text


def test_an_inexact_result_says_so() -> None:
    result = made("aa bb\ncc dd\nee ff", target_tokens=3, unit="line")
    assert result.after == 2
    assert result.notes == ("2 tokens, 3 asked for: no choice of lines makes them exactly",)


def test_controls_have_as_many_tokens_and_protect_nothing() -> None:
    result = made(LONG, rate=0.5)
    found = controls(result, Counter(words))
    assert set(found) == {"truncate", "random"}
    assert [words(text) for text in found.values()] == [result.after] * 2
    assert found["truncate"] == " ".join(LONG.split()[: result.after])


# ---- several contexts


def test_contexts_are_joined_by_blank_lines() -> None:
    result = made(["a b", "", "c <keep>d</keep>"], By(), target_tokens=3)
    assert (result.original, result.text) == ("a b\n\n\n\nc d", "a b\n\n\n\nd")


def test_a_fence_that_one_context_leaves_open_ends_with_it() -> None:
    result = made(["```\nx y", "a b", "c"], By(), target_tokens=4)
    assert [unit.protected for unit in result.units] == [True, True, True, False, False, False]


def test_contexts_are_left_out_as_a_whole() -> None:
    contexts = ["w " * 150, " ", "x " * 149 + "end ", "y " * 150 + "<keep>z</keep>"]
    seen: list[str] = []

    def look(prompt: Prompt) -> np.ndarray:
        seen.append(prompt.text)
        return np.arange(len(prompt.units), dtype=float)

    result = made(contexts, By(look, lambda texts: np.array([0.0, 5.0, 1.0])), target_tokens=10, unit="word")
    # 100 tokens of slack: the best context is enough, and only it is scored
    assert seen == [contexts[2]]
    assert result.text.split() == ["x"] * 8 + ["end", "z"]
    assert result.before == 451
    assert result.notes[-1] == "2 of 4 contexts left out as a whole"
    assert np.isneginf(result.scores).sum() == 301  # type: ignore[arg-type]


def test_all_contexts_stay_where_they_fit() -> None:
    result = made(["a b", "c d"], By(contexts=lambda texts: np.array([1.0, 0.0])), target_tokens=2)
    assert result.notes == ("2 of 4",)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "say either a rate or a number of tokens"),
        ({"rate": 0.5, "target_tokens": 5}, "say either a rate or a number of tokens"),
        ({"rate": 0}, "the rate cannot be 0"),
        ({"rate": 1.01}, "the rate cannot be 1.01"),
        ({"rate": float("nan")}, "the rate cannot be nan"),
        ({"target_tokens": 0}, "cannot compress to 0 tokens"),
        ({"rate": 0.5, "unit": "letter"}, "no unit named `letter`"),
        ({"rate": 0.5, "protect": ("number",)}, "no preset to protect named `number`"),
        ({"rate": 0.5, "elide": ""}, "the mark for what is left out is empty"),
        ({"rate": 0.5, "keep": ("[",)}, "`[` is no regular expression"),
        ({"target_tokens": 2, "unit": "paragraph"}, "no paragraph fits into 2 tokens"),
        (
            {"target_tokens": 1, "protect": (), "elide": "a long mark"},
            "the elision mark alone has 3 tokens, 1 are asked for",
        ),
        (
            {"target_tokens": 10},
            "what is protected alone has 15 tokens, 10 are asked for (numbers 5, urls 5, negation 5)",
        ),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        made(LONG, **options)
    assert error.value.message.startswith(message)
    assert error.value.hint


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(UsageError, match="character 2 of the text is half a character"):
        made("a \ud800 b", rate=0.5)


@pytest.mark.parametrize("scores", [np.zeros(2), np.array([0, np.nan, 0, 0]), np.array([0, np.inf, 0, 0])])
def test_scores_that_are_none_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(TcwError, match="the method gave"):
        made("a b c d", By(lambda p: scores), rate=0.5)


@pytest.mark.parametrize(("kept", "tokens"), [([True, False, False, True], 2), ([True, True, False, False], 3)])
def test_a_broken_promise_is_never_given_out(kept: list[bool], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is protected is gone, or the count is not that of the text."""
    monkeypatch.setattr(engine, "fit", lambda *_: Fit(np.array(kept), tokens))
    with pytest.raises(TcwError, match="not what was chosen"):
        made("a b c d", rate=0.5, keep=("b",))


def test_methods_of_this_family_only() -> None:
    assert method_of("random") == method_of("prompt.random") == method_of("Prompt.Random")
    assert type(method_of("random")).__module__ == "tcw.prompt.random"
    for spec, message in (
        ("snapkv", "`snapkv` compresses the KV cache, not prompts"),
        ("fp8:scale=block", "`fp8` compresses weights, not prompts"),
    ):
        with pytest.raises(UsageError) as error:
            method_of(spec)
        assert error.value.message == message
        assert "truncate" in error.value.hint
    with pytest.raises(UnknownName, match="no prompt method named `trunkate`") as unknown:
        method_of("trunkate")
    assert "did you mean `truncate`?" in unknown.value.hint
    with pytest.raises(UnknownName, match="no option of `truncate` named `sid`"):
        method_of("truncate:sid=head")
