import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tcw import data
from tcw.verify.kv_tasks import (
    CUE,
    DEPTHS,
    KINDS,
    NEXT,
    PLACEMENTS,
    SPAN,
    Noise,
    Prose,
    Scores,
    Script,
    Task,
    cache_bytes,
    decode_rate,
    full_cache,
    least_length,
    longest_follow,
    make_tasks,
    run_task,
    summarise,
)

LENGTH = 320


@pytest.fixture(scope="session")
def words(tiny_llama: Path) -> Prose:
    return Prose(AutoTokenizer.from_pretrained(tiny_llama))


@pytest.fixture(scope="session")
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def spell(tiny_llama: Path) -> Callable[[Tensor], str]:
    """Tokens as text; the tiny model's are bytes."""
    return AutoTokenizer.from_pretrained(tiny_llama).decode


def of_kind(tasks: list[Task], kind: str) -> list[Task]:
    return [task for task in tasks if task.kind == kind]


@pytest.mark.parametrize("script", [pytest.param("words", id="prose"), pytest.param("noise", id="noise")])
def test_tasks_are_the_same_every_time(script: str, words: Prose) -> None:
    def make(seed: int) -> list[Task]:
        return make_tasks(words if script == "words" else Noise(256), LENGTH, seed=seed)

    first, again, other = make(0), make(0), make(1)
    for a, b in zip(first, again, strict=True):
        assert (a.kind, a.label, a.first, a.depth) == (b.kind, b.label, b.first, b.depth)
        assert torch.equal(a.context, b.context)
        assert torch.equal(a.follow, b.follow)
    assert not any(torch.equal(a.context, b.context) for a, b in zip(first, other, strict=True) if a.kind == "passkey")
    assert {task.kind for task in first} == set(KINDS)
    assert all(len(task.context) == LENGTH and 1 <= task.first < len(task.follow) for task in first)
    assert max(len(task.follow) for task in first) <= longest_follow(words if script == "words" else Noise(256))
    assert len({task.label for task in first}) == len(first)


def test_the_key_lies_in_the_context_where_it_says(words: Prose, spell: Callable[[Tensor], str]) -> None:
    tasks = of_kind(make_tasks(words, LENGTH), "passkey")
    assert len(tasks) == PLACEMENTS >= 20
    for task in tasks:
        number = re.findall(r"\d+", task.label)[0]
        text = spell(task.context)
        assert text.count(f"The pass key is {number}. Remember it. {number} is the pass key.") == 1
        assert spell(task.targets) == number
        assert spell(task.follow) == f"\n\nWhat is the pass key? The pass key is {number}"
        before, after = text.split("\n\nThe pass key is", 1)
        rest = len(before) + len(after.split("is the pass key.\n\n", 1)[1])
        assert task.depth is not None
        assert abs(len(before) - task.depth * rest) <= 1
        hay = before + after.split("is the pass key.\n\n", 1)[1]
        assert hay in data.evaluation_text(), "the rest is one piece of the text"
    depths = [task.depth for task in tasks if task.depth is not None]
    assert (min(depths), max(depths)) == DEPTHS
    assert len(set(depths)) == len({spell(t.context)[:20] for t in tasks}) == PLACEMENTS
    assert depths == sorted(depths)
    order = [data.evaluation_text().find(spell(t.context)[:8]) for t in tasks]
    assert order != sorted(order), "depth and place in the text are not the same thing"


def test_a_passage_to_copy_lies_in_the_context(words: Prose, spell: Callable[[Tensor], str]) -> None:
    for task in of_kind(make_tasks(words, LENGTH, copies=3), "copy"):
        follow = spell(task.follow)
        assert follow.startswith("\n\n")
        assert task.first == 2 + CUE
        assert len(task.targets) == SPAN
        assert spell(task.context).find(follow[2:]) == round((task.depth or 0) * (LENGTH - CUE - SPAN))


def test_the_text_goes_on(words: Prose, spell: Callable[[Tensor], str]) -> None:
    for task in of_kind(make_tasks(words, LENGTH), "next"):
        assert len(task.targets) == NEXT
        assert spell(task.context) + spell(task.follow) in data.evaluation_text()


def test_a_start_of_text_comes_first(words: Prose) -> None:
    words = Prose(words._tokenizer)
    words.start = [999]  # a token that no text has
    tasks = make_tasks(words, LENGTH)
    assert all(len(t.context) == LENGTH and (t.context == 999).nonzero().tolist() == [[0]] for t in tasks)
    assert not any((t.follow == 999).any() for t in tasks)
    for task in of_kind(tasks, "copy"):
        cue = task.follow[2:]
        at = 1 + round((task.depth or 0) * (LENGTH - 1 - CUE - SPAN))
        assert torch.equal(task.context[at : at + len(cue)], cue)


