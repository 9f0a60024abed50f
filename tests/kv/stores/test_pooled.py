import math

import pytest
import torch

from tcw.kv.rope import Rope
from tcw.kv.stores import DenseStore
from tcw.kv.stores.pooled import Pooled

B, G, R, D, DV = 2, 2, 3, 6, 4
FREQUENCIES = [1.0, 0.1]  # of 4 rotated elements; the last 2 of a key pass
ROPE = Rope(torch.tensor(FREQUENCIES))


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(m, first=0, dtype=torch.float32, seed=5):
    positions = torch.arange(first, first + m).expand(B, 1, m)
    return drawn(B, G, m, D, seed=seed, dtype=dtype), drawn(B, G, m, DV, seed=seed + 1, dtype=dtype), positions


def turned(key, by):
    out = list(key)
    for f, w in enumerate(FREQUENCIES):
        c, s = math.cos(by * w), math.sin(by * w)
        out[f], out[f + 2] = key[f] * c - key[f + 2] * s, key[f] * s + key[f + 2] * c
    return out


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def reference(chunk, keys, values, positions):
    """Slots by loops: for each [b][g] a list of (key, value, count); a slot of padding alone is None."""
    found = []
    for b in range(keys.shape[0]):
        heads = []
        for g in range(keys.shape[1]):
            slots = []
            p = positions[b, min(g, positions.shape[1] - 1)].tolist()
            for start in range(0, len(p), chunk):
                members = [j for j in range(start, min(start + chunk, len(p))) if p[j] >= 0]
                if not members:
                    slots.append(None)
                    continue
                centre = sum(p[j] for j in members) // len(members)
                key = mean([turned(keys[b, g, j].double().tolist(), centre - p[j]) for j in members])
                slots.append((key, mean([values[b, g, j].double().tolist() for j in members]), len(members)))
            heads.append(slots)
        found.append(heads)
    return found


