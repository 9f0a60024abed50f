"""Budgets against a search that tries every context, and activations against what a real forward pass holds."""

import weakref

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from tcw.profile.fits import HEADROOM, Budget, Forward, forward
from tcw.profile.kv import KVCache, LayerGroup

KV = KVCache((LayerGroup(2, 16), LayerGroup(3, 8, window=50)))


def _budget(free: int, batch: int = 1) -> Budget:
    return Budget(10_000, 500, KV, Forward(20, 300), free, batch)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("free", [0, 11_000, 12_000, 20_000, 60_000])
def test_longest_context_is_the_last_that_fits(free: int, batch: int) -> None:
    budget = _budget(free, batch)
    expected = 0
    for tokens in range(1, 1001):
        if budget.need(tokens) <= free * (1 - HEADROOM):
            expected = tokens
    assert budget.max_context(limit=1000) == expected
    assert not expected or budget.fits(expected)


def test_a_model_that_is_too_large_fits_at_no_context() -> None:
    assert _budget(9_000).max_context(100) == 0
    assert not _budget(9_000).fits(1)


def test_need_adds_up() -> None:
    kv = 2 * (2 * 16 * 70 + 3 * 8 * 49)
    assert _budget(0).need(70) == 10_000 + 500 + kv + 70 * 20 * 2 + 300
    assert _budget(0, batch=2).need(70) == 10_000 + 500 + 2 * (kv + 70 * 20 * 2 + 300)


class _Peak(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still alive, at the highest point; weights left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.alive: dict[int, int] = {p.untyped_storage()._cdata: 0 for p in model.parameters()}
        self.peak = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("shape", [
    {"hidden_size": 64, "intermediate_size": 256}, {"hidden_size": 128, "intermediate_size": 96},
])  # fmt: skip
def test_activations_are_of_the_right_size(shape: dict) -> None:
    config = transformers.LlamaConfig(
        vocab_size=100,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        attn_implementation="sdpa",
        **shape,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.arange(2 * 300).reshape(2, 300) % 90
    with torch.no_grad(), _Peak(model) as held:
        model(ids, use_cache=False, logits_to_keep=1)
    estimate = forward(config).bytes_at(300, batch=2)
    assert 0.85 < estimate / held.peak < 1.15
