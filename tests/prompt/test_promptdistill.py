"""PromptDistill's scores against the logits that a model's own attention computes, and the cut inside a model."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.prompt import Prompt, Unit
from tcw.prompt.promptdistill import Promptdistill, asked, early, pooled
from tcw.prompt.scorer import Scorer, load_scorer
from tcw.prompt.units import cut
from tcw.tokens import Shape
from tcw.tokens.context import Context, Rows

TEXT = "The rain in Spain falls mainly on the plain."
SHAPE = Shape(blocks=0, layers=30, has_cls=False)


def prompt_of(text: str, unit: str = "word", **more: Any) -> Prompt:
    return Prompt(text, [Unit(*span) for span in cut(text, unit)], device="cpu", **more)


@pytest.fixture
def scorer(tiny_llama: Path) -> Scorer:
    return load_scorer(str(tiny_llama), "cpu")


def log_attention(scorer: Scorer, ids: list[int], layer: int) -> Tensor:
    """Log of the attention that the model says it pays, [H, S, S]: the logits, but for a constant in each row."""
    before = scorer.model.config._attn_implementation
    scorer.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return (
                scorer.model(input_ids=torch.tensor([ids]), output_attentions=True).attentions[layer][0].double().log()
            )
    finally:
        scorer.model.set_attn_implementation(before)


def slow_logits(scorer: Scorer, ids: list[int]) -> Tensor:
    """q · k of layer 0 by hand, token by token and head by head: float64 [H, S, S]."""
    model = scorer.model.model
    attention, config = model.layers[0].self_attn, scorer.model.config
    with torch.inference_mode():
        x = model.layers[0].input_layernorm(model.embed_tokens(torch.tensor(ids)))
        q, k = attention.q_proj(x).double(), attention.k_proj(x).double()
    d = config.hidden_size // config.num_attention_heads
    groups = config.num_attention_heads // config.num_key_value_heads
    base = config.rope_parameters["rope_theta"]

    def rotated(vector: Tensor, position: int) -> Tensor:
        out = vector.clone()
        for i in range(d // 2):
            angle = position / base ** (2 * i / d)
            a, b = vector[i], vector[i + d // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    found = torch.zeros(config.num_attention_heads, len(ids), len(ids), dtype=torch.float64)
    for h in range(len(found)):
        own = slice(h * d, h * d + d)
        shared = slice(h // groups * d, h // groups * d + d)
        queries = [rotated(q[i, own], i) for i in range(len(ids))]
        keys = [rotated(k[i, shared], i) for i in range(len(ids))]
        for i, query in enumerate(queries):
            for j, key in enumerate(keys):
                found[h, i, j] = query @ key / math.sqrt(d)
    return found


def slow_pool(values: list[float], kernel: int) -> list[float]:
    half = kernel // 2
    return [sum(values[j] for j in range(i - half, i + half + 1) if 0 <= j < len(values)) / kernel
            for i in range(len(values))]  # fmt: skip


def test_logits_are_those_of_the_models_attention(scorer: Scorer) -> None:
    ids = scorer.tokens(TEXT).ids.tolist()
    expected = log_attention(scorer, ids, 1)[:, -1]
    queries, keys, scaling = early(scorer, ids, 1)
    found = (queries[0, :, -1:].double() @ keys[0].double().mT * scaling)[:, 0]
    shift = expected - found
    assert float((shift - shift.mean(1, keepdim=True)).abs().max()) < 1e-3


@pytest.mark.parametrize("window", [1, 3, 1000])
def test_rows_that_ask(scorer: Scorer, window: int) -> None:
    ids = scorer.tokens(TEXT[:20]).ids.tolist()
    logits = slow_logits(scorer, ids).mean(0)
    rows = range(max(0, len(ids) - window), len(ids))
    expected = [np.mean([float(logits[i, j]) for i in rows if i >= j]) for j in range(len(ids))]
    np.testing.assert_allclose(asked(early(scorer, ids, 0), window).numpy(), expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(("word", "window"), [("max", 1), ("mean", 4)])
def test_scores_of_words(tiny_llama: Path, scorer: Scorer, word: str, window: int) -> None:
    question, instruction = "Where?", "Say."
    head, tail = scorer.tokenizer("Say.\n\n")["input_ids"], scorer.tokenizer("\n\nWhere?")["input_ids"]
    ids = scorer.tokenizer(TEXT)["input_ids"]
    logits = slow_logits(scorer, [*head, *ids, *tail]).mean(0)
    text = logits[-window:, len(head) : len(head) + len(ids)].mean(0).tolist()
    values = slow_pool(text, 3)
    pick = {"max": max, "mean": np.mean}[word]
    expected = [pick([values[i] for i in range(a, b)]) for a, b in cut(TEXT)]
    method = Promptdistill(model=str(tiny_llama), layer=0, window=window, pool=3, word=word)
    found = method.scores(prompt_of(TEXT, question=question, instruction=instruction))
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=1e-3)


def test_sinks_and_the_word_that_asks_stay(tiny_llama: Path) -> None:
    found = Promptdistill(model=str(tiny_llama), layer=0).scores(prompt_of(TEXT))
    order = np.argsort(-found, kind="stable")
    assert set(order[:3].tolist()) == {0, 1, len(found) - 1}, "four bytes are in the first two words"
    asked_for = Promptdistill(model=str(tiny_llama), layer=0).scores(prompt_of(TEXT, question="What?"))
    assert asked_for[-1] < asked_for[0] == asked_for[1], "a question asks by itself"


def test_no_layer_after_the_one_that_scores_runs(tiny_llama: Path, scorer: Scorer) -> None:
    ran: list[int] = []
    handles = [layer.register_forward_hook(lambda *args, n=n: ran.append(n))
               for n, layer in enumerate(scorer.model.model.layers)]  # fmt: skip
    try:
        early(scorer, scorer.tokens(TEXT).ids.tolist(), 1)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0]
    assert not any(layer._forward_pre_hooks for layer in scorer.model.model.layers)


def test_a_long_text_is_scored_in_parts(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_scorer(str(tiny_llama), "cpu")
    small = Scorer(loaded.model, loaded.tokenizer, "small", window=60)
    monkeypatch.setattr("tcw.prompt._lm.load_scorer", lambda *args: small)
    text = " ".join(f"w{i}" for i in range(50))
    method, whole = Promptdistill(layer=0), prompt_of(text, question="w7?", instruction="Look.")
    ends = np.linspace(0, len(text), -(-len(text) // (60 - 12)) + 1).astype(int)
    parts = [text[a:b] for a, b in itertools.pairwise(ends)]
    values = np.concatenate([
        Promptdistill(layer=0).scores(Prompt(part, [Unit(i, i + 1) for i in range(len(part))], question="w7?",
                                             instruction="Look.", device="cpu")) for part in parts
    ])  # fmt: skip
    solid = [list(range(a, b)) for a, b in cut(text)]
    np.testing.assert_allclose(method.scores(whole), [values[part].mean() for part in solid], atol=1e-4)
    with pytest.raises(UsageError, match="window"):
        method.scores(prompt_of(text, question="q" * 70))


@pytest.mark.parametrize("text", ["", "  ", "word"])
def test_next_to_nothing(tiny_llama: Path, text: str) -> None:
    for question in ("", "What?"):
        prompt = prompt_of(text, question=question)
        found = Promptdistill(model=str(tiny_llama), layer=0).scores(prompt)
        assert found.shape == (len(prompt.units),)
        assert np.isfinite(found).all()


def context(logits: Tensor, alive: list[int]) -> Context:
    n = logits.shape[-1]
    rows = Rows(logits.softmax(-1), logits)
    return Context(torch.zeros(n, 8), (1, 1, n), torch.zeros(n, 3), 50, torch.tensor(alive), torch.ones(n), rows=rows)


def test_the_plan_keeps_sinks_and_the_best_neighbourhoods() -> None:
    (stage,) = Promptdistill(keep=0.3).stages(SHAPE, {})
    assert (stage.at.of(30), stage.probe, stage.keep) == (16, -1, 0.3)
    logits = torch.randn(4, 1, 40, generator=torch.Generator().manual_seed(0))
    plan = stage.plan(context(logits, [0, 2, 3, *range(5, 42)]), 12)
    plan.check(40, 12)
    values = slow_pool(logits.double().mean((0, 1)).tolist(), 5)
    best = sorted(range(3, 40), key=lambda i: -values[i])[:9]  # original tokens 0, 2 and 3 are sinks
    assert plan.keep.tolist() == [0, 1, 2, *sorted(best)]


def test_the_plan_asks_with_the_last_rows_only() -> None:
    (stage,) = Promptdistill(window=2, pool=1).stages(SHAPE, {})
    logits = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(1))
    plan = stage.plan(context(logits, list(range(10, 30))), 6)
    expected = logits[:, -2:].double().mean((0, 1)).argsort(descending=True)[:6]
    assert plan.keep.tolist() == sorted(expected.tolist())


def test_pooling_counts_zeros_beyond_the_ends() -> None:
    values = torch.randn(9, generator=torch.Generator().manual_seed(2))
    np.testing.assert_allclose(pooled(values, 5).numpy(), slow_pool(values.double().tolist(), 5), atol=1e-6)


def test_the_layer() -> None:
    assert Promptdistill().index(30) == 15
    assert Promptdistill(layer=3).index(5) == 3
    for layer in (4, 9):
        with pytest.raises(UsageError, match="cannot score"):
            Promptdistill(layer=layer).index(5)
    with pytest.raises(UsageError, match="language model"):
        Promptdistill().stages(Shape(blocks=12, layers=0, has_cls=True), {})


@pytest.mark.parametrize("options", [{"keep": 0.0}, {"pool": 4}, {"window": 0}])
def test_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Promptdistill(**options)


def test_a_needle_that_is_asked_for_survives(smollm2: Path) -> None:
    """With a real model: the sentence that holds the answer is the best of twenty but for the first."""
    things = "clock vase chair lamp chest mirror statue bench basket table drum globe easel harp stool screen urn bell"
    hay = [f"The {thing} stood in the hall for years." for thing in [*things.split(" "), "rug"]]
    hay.insert(9, "The secret code of the safe is 48151.")
    prompt = prompt_of(" ".join(hay), "sentence", question="What is the secret code of the safe?")
    found = Promptdistill(model=str(smollm2)).scores(prompt)
    assert int(np.argmax(found[1:-1])) + 1 == 9


def test_the_same_tokens_go_on_inside_the_model(tiny_llama: Path) -> None:
    """What the token engine cuts at prefill is what the text method thinks least of."""
    from tcw.tokens.engine import TokenPolicy

    loaded = load_scorer(str(tiny_llama), "cpu")
    model, ids = loaded.model, loaded.tokens(TEXT).ids.tolist()
    policy = TokenPolicy.make([Promptdistill(layer=0, window=1, keep=0.3)], model)
    values = pooled(asked(early(loaded, ids, 0), 1)[:-1], 5)  # the last token asks and stays
    values[:4] = torch.inf
    with policy.attach(model) as attached, torch.inference_mode():
        out = model(input_ids=torch.tensor([ids]), use_cache=True)
        plan = attached.traces[0].plan
    assert plan is not None
    k = plan.kept
    assert k == round(0.3 * (len(ids) - 1))
    assert plan.keep.tolist() == sorted(torch.sort(values, stable=True, descending=True).indices[:k].tolist())
    assert [layer.get_seq_length() for layer in out.past_key_values.layers] == [len(ids), k + 1]