def test_a_key_among_noise() -> None:
    for task in of_kind(make_tasks(Noise(97), LENGTH), "passkey"):
        wanted, text = task.follow.tolist(), task.context.tolist()
        places = [i for i in range(LENGTH) if text[i : i + len(wanted)] == wanted]
        assert len(places) == 2
        assert len(task.targets) == 5


def test_scores_equal_a_slow_loop(words: Prose, model: Any) -> None:
    tasks = make_tasks(words, 200, placements=2, copies=1, continuations=1)
    for task in tasks:
        found = run_task(model, task, lambda: full_cache(model))
        losses, right = [], []
        for i in range(task.first, len(task.follow)):
            ids = torch.cat([task.context, task.follow[:i]])
            with torch.no_grad():
                row = model(ids[None], use_cache=False).logits[0, -1].double()
            losses.append(-float(row.log_softmax(0)[task.follow[i]]))
            right.append(int(row.argmax()) == int(task.follow[i]))
        assert found.nll == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert found.token_accuracy == pytest.approx(sum(right) / len(right))
        assert found.exact == all(right)
        config = model.config
        a_token = 2 * config.num_key_value_heads * config.head_dim * 4
        assert found.cache_bytes == config.num_hidden_layers * 200 * a_token


class Copier:
    """Continues with whatever once followed the last `match` tokens; its cache is the tokens themselves."""

    device = torch.device("cpu")

    def __init__(self, match: int) -> None:
        self.match = match

    def forward(self, input_ids: Tensor, past_key_values: list[int], use_cache: bool) -> SimpleNamespace:
        rows = torch.zeros(1, input_ids.shape[1], 256)
        for i, token in enumerate(input_ids[0].tolist()):
            past_key_values.append(token)
            tail = past_key_values[-self.match :]
            for j in range(len(past_key_values) - self.match):
                if past_key_values[j : j + self.match] == tail:
                    rows[0, i, past_key_values[j + self.match]] = 20.0
        return SimpleNamespace(logits=rows)

    __call__ = forward


class Forgetful(list[int]):
    """A cache that forgets the context once it has it."""

    def nbytes(self) -> int:
        self.clear()
        return 0


@pytest.mark.parametrize("noise", [False, True])
def test_who_forgets_the_context_is_found_out(words: Prose, noise: bool) -> None:
    script: Script = Noise(256) if noise else words
    tasks = make_tasks(script, 200, placements=5, copies=3, continuations=0)

    copier = Copier(8 if noise else 12)

    class Remembering(list[int]):
        nbytes = list.__len__

    good = summarise(run_task(copier, t, Remembering) for t in tasks)
    bad = summarise(run_task(copier, t, Forgetful) for t in tasks)
    assert good["passkey"]["exact"] == good["copy"]["exact"] == 1
    assert good["passkey"]["nll"] < 0.01
    assert bad["passkey"]["exact"] == bad["copy"]["exact"] == 0
    assert bad["passkey"]["nll"] > 1
    assert bad["copy"]["token_accuracy"] < 0.3


def test_no_room_is_said(words: Prose) -> None:
    least = least_length(words)
    make_tasks(words, least, placements=1, copies=1, continuations=1)
    with pytest.raises(ValueError, match="no room"):
        make_tasks(words, least - 1)
    with pytest.raises(ValueError, match="no room"):
        make_tasks(Prose(words._tokenizer, "too short a text"), LENGTH)


def test_a_tokenizer_of_another_model_does_not_fit(words: Prose) -> None:
    assert words.fits(256)
    assert not words.fits(100)
    assert Prose(words._tokenizer, "").fits(256)


def test_means_by_kind() -> None:
    found = summarise([Scores("copy", 1.0, True, 1.0, 9), Scores("copy", 2.0, False, 0.5, 9)])
    assert found == {"copy": {"nll": 1.5, "exact": 0.5, "token_accuracy": 0.75, "count": 2}}


def test_bytes_and_speed(words: Prose, model: Any) -> None:
    context = words.words[:50]
    cache = full_cache(model)
    with torch.no_grad():
        model(context[None], past_key_values=cache)
    assert cache_bytes(cache) == sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert decode_rate(model, context, lambda: full_cache(model), count=4) > 0


@pytest.mark.slow
def test_a_real_model_finds_keys_that_knorm_loses(smollm2: Path) -> None:
    from tcw.kv.policy import Policy

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    prose = Prose(AutoTokenizer.from_pretrained(smollm2))
    tasks = make_tasks(prose, placements=3, copies=1, continuations=1)
    full = summarise(run_task(model, task, lambda: full_cache(model)) for task in tasks)
    policy = Policy.make("knorm:ratio=0.25", model)
    lossy = summarise(run_task(model, task, lambda: policy.new_cache(model)) for task in tasks)
    assert full["passkey"]["exact"] == 1
    assert full["passkey"]["nll"] < 0.2
    assert full["copy"]["token_accuracy"] > 0.8
    assert lossy["passkey"]["nll"] > 1
    assert lossy["next"]["nll"] < full["next"]["nll"] + 0.5, "prose hardly notices"
