"""ZipCache: saliency in plain loops, its probes, and what a cache under it holds."""

from dataclasses import replace

import pytest
import torch

from tcw.errors import UsageError
from tcw.kv import Memory
from tcw.kv.policy import Policy
from tcw.kv.zipcache import NormalizedAttention, probes
from tcw.methods import build

from .attention_calls import assert_padding_changes_nothing, attention, random_call, room_of, scored
from .conftest import text


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def mean_seen(weights: list, b: int, g: int, shared: int, rows: list[int], offset: int, j: int) -> float:
    """p̃_j: attention of the probes that can see j, summed over query heads, divided by how many those are."""
    able = [i for i in rows if offset + i >= j]
    total = sum(weights[b][g * shared + r][i][j] for r in range(shared) for i in able)
    return total / len(able) if able else 0.0


@pytest.mark.parametrize(("queries", "held"), [(12, 12), (12, 20), (40, 40)])
def test_saliency_of_a_prompt(queries: int, held: int) -> None:
    call = random_call(batch=2, shared=3, queries=queries, held=held)
    rows = probes(queries, 0).tolist()
    weights = attention(call)
    found = scored(NormalizedAttention(), call)
    for b in range(2):
        for g in range(2):
            expected = [mean_seen(weights, b, g, 3, rows, held - queries, j) for j in range(held)]
            torch.testing.assert_close(found[b, g], torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_saliency_when_generating() -> None:
    """All queries since the prompt are probes; the prompt's own are forgotten by then."""
    call = random_call(batch=1, shared=2, queries=30, held=30)
    weights, scorer, memory = attention(call), NormalizedAttention(), Memory()
    for start, end in [(0, 20), *((i, i + 1) for i in range(20, 30))]:
        memory.tokens = {k: torch.nn.functional.pad(v, (0, end - start)) for k, v in memory.tokens.items()}
        part = replace(
            call, queries=call.queries[:, :, start:end], keys=call.keys[:, :, :end], values=call.values[:, :, :end],
            positions=call.positions[:, start:end], seen=start,
        )  # fmt: skip
        scorer.observe(part, memory)
    found = scorer.score(part, memory, room_of(part))
    for g in range(2):
        expected = [mean_seen(weights, 0, g, 2, list(range(20, 30)), 0, j) for j in range(30)]
        torch.testing.assert_close(found[0, g], torch.tensor(expected), atol=1e-4, rtol=2e-2)
    assert memory.tokens["attention"].dtype == torch.bfloat16


def test_a_prompt_costs_no_memory() -> None:
    memory = Memory()
    NormalizedAttention().observe(random_call(), memory)
    assert not memory.tokens
    assert not memory.rows


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 100, 1000])
def test_probes(count: int) -> None:
    rows = probes(count, 7)
    recent = -(-count * 5 // 100)
    assert rows[-recent:].tolist() == list(range(count - recent, count))
    assert len(rows) == recent + -(-(count - recent) * 5 // 100)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(rows, probes(count, 7))
    if count == 1000:
        assert not torch.equal(rows, probes(count, 8))


def test_padding() -> None:
    """With one query in ten a probe, those drawn differ; make all of them see the same."""
    call = random_call(queries=1)
    scorer = NormalizedAttention()
    memory = Memory()
    scorer.observe(call, memory)
    assert torch.isfinite(scorer.score(call, memory, room_of(call))).all()
    same = random_call(queries=20)
    first = same.queries[:, :, :1]
    assert_padding_changes_nothing(_LastRows(), replace(same, queries=first.expand_as(same.queries).contiguous()))


class _LastRows(NormalizedAttention):
    """Saliency by the last query alone, which is the same with padding and without."""

    def score(self, call, memory, room):
        from tcw.kv._attention_stats import attended, newest, seen_by

        return attended(call, newest(call, 1)) / seen_by(call, newest(call, 1)).clamp_min(1)


@pytest.mark.parametrize("options", ["interval=20", "salient=0.3,high=8,interval=20", "interval=5,group_size=4"])
def test_a_cache_holds_what_the_plan_says(llama, options: str) -> None:
    policy = Policy.make([f"zipcache:{options}"], llama)
    cache = policy.new_cache(llama)
    llama(text(100), past_key_values=cache)
    assert cache.nbytes() == policy.plan(context=100, dtype=torch.float32).bytes
    for step in range(30):
        llama(text(1, seed=step), past_key_values=cache)
    group = cache.layers[1].groups[0]
    assert len(group) == cache.get_seq_length() == 130
    assert len(group.store.high) > 0
    assert len(group.store.low) > 0


def test_salient_tokens_are_in_the_high_tier(llama) -> None:
    policy = Policy.make(["zipcache:high=8,low=1,group_size=8"], llama)
    cache, exact = policy.new_cache(llama), policy.everything().new_cache(llama)
    for held in (cache, exact):
        llama(text(120), past_key_values=held)
    group, whole = cache.layers[0].groups[0], exact.layers[0].groups[0]
    values, highs = whole.read()[1], len(group.store.high)
    distance = torch.cdist(group.store.read()[1][:, :, :highs], values[:, :, : 120 - 32]).amin(-1)
    assert (distance < 0.05 * values.norm(dim=-1).mean()).all()


def test_with_eviction(llama) -> None:
    policy = Policy.make(["snapkv:ratio=0.5", "zipcache:group_size=8,interval=16"], llama)
    cache = policy.new_cache(llama)
    llama(text(100), past_key_values=cache)
    assert cache.nbytes() == policy.plan(context=100, dtype=torch.float32).bytes
    for step in range(40):
        llama(text(1, seed=step), past_key_values=cache)
    assert len(cache.layers[0].groups[0]) < 110


def test_wide_codes_say_nearly_the_same(llama) -> None:
    tokens = text(96)
    exact = llama(tokens).logits[:, 64:]
    cache = Policy.make(["zipcache:high=8,low=8,window=8"], llama).new_cache(llama)
    llama(tokens[:, :64], past_key_values=cache)
    found = llama(tokens[:, 64:], past_key_values=cache).logits
    assert (found - exact).abs().mean() < 0.1 * exact.std()


def test_options() -> None:
    for wrong in ({"salient": 1.5}, {"low": 8}, {"group_size": 0}, {"interval": 0}, {"window": -1}, {"high": 5}):
        with pytest.raises(UsageError):
            build("zipcache", wrong)
