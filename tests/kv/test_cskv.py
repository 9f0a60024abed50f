import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tcw.errors import UsageError
from tcw.kv import AttentionCall, Group, LayerShape
from tcw.kv._subspace import RIDGE, Moments, best_basis
from tcw.kv.cskv import Cskv
from tcw.kv.policy import Policy
from tcw.kv.rope import Rope
from tcw.kv.stores import DenseStore
from tcw.methods import build

G, R, D, DV = 2, 2, 4, 3
SHAPE = LayerShape(5, 0, 1, G * R, G, D, DV, torch.float32, Rope(torch.tensor([0.8, 0.05])))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixed(batch, heads, n, dim, seed):
    """Vectors that vary much more in some directions than in others, around a mean that is not zero."""
    return drawn(batch, heads, n, dim, seed=seed) @ drawn(dim, dim, seed=seed + 1) * 0.7 + drawn(
        heads, 1, dim, seed=seed
    )


class Session:
    """Two texts, seen by one layer."""

    model, layers, tokens, seed = None, (SHAPE,), None, 3

    def __init__(self):
        self.calls = []
        for seed, n in ((0, 9), (10, 14)):
            positions = torch.arange(n)[None]
            rotated = [
                SHAPE.rope.rotate(mixed(1, h, n, D, seed + i), positions[:, None]) for i, h in enumerate((G * R, G))
            ]
            self.calls.append(AttentionCall(*rotated, mixed(1, G, n, DV, seed + 7), None, positions, 0.5, None, 0))

    def watch(self, look, tokens=None):
        for call in self.calls:
            look(SHAPE, call)


def turned(vector, by):
    """RoPE by its definition."""
    out = list(vector)
    for f, w in enumerate(SHAPE.rope.inv_freq.tolist()):
        c, s = math.cos(by * w), math.sin(by * w)
        out[f], out[f + 2] = vector[f] * c - vector[f + 2] * s, vector[f] * s + vector[f + 2] * c
    return out


def unrotated(session):
    """Joint keys before RoPE, and joint values, of all tokens but two sinks: float64 [n, G·D] and [n, G·Dv]."""
    keys, values = [], []
    for call in session.calls:
        for j in range(2, call.keys.shape[2]):
            keys.append([e for g in range(G) for e in turned(call.keys[0, g, j].double().tolist(), -j)])
            values.append([e for g in range(G) for e in call.values[0, g, j].double().tolist()])
    return torch.tensor(keys, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)


def mean_and_covariance(rows):
    n, size = rows.shape
    mean = [sum(rows[:, i].tolist()) / n for i in range(size)]
    covariance = [
        [sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows.tolist()) / n for j in range(size)]
        for i in range(size)
    ]
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(covariance, dtype=torch.float64)


def what_queries_see(session):
    """M: for each head the mean of q qᵀ, each query at a distance drawn as the method draws it."""
    generator, seen, count = torch.Generator().manual_seed(session.seed), torch.zeros(G * D, G * D).double(), 0
    for call in session.calls:
        n = call.queries.shape[2]
        away = torch.randint(0, n, (1, 1, n), generator=generator)[0, 0].tolist()
        for h in range(G * R):
            at = h // R * D
            for j in range(n):
                q = torch.tensor(turned(call.queries[0, h, j].double().tolist(), away[j] - j)).double()
                seen[at : at + D, at : at + D] += torch.outer(q, q)
        count += n * R
    return seen / count


def error(rows, encode, decode, mean, metric):
    """The mean over tokens of (x - x̂)ᵀ M (x - x̂)."""
    away = rows - mean
    left = away - away @ encode.double() @ decode.double().T
    return ((left @ metric) * left).sum(1).mean().item()


def factors(found, kind):
    names = ("key_encode", "key_decode", "key_mean") if kind == "key" else ("value_basis", "value_basis", "value_mean")
    return [found[f"5.{name}"] for name in names]