def assert_holds(store, wanted):
    keys, values = store.read()
    bias = store.bias(torch.zeros(B, G * R, 1, D), 1.0)
    for b in range(B):
        for g in range(G):
            assert len(store) == len(wanted[b][g])
            for i, slot in enumerate(wanted[b][g]):
                if slot is None:
                    assert bias[b, g * R, 0, i] == -torch.inf
                    continue
                torch.testing.assert_close(keys[b, g, i].double(), torch.tensor(slot[0]).double(), atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(
                    values[b, g, i].double(), torch.tensor(slot[1]).double(), atol=1e-5, rtol=1e-5
                )
                assert bias[b, g * R : (g + 1) * R, 0, i].tolist() == pytest.approx([math.log(slot[2])] * R)


@pytest.mark.parametrize(("m", "chunk"), [(8, 4), (4, 4), (6, 2), (7, 3), (1, 4), (5, 16)])
def test_a_slot_is_the_mean_of_its_chunk(m, chunk):
    """The last chunk may be shorter: what eviction leaves for an empty store can be any number of tokens."""
    store, given = Pooled(chunk, ROPE, DenseStore()), tokens(m, first=11)
    last = store.append(*given)
    assert last.tolist() == [[[min(i + chunk, m) - 1 for i in range(0, m, chunk)]] * G] * B
    assert_holds(store, reference(chunk, *given))


def test_slots_of_a_second_append_come_after_the_first():
    store, first, second = Pooled(4, ROPE, DenseStore()), tokens(8), tokens(4, first=8, seed=9)
    store.append(*first)
    assert store.append(*second).tolist() == [[[0, 1, 5]] * G] * B
    wanted = [
        [a + b for a, b in zip(x, y, strict=True)]
        for x, y in zip(reference(4, *first), reference(4, *second), strict=True)
    ]
    assert_holds(store, wanted)


@pytest.mark.parametrize("heads", [1, G])
def test_padding_is_not_averaged_in(heads):
    keys, values, positions = tokens(8)
    real = torch.ones(B, heads, 8, dtype=torch.bool)
    real[0, :, :3] = False  # one of four is real
    real[1, :, :6] = False  # a slot of padding alone
    keys, values = (
        torch.where(real[..., None].expand(-1, G, -1, -1), x, torch.full_like(x, 1e4)) for x in (keys, values)
    )
    positions = torch.where(real, positions, -1)
    store = Pooled(4, ROPE, Shuffled())
    store.inner.keeps_order = True
    last = store.append(keys, values, positions)
    wanted = reference(4, keys, values, positions)
    assert [slot and slot[2] for slot in wanted[0][0]] == [1, 4]
    assert [slot and slot[2] for slot in wanted[1][0]] == [None, 2]
    assert_holds(store, wanted)
    represented = real.expand(-1, G, -1).gather(2, last)
    assert represented.tolist() == [[[slot is not None for slot in head] for head in row] for row in wanted]
    assert (store.inner.centres >= 0).expand(-1, G, -1).tolist() == represented.tolist()


def test_heads_may_bring_different_tokens():
    keys, values, _ = tokens(6)
    positions = torch.tensor([[[0, 1, 2, 5, 6, 9], [1, 2, 3, 4, 8, 20]], [[3, 4, 5, 6, 7, 8], [0, 1, 5, 6, 7, 30]]])
    store = Pooled(3, ROPE, DenseStore())
    store.append(keys, values, positions)
    assert_holds(store, reference(3, keys, values, positions))


def test_equal_tokens_weigh_what_they_weighed():
    """Tokens with one unrotated key and one value: attention over their slot is attention over all of them."""
    m, chunk = 6, 6
    store = Pooled(chunk, Rope(torch.zeros(2)), DenseStore())
    one, other = tokens(1), tokens(1, seed=7)
    keys, values = (x.expand(-1, -1, m, -1) for x in one[:2])
    store.append(keys, values, torch.arange(m).expand(B, 1, m))
    query = drawn(B, G * R, 1, D, seed=3).double()

    def attention(keys, values, bias):
        logits = query.unflatten(1, (G, R)) @ keys.double().unsqueeze(2).transpose(-1, -2) * 0.4 + bias
        return logits.softmax(-1) @ values.double().unsqueeze(2)

    slot_keys, slot_values = store.read()
    bias = torch.nn.functional.pad(store.bias(query.float(), 0.4), (0, 1)).double().unflatten(1, (G, R))
    pooled = attention(torch.cat([slot_keys, other[0]], 2), torch.cat([slot_values, other[1]], 2), bias)
    whole = attention(torch.cat([keys, other[0]], 2), torch.cat([values, other[1]], 2), 0.0)
    torch.testing.assert_close(pooled, whole, atol=1e-6, rtol=1e-6)


def test_unweighted_slots_count_once():
    store = Pooled(4, ROPE, DenseStore(), weighted=False)
    keys, values, positions = tokens(8)
    positions = positions.clone()
    positions[0, :, :4] = -1
    store.append(keys, values, positions)
    bias = store.bias(drawn(B, G * R, 2, D), 1.0)
    assert bias[0, 0].tolist() == [[-math.inf, 0.0]] * 2
    assert bias[1, 0].tolist() == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("top", [1, 2, 4, 9])
def test_a_query_sees_the_slots_it_matches_best(top):
    store = Pooled(4, ROPE, DenseStore(), top=top)
    keys, values, positions = tokens(16)
    positions = positions.clone()
    positions[0, :, [1, 2, 3, 9]] = -1
    positions[1, :, :7] = -1
    store.append(keys, values, positions)
    queries = drawn(B, G * R, 3, D, seed=4)
    bias = store.bias(queries, 0.5)
    slots = reference(4, keys, values, positions)
    for b in range(B):
        for h in range(G * R):
            for i in range(3):
                logits = {}
                for s, slot in enumerate(slots[b][h // R]):
                    if slot is not None:
                        q = queries[b, h, i].double().tolist()
                        product = sum(x * k for x, k in zip(q, slot[0], strict=True))
                        logits[s] = product * 0.5 + math.log(slot[2])
                best = sorted(logits, key=logits.get, reverse=True)[:top]
                wanted = [math.log(slots[b][h // R][s][2]) if s in best else -math.inf for s in range(4)]
                assert bias[b, h, i].tolist() == pytest.approx(wanted)


def test_kept_slots_and_chosen_sequences():
    store, given = Pooled(2, ROPE, DenseStore()), tokens(9)
    store.append(*given)
    keys, values = store.read()
    index = torch.tensor([[[0, 2, 4], [1, 2, 3]], [[0, 1, 2], [2, 3, 4]]])
    store.keep(index)
    for b in range(B):
        for g in range(G):
            assert torch.equal(store.read()[0][b, g], keys[b, g, index[b, g]])
            assert torch.equal(store.read()[1][b, g], values[b, g, index[b, g]])
    counts = [2, 2, 2, 2, 1]
    assert store.counts.tolist() == [[[counts[i] for i in head] for head in row] for row in index.tolist()]
    store.append(*tokens(2, first=9))
    assert store.counts.shape == (B, G, 4)
    store.select_rows(torch.tensor([1, 1, 0]))
    assert store.counts[0].tolist() == store.counts[1].tolist() == [[2, 2, 2, 2], [2, 2, 1, 2]]
    assert len(store.read()[0]) == 3


def test_an_empty_store_has_no_tokens_and_no_bytes():
    store = Pooled(4, ROPE, DenseStore())
    store.select_rows(torch.tensor([0]))
    assert len(store) == 0
    assert store.tensors() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_counts_slots_and_their_sizes(dtype):
    store = Pooled(4, ROPE, DenseStore())
    store.append(*tokens(16, dtype=dtype))
    assert [x.dtype for x in store.read()] == [dtype, dtype]
    held = store.tensors()
    assert sum(t.untyped_storage().nbytes() for t in held) == B * 4 * (G * (D + DV) * dtype.itemsize + 4)
    assert len({t.untyped_storage().data_ptr() for t in held}) == len(held)


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_equal_tokens_and_zeros_are_finite(value):
    store, (keys, values, positions) = Pooled(4, ROPE, DenseStore()), tokens(8)
    store.append(torch.full_like(keys, value), torch.full_like(values, value), positions)
    assert all(torch.isfinite(x).all() for x in store.read())
    torch.testing.assert_close(store.read()[1], torch.full((B, G, 2, DV), value))


class Shuffled(DenseStore):
    """Holds tokens in the opposite order of that they came in."""

    block, wants_scores, keeps_order = 2, True, False

    def append(self, keys, values, positions, scores=None):
        before = len(self)
        super().append(keys, values, positions)
        self.given, self.centres = scores, positions
        if self.keeps_order:
            return None
        order = torch.cat([torch.arange(before + keys.shape[2] - 1, before - 1, -1), torch.arange(before)])
        self.keys, self.values = self.keys[:, :, order].clone(), self.values[:, :, order].clone()
        return order.expand(len(keys), keys.shape[1], -1)


def test_follows_an_inner_store_that_reorders_slots():
    store = Pooled(4, ROPE, Shuffled())
    assert store.block == 8
    assert store.wants_scores
    keys, values, positions = tokens(7, first=10)
    scores = drawn(B, G, 7) - 9
    assert store.append(keys, values, positions, scores).tolist() == [[[6, 3]] * G] * B
    assert store.counts[:, 0].tolist() == [[3, 4]] * B
    assert store.inner.centres[0, 0].tolist() == [11, 15]
    torch.testing.assert_close(store.inner.given, torch.stack([scores[..., :4].amax(-1), scores[..., 4:].amax(-1)], -1))
    assert store.append(*tokens(4, first=17), scores[..., :4]).tolist() == [[[5, 0, 1]] * G] * B
    assert store.counts[:, 0].tolist() == [[4, 3, 4]] * B


def test_runs_without_memory():
    store = Pooled(4, ROPE.to(torch.device("meta")), DenseStore(), top=2)
    keys, values, positions = (x.to("meta") for x in tokens(10, dtype=torch.bfloat16))
    store.append(keys, values, positions)
    store.append(keys, values, positions)
    assert store.bias(torch.zeros(B, G * R, 3, D, device="meta"), 1.0).shape == (B, G * R, 3, 6)
    store.keep(torch.zeros(B, G, 5, dtype=torch.int64, device="meta"))
    assert [x.shape for x in store.read()] == [(B, G, 5, D), (B, G, 5, DV)]
