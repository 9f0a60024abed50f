import math

import pytest
import torch

from tcw.kv.stores import DenseStore, Store, pick
from tcw.kv.stores.compensated import Compensated


def drawn(batch=2, heads=3, tokens=11, dim=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, dim)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(2))


def paper(query, kept_keys, kept_values, gone_keys, gone_values):
    """The paper's formula with Python floats, for one query and head."""
    n, dim = len(gone_keys), len(query)

    def dot(a, b):
        return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))

    mean_key = [sum(float(k[e]) for k in gone_keys) / n for e in range(dim)]
    mean_value = [sum(float(v[e]) for v in gone_values) / n for e in range(dim)]
    weights = [math.exp(dot(query, k)) for k in kept_keys]
    slot = n * math.exp(dot(query, mean_key))
    top = [
        slot * mean_value[e] + sum(w * float(v[e]) for w, v in zip(weights, kept_values, strict=True))
        for e in range(dim)
    ]
    return [t / (slot + sum(weights)) for t in top]


def attended(query, keys, values, store):
    """Attention over kept tokens and the slot, as the engine does it."""
    slot_keys, slot_values, bias = store.folded()
    logits = torch.cat([keys @ query[..., None], slot_keys @ query[..., None] + bias[..., None]], 2).squeeze(-1)
    return (logits.softmax(-1)[..., None] * torch.cat([values, slot_values], 2)).sum(2)


@pytest.mark.parametrize("parts", [(7,), (3, 4), (1, 1, 5), (6, 1)])
def test_attention_is_the_papers_formula(parts):
    keys, values = drawn(tokens=11)
    store = Compensated(DenseStore())
    at = 0
    for part in parts:
        store.fold(keys[:, :, at : at + part], values[:, :, at : at + part], None)
        at += part
    query = torch.randn(2, 3, 8)
    found = attended(query, keys[:, :, 7:], values[:, :, 7:], store)
    for row in range(2):
        for head in range(3):
            k, v = keys[row, head].double(), values[row, head].double()
            expected = paper(query[row, head], k[7:], v[7:], k[:7], v[:7])
            torch.testing.assert_close(
                found[row, head].double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0
            )


def test_copies_of_one_token_are_attended_exactly():
    """Where all that was forgotten was the same, nothing is lost."""
    keys, values = drawn(tokens=1)
    store = Compensated(DenseStore())
    store.fold(keys.expand(-1, -1, 5, -1), values.expand(-1, -1, 5, -1), None)
    kept, kept_values = drawn(tokens=4, seed=1)
    query = torch.randn(2, 3, 8)
    every = torch.cat([keys.expand(-1, -1, 5, -1), kept], 2) @ query[..., None]
    expected = (every.softmax(2) * torch.cat([values.expand(-1, -1, 5, -1), kept_values], 2)).sum(2)
    torch.testing.assert_close(attended(query, kept, kept_values, store), expected, atol=1e-5, rtol=1e-5)


def test_padding_is_not_folded():
    keys, values = drawn(tokens=6)
    real = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    real[0, 0], real[0, 1] = False, True
    store = Compensated(DenseStore())
    store.fold(keys[:, :, :4], values[:, :, :4], real[:, :, :4])
    store.fold(keys[:, :, 4:], values[:, :, 4:], real[:, :, 4:])
    found_keys, found_values, bias = store.folded()
    for row in range(2):
        for head in range(3):
            there = real[row, head]
            if not there.any():
                assert bias[row, head] == -torch.inf
                assert (found_keys[row, head] == 0).all()
                continue
            torch.testing.assert_close(found_keys[row, head, 0], keys[row, head][there].mean(0), atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(
                found_values[row, head, 0], values[row, head][there].mean(0), atol=1e-6, rtol=1e-5
            )
            assert abs(float(bias[row, head]) - math.log(int(there.sum()))) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_small_folds_lose_nothing_to_sixteen_bits(dtype):
    """The running mean of 3000 tokens, one at a time, is that of all of them, rounded once."""
    keys, values = drawn(1, 1, 3000, 4, dtype=dtype)
    keys = keys + 50
    store = Compensated(DenseStore())
    for at in range(3000):
        store.fold(keys[:, :, at : at + 1], values[:, :, at : at + 1], None)
    found, _, bias = store.folded()
    assert found.dtype == dtype
    assert bias.dtype == torch.float32
    expected = keys.double().mean(2, keepdim=True)
    assert ((found.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs()).all()
    assert abs(float(bias) - math.log(3000)) < 1e-5


def test_nothing_folded_is_no_slot():
    store = Compensated(DenseStore())
    assert store.folded() is None
    assert store.tensors() == []
    store.select_rows(torch.tensor([0]))


class Shuffled(DenseStore):
    """A store with all that a store may have."""

    block, wants_scores, shares_tokens = 4, True, True

    @property
    def segments(self):
        return (1, len(self) - 1)

    def append(self, keys, values, positions, scores=None):
        self.given = (positions, scores)
        super().append(keys.flip(2), values.flip(2), positions, scores)
        return torch.arange(len(self)).flip(0).expand(keys.shape[0], keys.shape[1], -1)

    def bias(self, queries, scaling):
        return queries.new_full((1,), scaling)


def test_everything_else_is_the_inner_stores():
    keys, values = drawn()
    inner = Shuffled()
    store = Compensated(inner)
    assert isinstance(store, Store)
    assert (store.block, store.wants_scores, store.shares_tokens, store.folds) == (4, True, True, True)
    positions, scores = torch.arange(11)[None, None], torch.rand(2, 3, 11)
    order = store.append(keys, values, positions, scores)
    assert order.tolist()[0][0] == list(range(10, -1, -1))
    assert inner.given[0] is positions
    assert inner.given[1] is scores
    assert len(store) == 11
    assert store.segments == (1, 10)
    assert float(store.bias(keys, 0.5)) == 0.5
    index = torch.tensor([0, 3, 4]).expand(2, 3, -1)
    store.keep(index)
    torch.testing.assert_close(store.read()[0], pick(keys.flip(2), index))


def test_rows_are_selected_with_their_means():
    keys, values = drawn()
    store = Compensated(DenseStore())
    store.append(keys, values, torch.arange(11)[None, None])
    store.fold(keys, values, None)
    before = store.folded()
    store.select_rows(torch.tensor([1, 1, 0]))
    for old, new in zip(before, store.folded(), strict=True):
        torch.testing.assert_close(new, old[[1, 1, 0]])
    assert store.read()[0].shape[0] == 3


def test_bytes_are_counted():
    keys, values = drawn(2, 3, 11, 8)
    store = Compensated(DenseStore())
    store.fold(keys, values, None)
    assert sum(t.untyped_storage().nbytes() for t in store.tensors()) == 2 * 3 * 4 * (8 + 8 + 1)
    store.append(keys, values, torch.arange(11)[None, None])
    assert (
        sum(t.untyped_storage().nbytes() for t in store.tensors()) == 2 * 3 * 4 * (8 + 8 + 1) + 2 * 2 * 3 * 11 * 8 * 4
    )


def test_runs_where_there_are_only_shapes():
    keys = torch.empty(2, 3, 5, 8, device="meta")
    store = Compensated(DenseStore())
    store.fold(keys, keys, torch.empty(2, 3, 5, dtype=torch.bool, device="meta"))
    store.fold(keys, keys, None)
    assert [t.shape for t in store.folded()] == [(2, 3, 1, 8), (2, 3, 1, 8), (2, 3, 1)]