def test_plain_factors_are_the_first_eigenvectors():
    session = Session()
    found = Cskv(key_rank=0.5, value_rank=0.5, metric="plain", sinks=2).calibrate(session)
    for kind, rows, rank in zip(("key", "value"), unrotated(session), (4, 3), strict=True):
        mean, covariance = mean_and_covariance(rows)
        encode, decode, center = factors(found, kind)
        torch.testing.assert_close(center.double(), mean, atol=1e-5, rtol=1e-5)
        assert torch.equal(encode, decode)
        torch.testing.assert_close(encode.T @ encode, torch.eye(rank), atol=1e-5, rtol=0)
        left = torch.linalg.eigvalsh(covariance)[:-rank].sum().item()
        assert error(rows, encode, decode, mean, torch.eye(len(mean)).double()) == pytest.approx(left, rel=1e-4)


def test_query_factors_leave_the_least_error_of_logits():
    session = Session()
    found, plain = (Cskv(key_rank=0.5, metric=metric, sinks=2).calibrate(session) for metric in ("query", "plain"))
    rows, metric = unrotated(session)[0], what_queries_see(session)
    metric += RIDGE * torch.linalg.eigvalsh(metric).mean() * torch.eye(G * D)
    encode, decode, mean = factors(found, "key")
    torch.testing.assert_close(encode.T @ decode, torch.eye(4), atol=1e-5, rtol=0)
    mine = error(rows, encode, decode, mean.double(), metric)
    size, vectors = torch.linalg.eigh(metric)
    root = vectors @ size.sqrt().diag() @ vectors.T
    least = torch.linalg.eigvalsh(root @ mean_and_covariance(rows)[1] @ root)[:-4].sum().item()
    assert mine == pytest.approx(least, rel=1e-3)
    assert mine < error(rows, *factors(plain, "key")[:2], mean.double(), metric)
    for seed in range(20):  # nor does any other projection do better
        other = torch.linalg.qr(drawn(G * D, 4, seed=seed)).Q
        assert mine < error(rows, other, other, mean.double(), metric)


