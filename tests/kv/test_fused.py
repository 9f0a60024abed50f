"""Attention in parts is attention over all tokens: over what a store's `read` gives, to 1e-5 in float32."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tcw.kv import fused
from tcw.kv.stores import DenseStore, Store
from tcw.kv.stores._frames import LARGEST, Frame
from tcw.kv.stores._grids import Grid
from tcw.kv.stores.float8 import Float8Store
from tcw.kv.stores.integers import IntegerStore
from tcw.kv.stores.tiered import TieredStore

B, G, D = 2, 2, 32
CST = Frame(scale=LARGEST)


def kivi(bits: int, value_bits: int = 0, group: int = 16) -> IntegerStore:
    return IntegerStore(Grid(bits, tokens=group, channels=1), Grid(value_bits or bits, channels=group))


def tiered() -> TieredStore:
    def tier(bits: int) -> IntegerStore:
        return IntegerStore(Grid(bits, tokens=16, channels=1), Grid(bits), value_frame=CST)

    return TieredStore(lambda: tier(4), lambda: tier(2), 0.6)


STORES: dict[str, Callable[[], Store]] = {
    **{f"kivi-{bits}": lambda bits=bits: kivi(bits) for bits in (1, 2, 3, 4, 8)},
    "kivi-4-2": lambda: kivi(4, 2),
    "cst": lambda: IntegerStore(Grid(4), Grid(4), CST, CST),
    "all-tokens": lambda: IntegerStore(Grid(4, tokens=64, channels=1), Grid(2)),
    "tiered": tiered,
}


def drawn(*shape: int, seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=made) * (0.2 + torch.rand(shape[-1], generator=made))


def fill(store: Store, *sizes: int, keep: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Store:
    """Give a store so many tokens at a time, then have it forget all but `keep` of each head, others for each."""
    made = torch.Generator().manual_seed(5)
    for i, size in enumerate(sizes):
        keys, values = (drawn(B, G, size, D, seed=2 * i + side).to(device, dtype) for side in (0, 1))
        scores = torch.rand(B, G, size, generator=made).to(device)
        store.append(keys, values, torch.arange(size, device=device).expand(B, 1, size), scores)
    if keep:
        parts = store.segments
        each = [keep] if len(parts) == 1 else [round(keep * parts[0] / sum(parts))]
        each += [keep - sum(each)] if len(parts) > 1 else []
        index, first = [], 0
        for held, stays in zip(parts, each, strict=True):
            index.append(torch.rand(B, G, held, generator=made).topk(stays, -1).indices.sort(-1).values + first)
            first += held
        store.keep(torch.cat(index, -1).to(device))
    return store


def ordinary(query: Tensor, keys: Tensor, values: Tensor, scaling: float, real: Tensor | None) -> Tensor:
    """Attention in float64 over keys and values that are all there: [B, 1, H, Dv]."""
    r = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(r, 1) for t in (keys, values))
    logits = query.double() @ keys.transpose(-1, -2) * scaling
    if real is not None:
        hidden = ~real.expand(-1, keys.shape[1] // r, -1).repeat_interleave(r, 1)[:, :, None]
        logits = logits.masked_fill(hidden, -torch.inf)
    return (logits.softmax(-1) @ values).transpose(1, 2)


def difference(store: Store, r: int, sinks: int, padded: bool) -> float:
    """How far attention in parts is from ordinary attention, for one new token."""
    like = store.read()[0]
    query = drawn(B, G * r, 1, D, seed=91).to(like)
    window = drawn(B, G, 7, D, seed=92).to(like), drawn(B, G, 7, D, seed=93).to(like)
    first = (window[0][:, :, :sinks] + 1, window[1][:, :, :sinks] - 1) if sinks else None
    parts = [p for p in (first, store.read(), window) if p is not None]
    keys, values = (torch.cat([p[side] for p in parts], 2) for side in (0, 1))
    real = None
    if padded:
        real = torch.ones(B, 1, keys.shape[2], dtype=torch.bool, device=keys.device)
        real[0, :, : sinks + 20], real[1, :, 3::4] = False, False
    assert fused.fits(store, query)
    found = fused.attention(query, first, store, window, D**-0.5, real)
    assert found.dtype == like.dtype
    return float((found.double() - ordinary(query, keys, values, D**-0.5, real)).abs().max())


def differences(device: str = "cpu", names: Iterable[str] = STORES) -> dict[str, float]:
    """Of kinds of store, as filled at once, in ragged pieces, and after it forgot."""
    found = {}
    for name in names:
        make = STORES[name]
        found[f"{name} at once"] = difference(fill(make(), 64, device=device), 1, 4, False)
        found[f"{name} in pieces, padded"] = difference(fill(make(), 37, 19, device=device), 3, 0, True)
        found[f"{name} forgot, padded"] = difference(fill(make(), 48, 16, keep=41, device=device), 2, 2, True)
    return found


def test_parts_make_ordinary_attention_over_the_dequantised_cache() -> None:
    assert {name: far for name, far in differences().items() if not far < 1e-5} == {}


NAMES = ("kivi-3", "kivi-4-2", "cst", "tiered")
INTERPRETED = f"""
import json, runpy, torch
torch.use_deterministic_algorithms(True)
from tcw.kernels.kv_dequant_attention import launch
from tcw.kv import fused
calls = []
def kernel(query, keys, values, scaling, real):
    calls.append(1)
    return launch.attend(query, keys, values, scaling, real, None, 4)
