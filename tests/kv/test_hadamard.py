"""The Hadamard format: its formula with plain matrices, and what a cache under it holds and says."""

import pytest
import torch

from tcw.errors import UsageError
from tcw.kv import Group, LayerShape
from tcw.kv.hadamard import Hadamard
from tcw.kv.kivi import Kivi
from tcw.kv.policy import Policy
from tcw.kv.rope import Rope
from tcw.kv.stores import DenseStore, Store
from tcw.methods import build

from .conftest import text

D = 16
ROPE = Rope(1 / 100 ** (torch.arange(0, D, 2) / D))


def store_of(rope: Rope | None = ROPE, **options) -> Store:
    made = Hadamard(**options).store(
        LayerShape(0, 0, 1, 4, 2, D, D, torch.float32, rope), Group((0, 1)), {}, DenseStore
    )
    assert made is not None
    return made()


def drawn(m: int, seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, m, D, generator=made) + 3 * torch.randn(1, 2, 1, D, generator=made)


def drawn_sign(position: int, channel: int) -> int:
    """+1 or -1, D = 16: one word of 16 signs a position."""
    mixed = (position % 2**16 - 2**15) % 2**32
    for factor in (0x21F0AAAD, 0x735A2D97):
        mixed %= 2**32
        mixed = (mixed ^ (mixed >> 15)) * factor
    return -1 if mixed >> (16 + channel) & 1 else 1


