import math

import pytest
import torch

from tcw.kv.rope import Rope
from tcw.kv.stores import DenseStore
from tcw.kv.stores.lowrank import Factors, LowRank

B, G, D, DV = 2, 2, 6, 4
FREQUENCIES = [1.0, 0.1]  # of 4 rotated elements; the last 2 of a key pass
ROPE = Rope(torch.tensor(FREQUENCIES))


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def orthonormal(size, rank, seed=0):
    return torch.linalg.qr(drawn(size, size, seed=seed).double()).Q[:, :rank].float()


def factors(size, rank, seed=0):
    basis = orthonormal(size, rank, seed)
    return Factors(basis, basis, drawn(size, seed=seed + 1) * 3)


def made(key_rank=5, value_rank=3, inner=DenseStore):
    return LowRank(factors(G * D, key_rank, 1), factors(G * DV, value_rank, 3), ROPE, inner())


def tokens(m, first=0, dtype=torch.float32, seed=5):
    positions = torch.arange(first, first + m).expand(B, 1, m)
    return drawn(B, G, m, D, seed=seed, dtype=dtype), drawn(B, G, m, DV, seed=seed + 1, dtype=dtype), positions


def rotated(key, position, sign=1):
    """RoPE of one key by its definition: pairs (f, f + 2) turn by position · ω_f."""
    turned = list(key)
    for f, w in enumerate(FREQUENCIES):
        c, s = math.cos(sign * position * w), math.sin(sign * position * w)
        turned[f], turned[f + 2] = key[f] * c - key[f + 2] * s, key[f] * s + key[f + 2] * c
    return turned


def projected(x, f):
    """P Pᵀ (x - μ) + μ, one number after another."""
    basis, mean = f.encode.double().tolist(), f.mean.double().tolist()
    ranks = range(len(basis[0]))
    codes = [sum((a - m) * row[r] for a, m, row in zip(x, mean, basis, strict=True)) for r in ranks]
    return [sum(codes[r] * row[r] for r in ranks) + m for row, m in zip(basis, mean, strict=True)]


def reference(store, keys, values, positions):
    """What `read` should return of these tokens, in float64."""
    out_keys, out_values = torch.zeros_like(keys, dtype=torch.float64), torch.zeros_like(values, dtype=torch.float64)
    for b in range(keys.shape[0]):
        for j in range(keys.shape[2]):
            p = positions[b, 0, j].item()
            flat = [e for g in range(G) for e in rotated(keys[b, g, j].double().tolist(), p, -1)]
            back = projected(flat, store.keys)
            for g in range(G):
                out_keys[b, g, j] = torch.tensor(rotated(back[g * D : (g + 1) * D], p), dtype=torch.float64)
            flat = [e for g in range(G) for e in values[b, g, j].double().tolist()]
            out_values[b, :, j] = torch.tensor(projected(flat, store.values), dtype=torch.float64).view(G, DV)
    return out_keys, out_values