fused.kv_dequant_attention = kernel
print(json.dumps(runpy.run_path({__file__!r})["differences"](names={NAMES}) | {{"calls": len(calls)}}))
"""


def test_so_does_the_kernel_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.pop("calls") >= len(found)
    assert len(found) == 3 * len(NAMES)
    assert {name: far for name, far in found.items() if not far < 1e-5} == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_of_half_precision(dtype: torch.dtype) -> None:
    store = fill(kivi(4), 32, dtype=dtype)
    assert difference(store, 2, 3, False) < 4 * torch.finfo(dtype).eps


def test_a_store_or_window_that_is_all_padding_counts_nothing() -> None:
    store = fill(kivi(4), 32)
    query, window = drawn(B, G, 1, D, seed=1), (drawn(B, G, 3, D, seed=2), drawn(B, G, 3, D, seed=3))
    real = torch.ones(B, 1, 35, dtype=torch.bool)
    real[0, :, :32], real[1, :, 32:] = False, False
    found = fused.attention(query, None, store, window, 0.2, real)
    keys, values = store.read()
    torch.testing.assert_close(found[:1].double(), ordinary(query, *window, 0.2, None)[:1], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1:].double(), ordinary(query, keys, values, 0.2, None)[1:], rtol=0, atol=1e-6)
    real[:] = False
    assert torch.equal(fused.attention(query, None, store, window, 0.2, real), torch.zeros(B, 1, G, D))


@settings(max_examples=50, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 12), max_size=3), r=st.sampled_from([1, 3]), q=st.integers(1, 3),
    size=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 99), hides=st.booleans(),
)  # fmt: skip
def test_merging_the_parts_of_any_division_gives_the_whole(
    cuts: list[int], r: int, q: int, size: float, seed: int, hides: bool
) -> None:
    query, keys, values = (drawn(B, h, n, 8, seed=seed + i) for i, (h, n) in enumerate([(2 * r, q), (2, 12), (2, 12)]))
    query = query * size
    made = torch.Generator().manual_seed(seed)
    visible = torch.rand(B, 2, q, 12, generator=made) > 0.4 if hides else None
    ends = [0, *sorted(cuts), 12]
    parts = [
        fused.dense_part(query, keys[:, :, a:b], values[:, :, a:b], 0.3, None if visible is None else visible[..., a:b])
        for a, b in pairwise(ends)
    ]
    out, lse = fused.merge(parts)
    expected, expected_lse = slow(query, keys, values, 0.3, visible)
    far = 1e-5 * max(1.0, float(expected_lse.nan_to_num(neginf=0.0).abs().max()))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=far * float(values.abs().max()))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def slow(query: Tensor, keys: Tensor, values: Tensor, scaling: float, visible: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp, one query after the other."""
    batch, heads, q, _ = query.shape
    r = heads // keys.shape[1]
    out, lse = (
        torch.zeros(batch, heads, q, values.shape[-1]).double(),
        torch.full((batch, heads, q), -torch.inf).double(),
    )
    for b in range(batch):
        for h in range(heads):
            for i in range(q):
                seen = [t for t in range(keys.shape[2]) if visible is None or visible[b, h // r, i, t]]
                if seen:
                    logits = keys[b, h // r, seen].double() @ query[b, h, i].double() * scaling
                    lse[b, h, i] = logits.logsumexp(0)
                    out[b, h, i] = logits.softmax(0) @ values[b, h // r, seen].double()
    return out, lse


def test_what_the_kernel_does_not_know_is_not_fused() -> None:
    query = drawn(B, 2 * G, 1, D, seed=1)
    assert fused.fits(fill(kivi(4), 32), query)
    symmetric = IntegerStore(Grid(4, symmetric=True), Grid(4))
    turned = IntegerStore(Grid(4), Grid(4), Frame(turn=True))
    for store in (DenseStore(), Float8Store(), symmetric, turned, kivi(4, group=12)):
        assert not fused.fits(fill(store, 36), query)
    assert not fused.fits(TieredStore(lambda: kivi(4), DenseStore, 0.5), query)
    assert not fused.fits(fill(TieredStore(lambda: kivi(4), DenseStore, 0.5), 32), query)
    assert not fused.fits(kivi(4), query)  # holds nothing
    store = fill(kivi(4), 32)
    assert fused.fits(store, drawn(B, 32 * G, 1, D, seed=1))
    assert not fused.fits(store, drawn(B, 33 * G, 1, D, seed=1))
    assert not fused.fits(store, query.double())
    assert not fused.fits(store, query.clone().requires_grad_())
    with torch.no_grad():
        assert fused.fits(store, query.clone().requires_grad_())


def test_groups_of_any_size_fit_where_they_hold_all_or_are_numbered() -> None:
    query = drawn(B, G, 1, D, seed=1)
    whole = IntegerStore(Grid(4, tokens=50, channels=1), Grid(4, channels=50))
    assert fused.fits(fill(whole, 48), query)
    assert not fused.fits(fill(IntegerStore(Grid(4, tokens=12, channels=1), Grid(4)), 48), query)
    assert fused.fits(fill(IntegerStore(Grid(4, tokens=12, channels=1), Grid(4)), 48, keep=30), query)


def test_only_a_gpu_fuses_and_only_one_token_without_a_soft_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    store = fill(kivi(4), 32)
    assert not fused.can_fuse(store, drawn(B, G, 1, D, seed=1))
    monkeypatch.setattr(fused, "_has_kernel", lambda device: device == "ampere")
    there: dict[str, Any] = {
        "shape": torch.Size((B, G, 1, D)), "is_cuda": True, "device": "ampere", "dtype": torch.bfloat16,
        "requires_grad": False,
    }  # fmt: skip

    def says(softcap: float | None = None, **changes: Any) -> bool:
        return fused.can_fuse(store, SimpleNamespace(**(there | changes)), softcap)  # type: ignore[arg-type]

    assert says()
    assert not says(softcap=50.0)
    assert not says(shape=torch.Size((B, G, 2, D)))
    assert not says(device="older")
    assert not says(is_cuda=False)


@pytest.mark.gpu
def test_the_kernel_on_a_gpu() -> None:
    assert {name: far for name, far in differences("cuda").items() if not far < 1e-4} == {}
    store = fill(kivi(4), 32, device="cuda")
    assert fused.can_fuse(store, drawn(B, G, 1, D, seed=1).cuda())
