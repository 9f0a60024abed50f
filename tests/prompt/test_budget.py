"""The budget is met exactly wherever any choice meets it, and never passed; counted on the real output."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcw.data import evaluation_text
from tcw.prompt.budget import Counter, Fit, _make_up, fit, ranking
from tcw.prompt.units import UNITS, Layout, cut


def words(text: str) -> int:
    return len(text.split())


def pairs(text: str) -> int:
    """Tokens that are not additive: a run of equal letters is one token, across joins too; so is a space."""
    return len(re.findall(r"\s+|(\S)\1*", text))


def choose(text: str, target: int, counter: Any = words, unit: str = "word", seed: int = 0) -> tuple[Fit, str]:
    layout = Layout(text, cut(text, unit))
    order = ranking(np.random.default_rng(seed).random(len(layout)))
    found = fit(layout, order, np.zeros(len(layout), bool), target, Counter(counter))
    return found, layout.join(np.flatnonzero(found.kept).tolist())


@given(st.integers(1, 60), st.data())
def test_words_are_counted_out_exactly_and_the_best_stay(n: int, data: st.DataObject) -> None:
    target, seed = data.draw(st.integers(1, n)), data.draw(st.integers(0, 9))
    text = " ".join(f"w{i}" for i in range(n))
    found, left = choose(text, target, seed=seed)
    assert words(left) == found.tokens == target
    # every word is one token, so nothing but the best may be chosen
    best = np.argsort(-np.random.default_rng(seed).random(n), kind="stable")[:target]
    assert set(np.flatnonzero(found.kept)) == set(best.tolist())


@given(st.text(st.sampled_from("aab \n"), min_size=1, max_size=40), st.data())
def test_tokens_that_merge_across_joins(text: str, data: st.DataObject) -> None:
    whole = pairs(text)
    target = data.draw(st.integers(1, max(1, whole)))
    found, left = choose(text, target, pairs)
    assert pairs(left) == found.tokens <= target


@pytest.mark.parametrize("seed", range(30))
def test_as_good_as_trying_all_choices(seed: int) -> None:
    """Of a dozen units of 1 to 6 words: if a choice has the tokens asked for, one is found; else the nearest below."""
    random = np.random.default_rng(seed)
    text = "\n\n".join(" ".join("w" * size) for size in random.integers(1, 7, 12).tolist())
    sizes = [words(text[a:b]) for a, b in cut(text, "paragraph")]
    for target in range(1, sum(sizes)):
        possible = {sum(c) for k in range(13) for c in itertools.combinations(sizes, k) if sum(c) <= target}
        assert choose(text, target, unit="paragraph", seed=seed)[0].tokens == max(possible)


def test_what_no_choice_can_meet_stays_below() -> None:
    assert choose("aa bb\ncc dd\nee ff", 3, unit="line")[0].tokens == 2
    assert choose("aa bb\ncc dd\nee ff", 1, unit="line")[0].tokens == 0


def test_protected_units_always_stay() -> None:
    text = " ".join(f"w{i}" for i in range(50))
    layout = Layout(text, cut(text))
    stays = np.zeros(50, bool)
    stays[[3, 40, 41]] = True
    order = ranking(-np.arange(50.0))
    for target in range(3, 50):
        found = fit(layout, order[~stays[order]], stays, target, Counter(words))
        assert found.kept[stays].all()
        assert found.tokens == target
        assert np.flatnonzero(found.kept & ~stays).tolist() == [i for i in range(50) if not stays[i]][: target - 3]


def test_ranking_is_stable() -> None:
    assert ranking(np.array([1.0, 2.0, 1.0, 2.0])).tolist() == [1, 3, 0, 2]


@given(
    st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 5)), min_size=1, max_size=7),
    st.integers(-6, 6).filter(bool),
)  # fmt: skip
def test_make_up_is_the_cheapest_sum(items: list[tuple[int, int]], rest: int) -> None:
    changes, costs = np.array([c for c, _ in items]), np.array([c for _, c in items])
    flips = _make_up(changes, costs, rest)
    subsets = [s for k in range(len(items) + 1) for s in itertools.combinations(range(len(items)), k)]
    sums = {s: sum(items[i][0] for i in s) for s in subsets}
    low, high = min(0, rest), max(0, rest)
    allowed = [s for s in subsets if (sums[s] == rest if rest < 0 else low <= sums[s] <= high)]
    if not allowed:
        assert not len(flips)
        return
    best = max(sums[s] for s in allowed)
    assert changes[flips].sum() == best
    assert costs[flips].sum() == min(sum(items[i][1] for i in s) for s in allowed if sums[s] == best)


def test_counter_reads_any_tokenizer() -> None:
    slow = SimpleNamespace(encode=lambda text, add_special_tokens: text.split(), name_or_path="slow")
    assert [Counter(slow)("a b"), Counter(words)("a b")] == [2, 2]
    assert (Counter(slow).name, Counter(words).name, Counter(words, "mine").name) == ("slow", "words", "mine")
    assert Counter(slow).many(["a", "a b", ""]) == [1, 2, 0]


def test_truncation_and_padding_of_a_tokenizer_do_not_count(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = "a"
    counter = Counter(tokenizer)
    assert counter("x" * 50) == 50
    tokenizer(["x" * 50, "y"], truncation=True, max_length=8, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation is not None
    assert (counter("x" * 50), counter.many(["x" * 50, "y"])) == (50, [50, 1])
    assert tokenizer.backend_tokenizer.truncation is not None


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Any:
    from tcw.runtime.load import tokenizer
    from tcw.source import open_source

    return tokenizer(open_source(smollm2))


@pytest.mark.parametrize("target", [50, 333, 1000, 2500, 4000])
def test_a_real_tokenizer_on_five_thousand_tokens(real: Any, target: int) -> None:
    text = evaluation_text()[3000:25000]
    assert 4500 < len(real(text, add_special_tokens=False).input_ids) < 5500
    found, left = choose(text, target, real)
    assert len(real(left, add_special_tokens=False).input_ids) == found.tokens == target


@pytest.mark.parametrize("unit", UNITS)
def test_a_real_tokenizer_by_any_unit_and_script(real: Any, unit: str) -> None:
    mixed = "第3章5节讲GPT模型。他说“你好”（OK）コンピュータは今日も元気です。\n\n" * 10 + evaluation_text()[5000:9000]
    whole = len(real(mixed, add_special_tokens=False).input_ids)
    for rate in (0.2, 0.5, 0.8):
        target = int(rate * whole)
        found, left = choose(mixed, target, real, unit, seed=1)
        assert len(real(left, add_special_tokens=False).input_ids) == found.tokens <= target
        assert found.tokens == target or unit in ("line", "paragraph")
