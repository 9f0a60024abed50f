"""What every method that forgets tokens must do, on a tiny model: hold what it promises, answer as it would alone."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from tcw.kv._evict import Evicting
from tcw.kv.policy import Policy
from tcw.methods import get, names

METHODS = [name for name in names("kv") if issubclass(get(name), Evicting)]
WORDS, LAYERS = 400, 3
CALIBRATE = [name for name in METHODS if get(name).needs_calibration] + ["pyramidkv:score=triattention"]
LOOKS_AT_THE_BATCH = {
    "zipvl",  # the sequence that needs most decides how many tokens stay
    "lacache",  # blocks are counted over the whole width
}


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=128, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "norm" not in name:
                parameter.mul_(5)  # else attention is all but even
    return made


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, WORDS, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def policy(model):
    """Calibrated once for each specification."""
    return functools.cache(lambda spec: Policy.make(spec, model, tokens=text(160, seed=9)))


def left_padded(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(t.shape[1] for t in texts)
    pads = [longest - t.shape[1] for t in texts]
    tokens = torch.cat([torch.nn.functional.pad(t, (pad, 0)) for t, pad in zip(texts, pads, strict=True)])
    return tokens, torch.stack([(torch.arange(longest) >= pad).long() for pad in pads])


@torch.no_grad()
def continued(model, cache, tokens: Tensor, after: Tensor, mask: Tensor) -> Tensor:
    """Logits of the last token of a prompt and of those after it, given one at a time: [B, 1 + steps, words]."""
    logits = [model(tokens, attention_mask=mask, position_ids=places(mask), past_key_values=cache).logits[:, -1]]
    for step in range(after.shape[1]):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        one = {"attention_mask": mask, "position_ids": places(mask)[:, -1:], "past_key_values": cache}
        logits.append(model(after[:, step : step + 1], **one).logits[:, -1])
    return torch.stack(logits, 1)


def places(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def generated(model, cache, tokens: Tensor, mask: Tensor, steps: int) -> Tensor:
    return model.generate(
        tokens, attention_mask=mask, past_key_values=cache, max_new_tokens=steps, do_sample=False, pad_token_id=0
    )


@pytest.mark.parametrize("name", METHODS)
def test_holds_about_half(name: str, model, policy) -> None:
    made = policy(f"{name}:ratio=0.5")
    cache = made.new_cache(model)
    with torch.no_grad():
        model(text(100), past_key_values=cache)
    dense = LAYERS * 100 * 2 * 2 * 64 * 4
    assert cache.get_seq_length() == 100
    plan = made.plan(context=100)
    assert cache.nbytes() <= 0.6 * dense
    if not plan.bounded:
        assert cache.nbytes() == plan.bytes
        assert cache.nbytes() >= 0.45 * dense


@pytest.mark.parametrize("name", METHODS)
def test_generates(name: str, model, policy) -> None:
    """Long enough to forget while generating; a budget of tokens then holds."""
    made = policy(f"{name}:tokens=60,interval=8,window=16")
    cache = made.new_cache(model)
    found = generated(model, cache, text(70), torch.ones(1, 70, dtype=torch.int64), steps=30)
    assert found.shape == (1, 100)
    assert cache.get_seq_length() == 99
    for layer in cache.layers:
        held = [len(group) * len(group.parts.group.heads) for group in layer.groups]
        assert sum(held) <= 99 * 2
    mean = sum(len(g) * len(g.parts.group.heads) for layer in cache.layers for g in layer.groups) / (2 * LAYERS)
    assert mean <= 60 + 8 + 1


@pytest.mark.parametrize("name", METHODS)
def test_left_padding(name: str, model, policy) -> None:
    """Each sequence of a batch goes on as it does alone. No token comes twice, or norms of keys would be equal."""
    made = policy(f"{name}:ratio=0.5,interval=8,window=16")
    words = torch.randperm(WORDS - 1, generator=torch.Generator().manual_seed(1))[None] + 1
    texts, after = list(words[:, :120].split([90, 30], 1)), words[:, 120:152].reshape(2, 16)
    tokens, mask = left_padded(texts)
    together = continued(model, made.new_cache(model), tokens, after, mask)
    assert torch.isfinite(together).all()
    if name in LOOKS_AT_THE_BATCH:
        return
    for row, alone in enumerate(texts):
        single = continued(model, made.new_cache(model), alone, after[row : row + 1], torch.ones_like(alone))
        torch.testing.assert_close(together[row], single[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_generates_a_padded_batch(name: str, model, policy) -> None:
    made = policy(f"{name}:ratio=0.5,interval=8,window=16")
    tokens, mask = left_padded([text(60, seed=1), text(41, seed=2)])
    assert generated(model, made.new_cache(model), tokens, mask, steps=10).shape == (2, 70)


@pytest.mark.parametrize("name", METHODS)
def test_half_precision(name: str, model) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    made = Policy.make(f"{name}:ratio=0.5,interval=8,window=16", half, tokens=text(160, seed=9))
    tokens, mask = left_padded([text(60, seed=1), text(41, seed=2)])
    after = text(24, seed=3).reshape(2, 12)
    assert torch.isfinite(continued(half, made.new_cache(half), tokens, after, mask)).all()


@pytest.mark.parametrize("name", METHODS)
def test_more_text_after_forgetting(name: str, model, policy) -> None:
    """A further prompt of many tokens sees what is held, once: as if it came a token at a time."""
    made = policy(f"{name}:tokens=60,window=40,interval=40")
    caches = [made.new_cache(model) for _ in range(2)]
    more = text(12, seed=5)
    with torch.no_grad():
        for cache in caches:
            model(text(100), past_key_values=cache)
        at_once = model(more, past_key_values=caches[0]).logits
        singly = torch.cat([model(more[:, i : i + 1], past_key_values=caches[1]).logits for i in range(12)], 1)
    assert torch.isfinite(at_once).all()
    torch.testing.assert_close(at_once, singly, atol=1e-3, rtol=1e-3)
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 112


@pytest.mark.parametrize("spec", CALIBRATE)
def test_a_plan_before_calibration(spec: str, model, policy) -> None:
    """Tensors as calibration will leave them, and so the same plan."""
    made = policy(spec)
    blank = dataclasses.replace(made, tensors={})
    name = spec.partition(":")[0]
    assert set(made.tensors) == {name}
    measured = {k: (t.shape, t.dtype) for k, t in made.tensors[name].items()}
    assert measured == {k: (t.shape, t.dtype) for k, t in made.methods[name].outline(made.layers).items()}
    plan, before = made.plan(context=200), blank.plan(context=200)
    assert (plan.bytes, plan.shared_bytes) == (before.bytes, before.shared_bytes)


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_for_a_long_text(name: str, policy) -> None:
    """Takes no more than one for a short text: nothing is computed a block at a time."""
    plan = policy(f"{name}:ratio=0.25").plan(context=200_000)
    assert plan.context == 200_000
    assert plan.ratio < 0.35
