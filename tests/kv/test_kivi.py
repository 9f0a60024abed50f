"""KIVI: its layouts in plain loops, and what a cache under it holds and says."""

import math

import pytest
import torch

from tcw.errors import UsageError
from tcw.kv import Group, LayerShape
from tcw.kv.kivi import Kivi
from tcw.kv.policy import Policy
from tcw.kv.stores import DenseStore, Store
from tcw.kv.stores.float8 import Float8Store
from tcw.methods import build

from .conftest import text

LAYER = LayerShape(0, 0, 1, 4, 2, 16, 16, torch.float32)
GROUP = Group((0, 1))


def store_of(**options) -> Store:
    made = Kivi(**options).store(LAYER, GROUP, {}, DenseStore)
    assert made is not None
    return made()


def drawn(m: int, seed: int) -> torch.Tensor:
    return torch.randn(1, 2, m, 16, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def appended(store: Store, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = drawn(m, 1), drawn(m, 2)
    store.append(keys, values, torch.arange(m)[None, None])
    return keys, values


@pytest.mark.parametrize(("key_bits", "value_bits"), [(2, 2), (4, 3), (8, 1)])
def test_paper_formula(key_bits: int, value_bits: int) -> None:
    """Steps of the paper, but for bfloat16: half a step and a hundredth of the range."""
    store = store_of(key_bits=key_bits, value_bits=value_bits, group_size=8)
    keys, values = appended(store, 20)
    found_keys, found_values = store.read()
    for g in range(2):
        for t0 in range(0, 20, 8):
            for d in range(16):
                group = keys[0, g, t0 : t0 + 8, d]
                step = (group.max() - group.min()) / (2**key_bits - 1)
                slack = group.abs().max() * 0.01
                assert (found_keys[0, g, t0 : t0 + 8, d] - group).abs().max() <= step / 2 + slack
        for t in range(20):
            for d0 in (0, 8):
                group = values[0, g, t, d0 : d0 + 8]
                step = (group.max() - group.min()) / (2**value_bits - 1)
                slack = group.abs().max() * 0.01
                assert (found_values[0, g, t, d0 : d0 + 8] - group).abs().max() <= step / 2 + slack


def test_cst_formula() -> None:
    store = store_of(bits=4, layout="cst")
    keys, _ = appended(store, 12)
    found = store.read()[0]
    c = keys.abs().amax(2, keepdim=True).sqrt()
    for g in range(2):
        for t in range(12):
            token = keys[0, g, t] / c[0, g, 0]
            step = (token.max() - token.min()) / 15
            slack = token.abs().max() * 0.02
            assert (((found[0, g, t] - keys[0, g, t]) / c[0, g, 0]).abs() <= step / 2 + slack).all()


@pytest.mark.parametrize(
    "spec", ["kivi", "kivi:bits=2", "kivi:bits=3,layout=cst", "kivi:dtype=fp8", "kivi:group_size=7"]
)
def test_a_cache_holds_what_the_plan_says(llama, spec: str) -> None:
    policy = Policy.make([spec], llama)
    cache = policy.new_cache(llama)
    llama(text(100), past_key_values=cache)
    assert cache.nbytes() == policy.plan(context=100, dtype=torch.float32).bytes
    for step in range(40):
        llama(text(1, seed=step), past_key_values=cache)
    assert cache.get_seq_length() == 140


def test_bytes_by_the_formula(llama) -> None:
    """b + 32 / group_size bits a number; 96 of 100 tokens would fill groups, 64 leave the window."""
    policy = Policy.make(["kivi:bits=4"], llama)
    cache = policy.new_cache(llama)
    llama(text(100), past_key_values=cache)
    store = cache.layers[0].groups[0].store
    heads, dim = 2, 16
    groups = math.ceil(dim / 32)
    codes = 2 * heads * 64 * dim * 4 // 8
    scales = heads * (2 * dim * 4 + 64 * groups * 4)
    assert sum(t.untyped_storage().nbytes() for t in store.tensors()) == codes + scales


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 8, "layout": "cst"}, {"dtype": "fp8"}])
def test_wide_codes_say_nearly_the_same(llama, options: dict) -> None:
    tokens = text(96)
    exact = llama(tokens).logits[:, 64:]
    cache = Policy.make([Kivi(window=8, **options)], llama).new_cache(llama)
    llama(tokens[:, :64], past_key_values=cache)
    found = llama(tokens[:, 64:], past_key_values=cache).logits
    assert (found - exact).abs().mean() < 0.1 * exact.std()
    assert (found - exact).abs().max() > 0


def test_more_bits_err_less(llama) -> None:
    tokens = text(96)
    exact = llama(tokens).logits[:, 64:]
    errors = []
    for bits in (1, 2, 4, 8):
        cache = Policy.make([Kivi(bits=bits, window=8)], llama).new_cache(llama)
        llama(tokens[:, :64], past_key_values=cache)
        errors.append((llama(tokens[:, 64:], past_key_values=cache).logits - exact).square().mean().item())
    assert errors == sorted(errors, reverse=True)


def test_local_heads_may_have_other_bits() -> None:
    made = Kivi(bits=4, value_bits=3, local_bits=2)
    assert made.widths(Group((0,))) == (4, 3)
    assert made.widths(Group((0,), lambda seen: seen // 2)) == (2, 2)
    assert Kivi(bits=4).widths(Group((0,), lambda seen: seen // 2)) == (4, 4)


def test_options() -> None:
    assert isinstance(store_of(dtype="fp8"), Float8Store)
    assert Kivi(bits=2, key_bits=4).widths(GROUP) == (4, 2)
    assert store_of(group_size=24).block == 24
    for wrong in (
        {"group_size": 0},
        {"window": -1},
        {"interval": 0},
        {"bits": 5},
        {"layout": "rows"},
        {"dtype": "fp4"},
    ):
        with pytest.raises(UsageError):
            build("kivi", wrong)


@pytest.mark.parametrize("group_size", [5, 16, 24, 64])
def test_heads_that_groups_do_not_divide(group_size: int) -> None:
    store = store_of(bits=8, group_size=group_size)
    keys, values = appended(store, 70)
    for found, exact in zip(store.read(), (keys, values), strict=True):
        assert (found - exact).abs().max() < 0.05