def test_moments_do_not_depend_on_how_vectors_come():
    rows, parts = drawn(50, 4) + 100, Moments()
    for start, end in ((0, 1), (1, 20), (20, 50)):
        parts.add(rows[start:end])
    mean, covariance = mean_and_covariance(rows.double())
    torch.testing.assert_close(parts.mean, mean)
    torch.testing.assert_close(parts.covariance, covariance, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(
    "metric", [None, torch.zeros(4, 4).double(), torch.diag(torch.tensor([1.0, 0, 0, 0])).double()]
)
@pytest.mark.parametrize("covariance", [torch.zeros(4, 4).double(), torch.ones(4, 4).double()])
def test_a_degenerate_basis_still_decodes_what_it_encodes(covariance, metric):
    basis = best_basis(covariance, metric)
    torch.testing.assert_close(basis.encode.T @ basis.decode, torch.eye(4).double(), atol=1e-8, rtol=0)
    assert (basis.energy >= 0).all()


def test_a_budget_is_shared_out_by_energy():
    """Layers whose keys and values vary in one direction need one rank; the others take the rest."""
    rich, poor = Moments(), Moments()
    for seed in range(40):
        rich.add(drawn(8, 4, seed=seed))
        poor.add(drawn(8, 1, seed=seed) * torch.tensor([[1.0, 2, 3, 4]]) * 100 + drawn(8, 4, seed=seed + 50) * 10)
    bases = [tuple(best_basis(m.covariance) for m in pair) for pair in ((rich, poor), (poor, rich))]
    ranks = Cskv(ratio=10 / 16)._ranks(bases)
    assert ranks == [(4, 1), (1, 4)]
    assert Cskv(key_rank=0.25, value_rank=0.5)._ranks(bases) == [(1, 2), (1, 2)]


@pytest.mark.parametrize("options", [{}, {"metric": "plain"}, {"key_rank": 0.25}])
def test_an_outline_has_the_shapes_of_what_is_measured(options):
    method = Cskv(**options)
    outline, found = method.outline((SHAPE,)), method.calibrate(Session())
    assert {n: t.shape for n, t in outline.items()} == {n: t.shape for n, t in found.items()}
    assert all(t.dtype == torch.float32 for t in found.values())


@pytest.mark.parametrize(
    "options",
    [{"key_rank": 0.0}, {"value_rank": 1.5}, {"ratio": -0.1}, {"window": 0}, {"interval": 0}, {"sinks": -1},
     {"metric": "other"}],
)  # fmt: skip
def test_refuses_options(options):
    with pytest.raises(UsageError):
        build("cskv", options)


def test_refuses_heads_that_are_divided():
    method = Cskv()
    with pytest.raises(UsageError, match="divides them"):
        method.store(SHAPE, Group((0,)), method.outline((SHAPE,)), DenseStore)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def text():
    return torch.randint(1, 64, (2, 90), generator=torch.Generator().manual_seed(0))


def logits(model, cache, ids, mask=None, split=70):
    """Of the second of two calls."""
    with torch.no_grad():
        model(ids[:, :split], attention_mask=None if mask is None else mask[:, :split], past_key_values=cache)
        return model(ids[:, split:], attention_mask=mask, past_key_values=cache).logits


def test_all_channels_change_nothing(llama, text):
    policy = Policy.make("cskv:key_rank=1,value_rank=1", llama, text)
    plain = policy.everything()
    torch.testing.assert_close(
        logits(llama, policy.new_cache(llama), text), logits(llama, plain.new_cache(llama), text), atol=1e-4, rtol=1e-4
    )


def test_more_channels_err_less(llama, text):
    full = llama(text).logits[:, 70:].detach()
    errors = [
        (logits(llama, Policy.make(f"cskv:key_rank={k},value_rank={v}", llama, text).new_cache(llama), text) - full)
        .square().mean().item()
        for k, v in ((0.2, 0.3), (0.5, 0.6), (0.9, 0.95))
    ]  # fmt: skip
    assert errors[0] > errors[1] > errors[2] > 0


def test_padding_changes_nothing(llama, text):
    policy = Policy.make("cskv", llama, text)
    alone = logits(llama, policy.new_cache(llama), text[:1, 6:], split=64)
    mask = torch.ones_like(text)
    mask[0, :6] = 0
    padded = torch.where(mask.bool(), text, 0)
    together = logits(llama, policy.new_cache(llama), padded, mask)
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("other", [[], ["snapkv:ratio=0.6"], ["pooled-memory:chunk=4,window=32"], ["knorm:tokens=60"]])
def test_goes_with_eviction_and_pooling_as_planned(llama, text, other):
    policy = Policy.make(["cskv:interval=8", *other], llama, text)
    cache = policy.new_cache(llama)
    with torch.no_grad():
        llama(text, past_key_values=cache)
    plan = policy.plan(90, batch=2)
    assert cache.nbytes() == plan.bytes < plan.dense_bytes
    out = llama.generate(
        text, attention_mask=torch.ones_like(text), past_key_values=policy.new_cache(llama), max_new_tokens=40
    )
    assert out.shape == (2, 130)


def test_bytes_are_those_of_codes(llama, text):
    """16 of 16+16 channels in codes, 4 bytes each, and a position for each token; sinks and window are exact."""
    policy = Policy.make("cskv:key_rank=0.5,value_rank=0.5,sinks=2,window=8", llama, text)
    layer, exact, coded = 2 * 16 * 4, 10, 80
    newest = 8 * 4
    assert policy.plan(90).bytes == 2 * (exact * layer + coded * (16 * 4 + 4) + newest)
    assert policy.plan(90).shared_bytes == 2 * 4 * (16 * 8 * 2 + 16 + 16 * 8 + 16)


def test_refuses_what_it_cannot_serve(llama, text):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=128))
    with pytest.raises(UsageError, match="no RoPE"):
        Policy.make("cskv", gpt2, text)
    with pytest.raises(UsageError, match="none was given"):
        Policy.make("cskv", llama)
    for other in ("pooled-memory:chunk=4", "kvtc"):
        policy = Policy.make([other, "cskv"], llama, text)
        with pytest.raises(UsageError, match="changed before"):
            policy.plan(90)


def test_factors_are_shared_by_caches(llama, text):
    policy = Policy.make("cskv", llama, text)
    stores = [policy.new_layer(policy.layers[0]) for _ in range(2)]
    for layer in stores:
        layer.lazy_initialization(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))
    first, second = (layer.groups[0].store.keys.decode for layer in stores)
    assert first.data_ptr() == second.data_ptr()