@pytest.mark.parametrize("m", [1, 2, 9])
def test_reads_the_projection_rotated_back(m):
    store, (keys, values, positions) = made(), tokens(m, first=37)
    assert store.append(keys, values, positions) is None
    assert len(store) == m
    for got, wanted in zip(store.read(), reference(store, keys, values, positions), strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("dtype", "step"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_full_rank_gives_the_input_back(dtype, step):
    store, (keys, values, positions) = made(G * D, G * DV), tokens(8, first=100, dtype=dtype)
    store.append(keys, values, positions)
    for got, given in zip(store.read(), (keys, values), strict=True):
        assert got.dtype == dtype
        limit = step * (given.float().norm(dim=-1, keepdim=True) + 12)  # codes of vectors and of their mean are rounded
        assert ((got - given).float().abs() <= limit).all()


def test_appends_come_one_after_another():
    whole, parts = made(), made()
    keys, values, positions = tokens(10)
    whole.append(keys, values, positions)
    for start, end in ((0, 4), (4, 5), (5, 10)):
        parts.append(keys[:, :, start:end], values[:, :, start:end], positions[..., start:end])
    for a, b in zip(whole.read(), parts.read(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_kept_tokens_stay_where_they_were_in_the_text():
    store, (keys, values, positions) = made(), tokens(10, first=20)
    store.append(keys, values, positions)
    all_keys, all_values = store.read()
    index = torch.tensor([[1, 4, 9], [0, 2, 3]])
    store.keep(index[:, None].expand(-1, G, -1))
    got_keys, got_values = store.read()
    for b in range(B):
        torch.testing.assert_close(got_keys[b], all_keys[b, :, index[b]], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(got_values[b], all_values[b, :, index[b]], atol=1e-6, rtol=1e-6)
    assert store.positions[:, 0].tolist() == (index + 20).tolist()
    more = tokens(2, first=30, seed=11)
    store.append(*more)
    for got, wanted in zip(store.read(), reference(store, *more), strict=True):
        torch.testing.assert_close(got[:, :, 3:].double(), wanted, atol=2e-5, rtol=2e-5)


def test_each_sequence_has_its_own_positions():
    """As behind padding: the second text began three tokens later, and padding stands anywhere."""
    store, (keys, values, _) = made(), tokens(6)
    positions = torch.tensor([[[7, 8, 9, 10, 11, 12]], [[1, 1, 1, 0, 1, 2]]])
    store.append(keys, values, positions)
    for got, wanted in zip(store.read(), reference(store, keys, values, positions), strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=2e-5)


def test_a_scaled_rotation_is_undone_as_well():
    """YaRN: keys come multiplied, and must be read so."""
    rope = Rope(torch.tensor(FREQUENCIES), scaling=1.3)
    full = factors(G * D, G * D, 1), factors(G * DV, G * DV, 3)
    store, (keys, values, positions) = LowRank(*full, rope, DenseStore()), tokens(5, first=9)
    store.append(keys, values, positions)
    torch.testing.assert_close(store.read()[0], keys, atol=2e-5, rtol=2e-5)
    shifted = Factors(full[0].encode[:, :4], full[0].decode[:, :4], full[0].mean)
    low = LowRank(shifted, full[1], rope, DenseStore())
    low.append(keys, values, positions)
    plain = LowRank(shifted, full[1], ROPE, DenseStore())
    plain.append(torch.cat([keys[..., :4] / 1.3, keys[..., 4:]], -1), values, positions)
    wanted = plain.read()[0]
    torch.testing.assert_close(low.read()[0][..., :4], wanted[..., :4] * 1.3, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(low.read()[0][..., 4:], wanted[..., 4:], atol=2e-5, rtol=2e-5)


def test_sequences_are_chosen_and_repeated():
    store, (keys, values, positions) = made(), tokens(4, first=3)
    positions = positions + torch.tensor([0, 50])[:, None, None]
    store.append(keys, values, positions)
    before, rows = store.read(), torch.tensor([1, 1, 0])
    store.select_rows(rows)
    for a, b in zip(before, store.read(), strict=True):
        assert torch.equal(a[rows], b)
    store.select_rows(torch.tensor([2]))
    assert torch.equal(store.read()[0], before[0][:1])


def test_an_empty_store_has_no_tokens_and_no_bytes():
    store = made()
    store.select_rows(torch.tensor([0]))
    assert len(store) == 0
    assert store.tensors() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_codes_and_positions_and_no_factors(dtype):
    store = made(5, 3)
    store.append(*tokens(7, dtype=dtype))
    store.append(*tokens(3, first=7, dtype=dtype))
    store.keep(torch.arange(0, 8).expand(B, G, -1))
    held = store.tensors()
    assert sum(t.untyped_storage().nbytes() for t in held) == B * 8 * ((5 + 3) * dtype.itemsize + 4)
    assert len({t.untyped_storage().data_ptr() for t in held}) == len(held)


def test_holds_nothing_of_what_it_was_given():
    store, (keys, values, positions) = made(), tokens(3)
    positions = positions.int().clone()
    store.append(keys, values, positions)
    before = [x.clone() for x in store.read()]
    for given in (keys, values, positions):
        given.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, store.read(), strict=True))


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_equal_tokens_and_zeros_are_finite(value):
    store, (keys, values, positions) = made(), tokens(5)
    store.append(torch.full_like(keys, value), torch.full_like(values, value), positions)
    assert all(torch.isfinite(x).all() for x in store.read())


class Shuffled(DenseStore):
    """Holds tokens in the opposite order of that they came in."""

    wants_scores = True

    def append(self, keys, values, positions, scores=None):
        before = len(self)
        super().append(keys, values, positions)
        self.given = scores
        order = torch.cat([torch.arange(before + keys.shape[2] - 1, before - 1, -1), torch.arange(before)])
        self.keys, self.values = self.keys[:, :, order].clone(), self.values[:, :, order].clone()
        return order.expand(len(keys), keys.shape[1], -1)


def test_follows_an_inner_store_that_reorders_tokens():
    store, plain = made(inner=Shuffled), made()
    first, second = tokens(3, first=2), tokens(2, first=5, seed=8)
    scores = drawn(B, G, 3)
    assert store.append(*first, scores).tolist() == [[[2, 1, 0]] * G] * B
    torch.testing.assert_close(store.inner.given, scores.mean(1, keepdim=True))
    assert store.append(*second).tolist() == [[[4, 3, 0, 1, 2]] * G] * B
    plain.append(*first)
    plain.append(*second)
    for got, wanted in zip(store.read(), plain.read(), strict=True):
        torch.testing.assert_close(got, wanted[:, :, [4, 3, 2, 1, 0]], atol=1e-6, rtol=1e-6)
    assert store.positions[0, 0].tolist() == [6, 5, 4, 3, 2]


def test_passes_on_what_the_inner_store_wants():
    class Inner(DenseStore):
        block, wants_scores = 32, True

    store = made(inner=Inner)
    assert (store.block, store.wants_scores, store.shares_tokens) == (32, True, True)


def test_runs_without_memory():
    on_meta = [Factors(*(x.to("meta") for x in vars(f).values())) for f in (factors(G * D, 5), factors(G * DV, 3))]
    store = LowRank(on_meta[0], on_meta[1], ROPE.to(torch.device("meta")), DenseStore())
    keys, values, positions = (x.to("meta") for x in tokens(9, dtype=torch.bfloat16))
    store.append(keys, values, positions)
    store.append(keys, values, positions)
    store.keep(torch.zeros(B, G, 6, dtype=torch.int64, device="meta"))
    assert [x.shape for x in store.read()] == [(B, G, 6, D), (B, G, 6, DV)]
    assert sum(t.nbytes for t in store.tensors()) == B * 6 * ((5 + 3) * 2 + 4)
