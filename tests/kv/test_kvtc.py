import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tcw.errors import UsageError
from tcw.kv import AttentionCall, Group, LayerShape
from tcw.kv.kvtc import Kvtc
from tcw.kv.policy import Policy
from tcw.kv.rope import Rope
from tcw.kv.stores import DenseStore
from tcw.kv.stores.spectrum import allot, lloyd
from tcw.methods import build

G, D, SINKS = 2, 8, 2
SHAPE = LayerShape(3, 0, 1, G, G, D, D, torch.float32, Rope(torch.tensor([0.9, 0.4, 0.1, 0.02])))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(n, seed):
    """Keys before RoPE, or values, that vary much more in some directions than in others: [1, G, n, D]."""
    turn = torch.linalg.qr(drawn(G * D, G * D, seed=99)).Q
    joint = (drawn(n, G * D, seed=seed) * torch.logspace(1, -1, G * D)) @ turn + drawn(G * D, seed=98)
    return joint.unflatten(-1, (G, D)).transpose(0, 1)[None]


class Session:
    """Two texts, seen by one layer; their first tokens are like no others."""

    model, layers, tokens, seed = None, (SHAPE,), None, 0

    def watch(self, look, tokens_=None):
        for seed, n in ((0, 120), (10, 90)):
            keys, values, positions = tokens(n, seed), tokens(n, seed + 1), torch.arange(n)[None]
            keys[:, :, :SINKS] *= 1000
            keys = SHAPE.rope.rotate(keys, positions[:, None])
            look(SHAPE, AttentionCall(keys, keys, values, None, positions, 0.5, None, 0))


def made(method):
    tensors = method.calibrate(Session())
    return tensors, method.store(SHAPE, Group((0, 1)), tensors, DenseStore)


def turned(vector, by):
    """RoPE of one head by its definition."""
    out, half = list(vector), len(vector) // 2
    for f, w in enumerate(SHAPE.rope.inv_freq.tolist()):
        c, s = math.cos(by * w), math.sin(by * w)
        out[f], out[f + half] = vector[f] * c - vector[f + half] * s, vector[f] * s + vector[f + half] * c
    return out


def joint_rows(part):
    """All calibration tokens but the sinks, float64 [n, G·D]."""
    rows = torch.cat([tokens(n, seed + (part == "value"))[0, :, SINKS:] for seed, n in ((0, 120), (10, 90))], 1)
    return rows.transpose(0, 1).flatten(1).double()


def slow(row, part, bits):
    """What becomes of one token's joint vector, from the calibration's rows alone."""
    rows = joint_rows(part)
    mean = rows.mean(0)
    energy, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    energy, vectors = energy.flip(0), vectors.flip(1)
    groups = [energy[:8].mean().item(), energy[8:].mean().item()]
    widths = [w for w in allot(groups, round(bits * 2)) for _ in range(8)]
    kept = [c for c in range(G * D) if widths[c]]
    z = [((row - mean) @ vectors[:, c] / energy[c].sqrt()).item() for c in kept]
    size = 2 ** (round(math.log2(math.sqrt(sum(v * v for v in z) / len(z))) * 4) / 4)
    out = mean.clone()
    for c, v in zip(kept, z, strict=True):
        level = min(lloyd(widths[c]).tolist(), key=lambda x: abs(x - v / size))
        out += level * size * energy[c].sqrt() * vectors[:, c]
    return out


