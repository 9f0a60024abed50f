import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tcw.errors import UsageError
from tcw.kv.policy import Policy
from tcw.methods import build


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
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
    return torch.randint(1, 64, (2, 60), generator=torch.Generator().manual_seed(0))


def second_call(model, cache, ids, mask=None, split=50):
    """Logits of the second of two calls."""
    with torch.no_grad():
        model(ids[:, :split], attention_mask=None if mask is None else mask[:, :split], past_key_values=cache)
        return model(ids[:, split:], attention_mask=mask, past_key_values=cache).logits


def keys_and_values(model, ids):
    """What the one layer computes of each token before RoPE: queries, keys and values [heads, n, 8], float64."""
    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(ids))
        projected = [p(x) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)]
    return [p[0].unflatten(-1, (-1, 8)).transpose(0, 1).double() for p in projected]


def rotated(vector, position):
    out = vector.clone()
    for f in range(4):
        angle = position * 10000.0 ** (-f / 4)
        c, s = math.cos(angle), math.sin(angle)
        out[f], out[f + 4] = vector[f] * c - vector[f + 4] * s, vector[f] * s + vector[f + 4] * c
    return out


def attention_by_loops(model, ids, sinks, chunk, window, split, count_bias):
    """Attention output [4, n - split, 8] of a second call over sinks, slots, window and itself, one query at a time."""
    queries, keys, values = keys_and_values(model, ids)
    n = ids.shape[1]
    pooled = (split - sinks - window) // chunk * chunk
    outs = torch.zeros(4, n - split, 8, dtype=torch.float64)
    for h in range(4):
        k, v = keys[h // 2], values[h // 2]
        held = [(rotated(k[j], j), v[j], 0.0, 0) for j in range(sinks)]
        for start in range(sinks, sinks + pooled, chunk):
            centre, bias = (2 * start + chunk - 1) // 2, math.log(chunk) if count_bias else 0.0
            held.append((rotated(k[start : start + chunk].mean(0), centre), v[start : start + chunk].mean(0), bias, 0))
        held += [(rotated(k[j], j), v[j], 0.0, j) for j in range(sinks + pooled, n)]
        for i in range(split, n):
            seen = [t for t in held if t[3] <= i]
            logits = torch.stack([rotated(queries[h, i], i) @ t[0] / 8**0.5 + t[2] for t in seen])
            outs[h, i - split] = logits.softmax(0) @ torch.stack([t[1] for t in seen])
    return outs


@pytest.mark.parametrize("count_bias", [True, False])
@pytest.mark.parametrize(("chunk", "sinks", "window"), [(4, 2, 8), (3, 0, 10), (16, 4, 12)])
def test_attends_to_means_of_chunks(llama, text, chunk, sinks, window, count_bias):
    onoff = "on" if count_bias else "off"
    policy = Policy.make(f"pooled-memory:chunk={chunk},sinks={sinks},window={window},count_bias={onoff}", llama)
    seen = []
    hook = llama.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    second_call(llama, policy.new_cache(llama), text[:1])
    hook.remove()
    wanted = attention_by_loops(llama, text[:1], sinks, chunk, window, 50, count_bias)
    torch.testing.assert_close(seen[1][0].unflatten(-1, (4, 8)).transpose(0, 1).double(), wanted, atol=1e-4, rtol=1e-4)


def test_a_text_within_the_window_is_exact(llama, text):
    policy = Policy.make("pooled-memory:chunk=16", llama)
    got = second_call(llama, policy.new_cache(llama), text)
    torch.testing.assert_close(got, llama(text).logits[:, 50:].detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", ["chunk=4,window=12", "chunk=4,window=12,top=2", "chunk=4,window=12,count_bias=off"]
)
def test_padding_changes_nothing(llama, text, options):
    """Also where chunks do not begin with the text: padding moves the first token by 8, two whole chunks."""
    policy = Policy.make(f"pooled-memory:{options}", llama)
    alone = second_call(llama, policy.new_cache(llama), text[:1, 8:], split=42)
    mask = torch.ones_like(text)
    mask[0, :8] = 0
    together = second_call(llama, policy.new_cache(llama), torch.where(mask.bool(), text, 0), mask)
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(together).all()


def test_few_slots_see_less(llama, text):
    """`top` beyond the number of slots is all of them; fewer is something else."""
    all_slots, many, few = (
        second_call(llama, Policy.make(f"pooled-memory:chunk=4,window=12,top={top}", llama).new_cache(llama), text)
        for top in (0, 99, 1)
    )
    assert torch.equal(all_slots, many)
    assert not torch.allclose(all_slots, few, atol=1e-3)


@pytest.mark.parametrize("other", [[], ["snapkv:ratio=0.6,window=12,interval=1"]])
def test_holds_what_was_planned(llama, text, other):
    policy = Policy.make(["pooled-memory:chunk=4,window=12,interval=1", *other], llama)
    cache = policy.new_cache(llama)
    with torch.no_grad():
        llama(text, past_key_values=cache)
    plan = policy.plan(60, batch=2)
    assert cache.nbytes() == plan.bytes < plan.dense_bytes / 2
    with torch.no_grad():
        for _ in range(9):
            llama(text[:, :1], past_key_values=cache)
    assert cache.nbytes() < plan.bytes * 1.3


def test_generates_and_beams(llama, text):
    policy = Policy.make("pooled-memory:chunk=4,window=12", llama)
    ones = torch.ones_like(text)
    for beams in (1, 3):
        cache = policy.new_cache(llama)
        out = llama.generate(text, attention_mask=ones, past_key_values=cache, max_new_tokens=30, num_beams=beams)
        assert out.shape == (2, 90)


@pytest.mark.parametrize("options", [{"chunk": 1}, {"top": -1}, {"sinks": -1}, {"window": 0}, {"interval": 0}])
def test_refuses_options(options):
    with pytest.raises(UsageError):
        build("pooled-memory", options)


def test_refuses_a_model_without_rope():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=128))
    with pytest.raises(UsageError, match="no RoPE"):
        Policy.make("pooled-memory", gpt2)
