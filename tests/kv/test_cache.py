"""The engine: it changes nothing while it forgets nothing, and what it forgets is as if it had been masked."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tcw.errors import TcwError, UsageError
from tcw.kv.cache import nbytes
from tcw.kv.policy import Policy
from tests.kv.conftest import text

EVICTS = ("knorm:tokens=48,sinks=4,window=16,interval=8", "razorattention:ratio=0.4,compensation=off")


@torch.no_grad()
def said(model, cache, *chunks: Tensor, **kwargs) -> list[Tensor]:
    return [model(chunk, past_key_values=cache, **kwargs).logits for chunk in chunks]


def test_bit_identical_while_nothing_is_forgotten(any_model):
    chunks = text(120), text(7, seed=1), *(text(1, seed=i) for i in range(40))
    full = said(any_model, DynamicCache(config=any_model.config), *chunks)
    policy = Policy.make("knorm", any_model).everything()
    held = said(any_model, policy.new_cache(any_model), *chunks)
    assert all(torch.equal(a, b) for a, b in zip(full, held, strict=True))


def test_bit_identical_behind_padding_while_nothing_is_forgotten(any_model):
    tokens, mask = text(90, rows=2), torch.ones(2, 90, dtype=torch.long)
    tokens[1, :13], mask[1, :13] = 0, 0
    arguments = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "output_logits": True}
    full = any_model.generate(tokens, return_dict_in_generate=True, **arguments)
    cache = Policy.make("knorm", any_model).everything().new_cache(any_model)
    held = any_model.generate(tokens, return_dict_in_generate=True, past_key_values=cache, **arguments)
    assert torch.equal(full.sequences, held.sequences)
    gap = max(float((a - b).abs().max()) for a, b in zip(full.logits, held.logits, strict=True))
    assert gap < 1e-4  # sinks and padding change places, and with them the order of sums


def masked(model, prefix: Tensor, chunk: Tensor, kept: list) -> Tensor:
    """Logits of `chunk` where each head sees of the prefix only what was kept: by a mask, nothing is forgotten."""
    length, new = prefix.shape[1], chunk.shape[1]
    masks = []
    for groups in kept:
        heads = max(h for group, _ in groups for h in group) + 1
        seen = torch.zeros(1, heads, new, length + new, dtype=torch.bool)
        for group, positions in groups:
            places = positions.long().expand(1, len(group), -1)[:, :, None].expand(-1, -1, new, -1)
            seen[:, list(group)] = torch.zeros_like(seen[:, list(group)]).scatter(3, places, True)
        seen[..., length:] = torch.tril(torch.ones(new, new)).bool()
        masks.append(seen)
    todo = iter(masks)

    def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **kwargs):
        full = key.shape[2] == length + new and getattr(module, "sliding_window", None) is None
        ratio = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(ratio, 1), value.repeat_interleave(ratio, 1)
        logits = query.double() @ keys.double().transpose(2, 3) * scaling
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        if full:
            logits = logits.masked_fill(~next(todo).repeat_interleave(ratio, 1), -torch.inf)
        else:
            logits = logits + attention_mask.double()
        out = logits.softmax(-1) @ values.double()
        return out.transpose(1, 2).to(query.dtype), None

    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    cache = DynamicCache(config=model.config)
    said(model, cache, prefix)
    before = model.config._attn_implementation
    AttentionInterface.register("slow_reference", attend)
    AttentionMaskInterface.register("slow_reference", eager_mask)
    model.set_attn_implementation("slow_reference")
    try:
        return said(model, cache, chunk)[0]
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("spec", EVICTS)
def test_forgetting_is_masking(any_model, spec):
    prefix, chunk = text(120), text(9, seed=1)
    policy = Policy.make(spec, any_model, tokens=text(60, seed=3))
    cache = policy.new_cache(any_model, track=True)
    said(any_model, cache, prefix)
    kept = cache.kept()
    assert min(len(p[0, 0]) for groups in kept for _, p in groups) < 60, "nothing was forgotten"
    found = said(any_model, cache, chunk)[0]
    expected = masked(any_model, prefix, chunk, kept)
    assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


def test_every_group_keeps_what_it_may(llama):
    policy = Policy.make("knorm:tokens=48,sinks=4,window=16,interval=8", llama)
    cache = policy.new_cache(llama, track=True)
    said(llama, cache, text(120))
    for ((_, positions),) in cache.kept():
        assert positions.shape == (1, 2, 48)
        assert positions[..., :4].tolist() == [[[0, 1, 2, 3]] * 2]
        assert positions[..., -16:].tolist() == [[list(range(104, 120))] * 2]
        assert bool((positions.diff(dim=-1) > 0).all())
    for step in range(30):
        said(llama, cache, text(1, seed=step))
        assert all(48 <= len(layer.groups[0]) < 48 + 8 for layer in cache.policy_layers)
    assert cache.get_seq_length() == 150


def test_chunks_and_turns(llama):
    """A prompt in pieces, then another turn: lengths stay logical, budgets hold after each."""
    policy = Policy.make("knorm:tokens=48,window=16", llama)
    prompt = text(150)
    whole = llama.generate(prompt, max_new_tokens=4, do_sample=False, past_key_values=policy.new_cache(llama))
    cache = policy.new_cache(llama)
    pieces = llama.generate(
        prompt, max_new_tokens=4, do_sample=False, past_key_values=cache, prefill_chunk_size=40,
    )  # fmt: skip
    assert pieces.shape == whole.shape
    assert all(len(layer.groups[0]) <= 48 + 32 for layer in cache.policy_layers)
    longer = torch.cat([pieces, text(20, seed=5)], 1)
    again = llama.generate(longer, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert again.shape[1] == longer.shape[1] + 4
    assert cache.get_seq_length() == again.shape[1] - 1


def test_beams_follow_their_tokens(llama):
    policy = Policy.make("h2o:tokens=48,window=16,interval=4", llama)
    cache = policy.new_cache(llama)
    first = text(80, rows=2)
    said(llama, cache, first)
    swapped = copy.deepcopy(cache)
    swapped.reorder_cache(torch.tensor([1, 0]))
    next_tokens = text(6, seed=2, rows=2)
    straight = said(llama, cache, next_tokens)[0]
    crossed = said(llama, swapped, next_tokens.flip(0))[0]
    assert torch.equal(straight, crossed.flip(0))
    repeated = policy.new_cache(llama)
    said(llama, repeated, first[:1])
    repeated.batch_repeat_interleave(3)
    assert said(llama, repeated, next_tokens[:1].expand(3, -1))[0].shape[0] == 3
    llama.generate(first, num_beams=3, max_new_tokens=12, do_sample=False, past_key_values=policy.new_cache(llama))


def test_bytes_are_those_of_storages(llama):
    policy = Policy.make("knorm:ratio=0.25", llama)
    cache = policy.new_cache(llama)
    said(llama, cache, text(200))
    tensors = [t for layer in cache.policy_layers for t in layer.tensors()]
    assert cache.nbytes() == sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )
    assert cache.nbytes() == sum(t.nbytes for t in tensors), "a view keeps a larger storage alive"
    full = 2 * 4 * 2 * 200 * 16 * 4
    assert 0.25 <= cache.nbytes() / full < 0.26
    assert nbytes([tensors[0], tensors[0][:1]]) == tensors[0].nbytes


def test_fused_projections_do_not_stay_alive(architecture):
    model = architecture("GPTNeoX")  # its keys are a view of queries, keys and values together
    cache = Policy.make("knorm", model).everything().new_cache(model)
    said(model, cache, text(20))
    assert cache.nbytes() < 1.02 * 2 * 4 * 4 * 20 * 16 * 4


def test_a_short_text_is_left_alone(llama):
    policy = Policy.make("knorm:ratio=0.1,window=32", llama)
    chunks = text(20), *(text(1, seed=i) for i in range(10))
    full = said(llama, DynamicCache(config=llama.config), *chunks)
    held = said(llama, policy.new_cache(llama), *chunks)
    assert all(torch.equal(a, b) for a, b in zip(full, held, strict=True))


def test_reset(llama):
    policy = Policy.make("knorm:ratio=0.5", llama)
    cache = policy.new_cache(llama)
    first = said(llama, cache, text(100))[0]
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes()) == (0, 0)
    assert torch.equal(said(llama, cache, text(100))[0], first)


def test_half_precision(llama):
    model = copy.deepcopy(llama).to(torch.bfloat16)
    policy = Policy.make("knorm:ratio=0.5", model)
    cache = policy.new_cache(model)
    logits = said(model, cache, text(100), text(5, seed=1))
    assert all(bool(t.isfinite().all()) for t in logits)
    assert cache.nbytes() == pytest.approx(0.5 * 2 * 4 * 2 * 105 * 16 * 2, rel=0.05)


def test_what_cannot_be_is_refused(llama):
    cache = Policy.make("knorm:ratio=0.5", llama).new_cache(llama)
    said(llama, cache, text(100))
    for call in (lambda: cache.crop(-1), cache.activate_past_recording, lambda: cache.layers[0].offload()):
        with pytest.raises(UsageError, match="KV policy"):
            call()
    assert not cache.is_croppable
    with pytest.raises(UsageError, match="mask"):
        said(llama, cache, text(2), attention_mask=torch.ones(1, 1, 2, 5, dtype=torch.bool))


def test_a_model_that_goes_round_our_attention_is_refused(llama):
    cache = Policy.make("knorm:ratio=0.5", llama).new_cache(llama)
    before = llama.config._attn_implementation
    llama.set_attn_implementation("sdpa")
    try:
        said(llama, cache, text(40))
        with pytest.raises(TcwError, match="does not pass its keys"):
            said(llama, cache, text(4))
    finally:
        llama.set_attn_implementation(before)


def test_other_caches_are_not_touched(llama):
    plain = copy.deepcopy(llama)
    plain.set_attn_implementation("sdpa")
    Policy.make("knorm", llama).new_cache(llama)
    assert torch.equal(llama(text(50)).logits, plain(text(50)).logits)
    prompt = text(50)
    for implementation in ("dynamic", "static"):
        arguments = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": implementation}
        assert torch.equal(llama.generate(prompt, **arguments), plain.generate(prompt, **arguments))


def test_a_model_that_sees(llama):
    """In a model with a vision tower only the text decoder is under the policy."""
    import transformers

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=28, patch_size=7, **vision),
        text_config=llama.config.to_dict(), image_token_id=90, image_token_index=90,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tokens = text(80).clamp(max=89)
    tokens[0, 5:21] = 90
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 28, 28)}
    policy = Policy.make("knorm:ratio=0.5", model)
    full = model(**inputs, past_key_values=DynamicCache(config=config)).logits
    assert torch.equal(model(**inputs, past_key_values=policy.everything().new_cache(model)).logits, full)
    cache = policy.new_cache(model)
    model.generate(**inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert [len(layer.groups[0]) for layer in cache.policy_layers] == [43] * 4
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_the_packed_store_is_read_in_place_when_nobody_looks(llama, monkeypatch):
    """Where the kernel may serve, it gets every call that no scorer looks at, and the answer is the same."""
    from tcw.kv import fused, groups

    policy = Policy.make("kivi:bits=4,group_size=16", llama)
    tokens = text(100)
    expected = said(llama, policy.new_cache(llama), tokens, *(text(1, seed=i) for i in range(20)))
    calls = []

    def kernel(query, sinks, store, window, scaling, real):
        calls.append(len(store))
        parts = [fused.dense_part(query, *side, scaling, None) for side in (store.read(), window)]
        return fused.merge(parts)[0].to(query.dtype).transpose(1, 2)

    monkeypatch.setattr(groups.HeadGroup, "_on_gpu", staticmethod(lambda query: True))
    monkeypatch.setattr(fused, "can_fuse", lambda store, query, softcap: True)
    monkeypatch.setattr(fused, "attention", kernel)
    found = said(llama, policy.new_cache(llama), tokens, *(text(1, seed=i) for i in range(20)))
    assert len(calls) >= 4 * 18
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(expected, found, strict=True))