@pytest.mark.parametrize(("key_bits", "value_bits"), [(2.0, 3.0), (1.0, 1.5), (4.0, 0.5)])
def test_what_is_read_is_what_the_formula_says(key_bits, value_bits):
    _, new = made(Kvtc(key_bits=key_bits, value_bits=value_bits, sinks=SINKS))
    store, places = new(), torch.tensor([[[4, 9, 70]]])
    keys, values = tokens(3, 50), tokens(3, 51)
    store.append(SHAPE.rope.rotate(keys, places), values, places)
    read = store.read()
    for t, place in enumerate(places[0, 0].tolist()):
        wanted = slow(keys[0, :, t].flatten().double(), "key", key_bits).unflatten(0, (G, D)).tolist()
        for g in range(G):
            assert read[0][0, g, t].tolist() == pytest.approx(turned(wanted[g], place), abs=2e-3)
        wanted = slow(values[0, :, t].flatten().double(), "value", value_bits)
        assert read[1][0, :, t].flatten().tolist() == pytest.approx(wanted.tolist(), abs=2e-3)


def test_more_bits_are_closer_and_beat_equal_bits():
    x, errors = tokens(400, 60), []
    for bits in (0.5, 1.0, 2.0, 3.0, 4.0):
        store = made(Kvtc(bits=bits, sinks=SINKS))[1]()
        store.append(x, x, torch.zeros(1, 1, 400, dtype=torch.int64))
        errors.append((store.read()[1] - x).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    variance = (joint_rows("value").var(0).mean()).item()
    assert errors[2] < 0.1175 / 2 * variance  # 2 bits a number, without a transform: Max, 1960


def test_the_outline_takes_the_bytes_of_what_is_calibrated():
    for bits in (0.5, 1.0, 1.7, 2.0, 3.4, 4.0):
        method = Kvtc(bits=bits, sinks=SINKS)
        sizes = []
        for tensors in (method.calibrate(Session()), method.outline((SHAPE,))):
            store = method.store(SHAPE, Group((0, 1)), tensors, DenseStore)()
            store.append(tokens(5, 1), tokens(5, 2), torch.arange(5)[None, None])
            sizes.append(sum(t.untyped_storage().nbytes() for t in store.tensors()))
        codes = 2 * round(bits * 2)  # bytes: 8 channels a group, keys and values
        assert sizes[0] == sizes[1] == 5 * (codes + 2 + 4)


def test_a_policy_with_four_bits_is_nearly_exact(llama):
    text = torch.randint(97, (3, 96), generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (1, 2, 4):
        policy = Policy.make([f"kvtc:bits={bits},window=8,interval=8"], llama, text)
        cache = policy.new_cache(llama)
        with torch.no_grad():
            llama(input_ids=text[:1, :64], past_key_values=cache)
            held = cache.nbytes()
            logits = llama(input_ids=text[:1, 64:], past_key_values=cache).logits
            errors.append((logits - llama(input_ids=text[:1]).logits[:, 64:]).square().mean().item())
        assert held == policy.plan(64).bytes == policy.outlined().plan(64).bytes
    assert errors == sorted(errors, reverse=True)


def test_it_goes_with_eviction(llama):
    text = torch.randint(97, (3, 96), generator=torch.Generator().manual_seed(0))
    policy = Policy.make(["snapkv:ratio=0.5,window=8", "kvtc:bits=2,window=8"], llama, text)
    cache = policy.new_cache(llama)
    out = llama.generate(input_ids=text[:2, :60], past_key_values=cache, max_new_tokens=40, do_sample=False)
    assert out.shape == (2, 100)
    assert all(len(g) <= 64 for layer in cache.policy_layers for g in layer.groups)


def test_it_refuses_divided_heads():
    with pytest.raises(UsageError, match="divides"):
        Kvtc().store(SHAPE, Group((0,)), Kvtc().outline((SHAPE,)), DenseStore)


def test_it_refuses_a_model_without_rope():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=64))
    with pytest.raises(UsageError, match="RoPE"):
        Policy.make(["kvtc"], model, torch.zeros(1, 32, dtype=torch.int64))


@pytest.mark.parametrize(
    "options", [{"bits": 0.0}, {"bits": 4.5}, {"key_bits": 5.0}, {"value_bits": -1.0}, {"sinks": -1}, {"interval": 0}]
)
def test_bad_options(options):
    with pytest.raises(UsageError):
        build("kvtc", options)