def slowly(x: torch.Tensor, bits: int, turned: torch.Tensor, first: int, centred: bool) -> torch.Tensor:
    """x̂ of tokens x [m, D] of a head from position `first` on, float64; `turned` [m, D, D] is each token's Rᵀ."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < D:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    matrix /= D**0.5
    sign = torch.tensor([[drawn_sign(first + t, d) for d in range(D)] for t in range(len(x))], dtype=torch.float64)
    before = torch.einsum("tij,tj->ti", turned, x)
    centre = before.mean(0) * centred
    spread = (before - centre).square().mean(0).sqrt()
    c = spread.clamp_min(spread.mean() / 16).sqrt()
    y = (before - centre) / c * sign @ matrix
    rounded, middle = torch.empty_like(y), (2**bits - 1) / 2
    for t in range(len(y)):
        best = None
        for step in (2 * y[t].abs().max() / (2**bits - 1) * 2 ** (k / 64) for k in range(8 * (bits - 8), 9)):
            guess = step * ((y[t] / step + middle).round().clamp(0, 2**bits - 1) - middle)
            if best is None or (guess - y[t]).square().sum() < (best - y[t]).square().sum():
                best = guess
        rounded[t] = best
    return torch.einsum("tij,ti->tj", turned, rounded @ matrix * sign * c + centre)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("unrotate", [True, False])
def test_formula(bits: int, unrotate: bool) -> None:
    """Steps an eighth of an octave apart and bfloat16 μ, c err hardly more than the best step of any size."""
    store = store_of(bits=bits, unrotate=unrotate)
    keys, values = drawn(30, 1), drawn(30, 2)
    at = torch.arange(5, 35)
    store.append(keys, values, at[None, None])
    eye = torch.eye(D).expand(30, D, D)
    turned = ROPE.turn(eye, -at[:, None].expand(30, D)).double().transpose(1, 2) if unrotate else eye.double()
    for found, x, turn, centred in (
        (store.read()[0], keys, turned, True), (store.read()[1], values, eye.double(), False),
    ):  # fmt: skip
        for g in range(2):
            best = slowly(x[0, g].double(), bits, turn, 5, centred)
            error = (best - x[0, g]).square().mean().sqrt().item()
            assert (found[0, g] - x[0, g]).square().mean().sqrt() == pytest.approx(error, rel=0.08)
            assert (found[0, g] - best).square().mean().sqrt() < error


def test_like_tokens_have_unlike_errors() -> None:
    """What attention sums over many equal tokens errs less than they do."""
    store = store_of(bits=2)
    values = drawn(1, 3).expand(-1, -1, 400, -1).contiguous()
    store.append(values, values, torch.arange(400)[None, None])
    error = store.read()[1] - values
    assert error.mean(2).square().mean() < error.square().mean() / 5


@pytest.mark.parametrize("spec", ["hadamard", "hadamard:bits=2", "hadamard:key_bits=4,value_bits=3,unrotate=off"])
def test_a_cache_holds_what_the_plan_says(llama, spec: str) -> None:
    policy = Policy.make([spec], llama)
    cache = policy.new_cache(llama)
    llama(text(100), past_key_values=cache)
    assert cache.nbytes() == policy.plan(context=100, dtype=torch.float32).bytes
    for step in range(40):
        llama(text(1, seed=step), past_key_values=cache)
    assert cache.get_seq_length() == 140


def test_bytes_by_the_formula(llama) -> None:
    cache = Policy.make(["hadamard:bits=3"], llama).new_cache(llama)
    llama(text(100), past_key_values=cache)
    held, heads, dim = 100 - 4 - 32, 2, 16
    store = cache.layers[0].groups[0].store
    a_token = 2 * heads * (dim * 3 // 8 + 1) + 2
    assert sum(t.untyped_storage().nbytes() for t in store.tensors()) == held * a_token + heads * (3 * dim * 2 + 2 * 4)


def test_eviction_and_padding(llama) -> None:
    """A left-padded text is answered as it is alone: padding is neither measured nor seen."""
    policy = Policy.make(["snapkv:ratio=0.5", "hadamard:bits=8"], llama)
    short, long = text(60, 1), text(80, 2)
    padded = torch.cat([torch.cat([torch.zeros(1, 20, dtype=torch.long), short], 1), long])
    mask = (padded != 0).long()
    together = llama.generate(
        padded, attention_mask=mask, past_key_values=policy.new_cache(llama), max_new_tokens=8, do_sample=False
    )
    alone = llama.generate(short, past_key_values=policy.new_cache(llama), max_new_tokens=8, do_sample=False)
    assert together[0, -8:].tolist() == alone[0, -8:].tolist()


def test_beats_kivi_in_fewer_bytes_where_channels_have_offsets() -> None:
    """Keys around a centre that RoPE turns, as models have them."""
    made = torch.Generator().manual_seed(3)
    at = torch.arange(256)
    before = torch.randn(1, 2, 256, D, generator=made) + 4 * torch.randn(1, 2, 1, D, generator=made)
    keys = ROPE.rotate(before, at)
    sizes, errors = [], []
    for method in (Hadamard(bits=3), Kivi(bits=3, group_size=16)):
        layer = LayerShape(0, 0, 1, 4, 2, D, D, torch.float32, ROPE)
        new = method.store(layer, Group((0, 1)), {}, DenseStore)
        assert new is not None
        store = new()
        store.append(keys, before, at[None, None])
        sizes.append(sum(t.nbytes for t in store.tensors()))
        errors.append((store.read()[0] - keys).square().mean().item())
    assert sizes[0] < sizes[1]
    assert errors[0] < errors[1]


def test_local_heads_may_have_other_bits() -> None:
    made = Hadamard(bits=4, value_bits=3, local_bits=2)
    assert made.widths(Group((0,))) == (4, 3)
    assert made.widths(Group((0,), lambda seen: seen // 2)) == (2, 2)
    assert Hadamard(bits=4).widths(Group((0,), lambda seen: seen // 2)) == (4, 4)


def test_models_without_rope() -> None:
    store, keys, values = store_of(rope=None, bits=8), drawn(30, 1), drawn(30, 2)
    store.append(keys, values, torch.arange(30)[None, None])
    for found, exact in zip(store.read(), (keys, values), strict=True):
        assert (found - exact).abs().max() < 0.1


def test_options() -> None:
    assert Hadamard().widths(Group((0, 1))) == (3, 3)
    for wrong in ({"window": -1}, {"interval": 0}, {"bits": 5}, {"sinks": -1}):
        with pytest.raises(UsageError):
            build("hadamard", wrong)
