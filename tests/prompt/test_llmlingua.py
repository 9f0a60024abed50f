"""LLMLingua against a slow version of itself, and the defects that its first implementation is known for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcw.errors import UsageError
from tcw.prompt import Prompt, Unit
from tcw.prompt._contexts import fill
from tcw.prompt.engine import Settings, compress
from tcw.prompt.llmlingua import Llmlingua
from tcw.prompt.scorer import Scorer, load_scorer
from tcw.prompt.units import cut

TEXT = "The rain in Spain falls\nmainly on the plain, they say; and so on.\nZebras do not mind it."


def prompt_of(text: str, unit: str = "word", **more: Any) -> Prompt:
    return Prompt(text, [Unit(*span) for span in cut(text, unit)], device="cpu", **more)


def words(count: int, seed: int = 0) -> str:
    draw = np.random.default_rng(seed)
    return " ".join("".join(draw.choice(list("abcdefgh"), draw.integers(2, 6))) for _ in range(count))


def nll(scorer: Scorer, before: list[int], ids: list[int]) -> list[float]:
    """-log p of each of `ids` after `before`, in float64."""
    with torch.inference_mode():
        logits = scorer.model(input_ids=torch.tensor([[*before, *ids]])).logits[0].double().log_softmax(-1)
    found = [float(-logits[len(before) + i - 1, token]) if before or i else np.nan for i, token in enumerate(ids)]
    return np.where(np.isnan(found), np.nanmean(found), found).tolist()


def byte_ids(scorer: Scorer, text: str) -> list[int]:
    return list(scorer.tokenizer(text)["input_ids"])


def means(values: list[float], text: str, spans: list[tuple[int, int]]) -> np.ndarray:
    """Mean over the characters of each unit that are no white space: every character is a token here."""
    return np.array([np.mean([values[i] for i in range(a, b)]) for a, b in spans])


@pytest.mark.parametrize("contrast", [False, True])
def test_onepass(tiny_llama: Path, contrast: bool) -> None:
    scorer = load_scorer(str(tiny_llama), "cpu")
    prompt = prompt_of(TEXT, question="What of zebras?", instruction="Answer.")
    ids, plain = byte_ids(scorer, TEXT), byte_ids(scorer, "Answer.\n\n")
    values = np.array(nll(scorer, plain, ids))
    if contrast:
        values -= nll(scorer, [*plain, *byte_ids(scorer, "What of zebras?\n\n")], ids)
    expected = means(values.tolist(), TEXT, cut(TEXT))
    found = Llmlingua(model=str(tiny_llama), contrast=contrast).scores(prompt)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def slow_iterative(
    scorer: Scorer, text: str, heads: list[str], segment: int, rate: float, window: int = 512
) -> np.ndarray:
    """Segments of whole words, each scored after what was left of those before it; every character is a token."""
    spans, found = cut(text), []
    prefixes = [byte_ids(scorer, head) for head in heads]
    at = 0
    while at < len(spans):
        end = at + 1
        while end < len(spans) and spans[end - 1][1] - spans[at][0] < segment:
            end += 1
        group, at = spans[at:end], end
        ids = byte_ids(scorer, text[group[0][0] : group[-1][1]])
        for prefix in prefixes:
            if len(prefix) + len(ids) > window:  # ten sinks, and half a window in all
                del prefix[10 : len(prefix) - (window // 2 - 10)]
        values = np.array(nll(scorer, prefixes[0], ids))
        if len(heads) > 1:
            values -= nll(scorer, prefixes[1], ids)
        score = means(values.tolist(), text, [(a - group[0][0], b - group[0][0]) for a, b in group])
        room, kept = rate * len(ids), set()
        for i in sorted(range(len(group)), key=lambda i: -score[i]):
            if group[i][1] - group[i][0] <= room:
                kept.add(i)
                room -= group[i][1] - group[i][0]
        rank = {i: place / len(group) for place, i in enumerate(sorted(range(len(group)), key=lambda i: score[i]))}
        found += [rank[i] + (i in kept) for i in range(len(group))]
        for prefix in prefixes:
            for i in sorted(kept):
                prefix += byte_ids(scorer, text[slice(*group[i])])
    return np.array(found)


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_iterative_scores_what_follows_what_is_left(tiny_llama: Path, rate: float, contrast: bool) -> None:
    scorer, text = load_scorer(str(tiny_llama), "cpu"), words(60)
    prompt = prompt_of(text, rate=rate, question="Who?", instruction="Do.")
    heads = ["Do.\n\n", "Do.\n\nWho?\n\n"] if contrast else ["Do.\n\n"]
    method = Llmlingua(model=str(tiny_llama), mode="iterative", segment=50, contrast=contrast)
    np.testing.assert_allclose(method.scores(prompt), slow_iterative(scorer, text, heads, 50, rate), atol=1e-9)


def test_iterative_differs_from_onepass(tiny_llama: Path) -> None:
    prompt = prompt_of(words(60), rate=0.3)
    one = Llmlingua(model=str(tiny_llama)).scores(prompt)
    other = Llmlingua(model=str(tiny_llama), mode="iterative", segment=50).scores(prompt)
    assert (np.argsort(one) != np.argsort(other)).any()


def test_a_text_shorter_than_a_segment_is_compressed(tiny_llama: Path) -> None:
    scorer = load_scorer(str(tiny_llama), "cpu")
    for mode in ("onepass", "iterative"):
        result = compress(
            TEXT, Llmlingua(model=str(tiny_llama), mode=mode), rate=0.5, tokenizer=scorer.tokenizer,
            settings=Settings(protect=(), device="cpu"),
        )  # fmt: skip
        assert result.before < 200
        assert result.after == result.target < result.before


@pytest.mark.parametrize("count", [20, 250])
def test_iterative_keeps_the_rate_of_short_and_long_texts(tiny_llama: Path, count: int) -> None:
    """Also where the text outgrows the window many times."""
    text = words(count)
    found = Llmlingua(model=str(tiny_llama), mode="iterative", segment=40).scores(prompt_of(text, rate=0.4))
    sizes = np.array([b - a for a, b in cut(text)])
    assert sizes[found >= 1].sum() / sizes.sum() == pytest.approx(0.4, abs=0.08)


def test_iterative_beyond_the_window(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_scorer(str(tiny_llama), "cpu")
    small = Scorer(loaded.model, loaded.tokenizer, "small", window=100)
    monkeypatch.setattr("tcw.prompt._lm.load_scorer", lambda *args: small)
    text = words(120)
    found = Llmlingua(mode="iterative", segment=30).scores(prompt_of(text, rate=0.5))
    expected = slow_iterative(loaded, text, [""], 30, 0.5, window=100)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert (found != slow_iterative(loaded, text, [""], 30, 0.5)).any()


def test_protected_words_are_read_by_later_segments(tiny_llama: Path) -> None:
    scorer, text = load_scorer(str(tiny_llama), "cpu"), words(40)
    spans = cut(text)
    units = [Unit(*span, i < 12) for i, span in enumerate(spans)]
    cutoff = spans[11][1]
    prompt = Prompt(text, units, rate=0.01, device="cpu")
    found = Llmlingua(model=str(tiny_llama), mode="iterative", segment=cutoff).scores(prompt)
    # nothing but the protected words is left of the first segment; the second is scored after exactly those
    end = next(i for i in range(12, len(spans)) if i == len(spans) - 1 or spans[i][1] - cutoff >= cutoff) + 1
    values = nll(scorer, byte_ids(scorer, text[:cutoff]), byte_ids(scorer, text[cutoff : spans[end - 1][1]]))
    score = means(values, text, [(a - cutoff, b - cutoff) for a, b in spans[12:end]])
    assert (found[:12] >= 1).all()
    assert np.argsort(found[12:end] % 1).tolist() == np.argsort(score).tolist()


def test_no_word_is_broken_and_lines_are_like_any_other(tiny_llama: Path) -> None:
    scorer = load_scorer(str(tiny_llama), "cpu")
    text = "\n".join(words(8, seed) for seed in range(10))
    result = compress(
        text, Llmlingua(model=str(tiny_llama)), rate=0.4, tokenizer=scorer.tokenizer,
        settings=Settings(protect=(), device="cpu"),
    )  # fmt: skip
    assert set(result.text.split()) <= set(text.split())
    assert "\n" in result.text


def test_contrast_needs_a_question(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="needs a question"):
        Llmlingua(model=str(tiny_llama), contrast=True).scores(prompt_of(TEXT))


@pytest.mark.parametrize("text", ["", "   \n", "word"])
def test_next_to_nothing(tiny_llama: Path, text: str) -> None:
    prompt = prompt_of(text, rate=0.5)
    for mode in ("onepass", "iterative"):
        found = Llmlingua(model=str(tiny_llama), mode=mode).scores(prompt)
        assert found.shape == (len(prompt.units),)
        assert np.isfinite(found).all()


def test_contexts_by_surprise_and_by_the_question(tiny_llama: Path) -> None:
    scorer, contexts = load_scorer(str(tiny_llama), "cpu"), [words(9, 1), TEXT, words(5, 2)]
    prompt = prompt_of("", question="What of zebras?")
    found = Llmlingua(model=str(tiny_llama)).context_scores(contexts, prompt)
    expected = [np.mean(nll(scorer, [], byte_ids(scorer, text))) for text in contexts]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    found = Llmlingua(model=str(tiny_llama), rank="question").context_scores(contexts, prompt)
    asked = byte_ids(scorer, "What of zebras? The documents above answer this question.")
    expected = [-np.mean(nll(scorer, byte_ids(scorer, f"{text}\n\n"), asked)) for text in contexts]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    with pytest.raises(UsageError, match="question"):
        Llmlingua(model=str(tiny_llama), rank="question").context_scores(contexts, prompt_of(""))


def test_contexts_are_taken_until_the_budget_is_passed() -> None:
    scores, sizes = np.array([1.0, 3.0, 2.0, 3.0]), [50, 60, 70, 80]
    assert fill(scores, sizes, 10, slack=0) == [1], "the best, even if too long"
    assert fill(scores, sizes, 60, slack=0) == [1, 3], "60 is not more than 60; equal scores: the earlier"
    assert fill(scores, sizes, 60, slack=90) == [1, 2, 3]
    assert fill(scores, sizes, 10_000) == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", ["onepass", "iterative"])
def test_recent_text_goes_first(tiny_llama: Path, mode: str) -> None:
    text = words(60)
    plain = Llmlingua(model=str(tiny_llama), mode=mode).scores(prompt_of(text, rate=0.5))
    found = Llmlingua(model=str(tiny_llama), mode=mode, recent=0.4).scores(prompt_of(text, rate=0.5))
    room, expected = 0.4 * 0.5 * len(text), set()  # every character is a token
    for i in reversed(range(60)):
        if len(text) - cut(text)[i][0] <= room:
            expected.add(i)
    order = np.argsort(-found, kind="stable").tolist()
    assert set(order[: len(expected)]) == expected
    rest = [i for i in np.argsort(-plain, kind="stable").tolist() if i not in expected]
    assert order[len(expected) :] == rest


def test_options() -> None:
    with pytest.raises(ValueError, match="recent"):
        Llmlingua(recent=1.5)
    with pytest.raises(ValueError, match="segment"):
        Llmlingua(segment=0)


def test_a_planted_sentence_survives(smollm2: Path) -> None:
    """With a real model: of sentences that say the same thing, the one that says another is the surprise."""
    same = "The cat sat on the mat. "
    text = same * 8 + "Uranium melts at 1132 degrees. " + same * 8
    found = Llmlingua(model=str(smollm2)).scores(prompt_of(text, "sentence"))
    assert int(np.argmax(found[1:])) + 1 == 8
