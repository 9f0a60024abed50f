"""Bits, KL, top-1 and perplexity against slow, obvious references in Python floats."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcw.verify import compare as module
from tcw.verify.compare import compare, kl_rows, nll, same_bits


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    total = math.fsum(weights)
    return [w / total for w in weights]


def slow_kl(p_logits: list[float], q_logits: list[float]) -> float:
    p, q = softmax(p_logits), softmax(q_logits)
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def slow_nll(rows: list[list[float]], targets: list[int]) -> float:
    return math.fsum(-math.log(softmax(row)[t]) for row, t in zip(rows, targets, strict=True))


def logits(seed: int, *shape: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bits(dtype: torch.dtype) -> None:
    a = torch.tensor([0.0, -0.0, 1.5, math.inf, -math.inf, math.nan], dtype=dtype)
    assert same_bits(a, a.clone())
    b = a.clone()
    b[0] = -0.0
    assert torch.equal(a[:5], b[:5])
    assert not same_bits(a, b)
    assert not same_bits(a, a[:5])
    assert not same_bits(a, a.reshape(2, 3))
    assert not same_bits(a, a.to(torch.float32 if dtype != torch.float32 else torch.float64))


def test_bits_see_the_payload_of_a_nan() -> None:
    a = torch.from_numpy(np.array([0x7FC00000, 0x7FC00001], dtype=np.uint32).view(np.float32))
    b = torch.from_numpy(np.array([0x7FC00000, 0x7FC00002], dtype=np.uint32).view(np.float32))
    assert a.isnan().all()
    assert b.isnan().all()
    assert same_bits(a, a.clone())
    assert not same_bits(a, b)


def test_bits_of_a_view_that_is_not_contiguous() -> None:
    a = logits(0, 4, 6)
    assert same_bits(a.T, a.T.contiguous())


@given(st.integers(0, 2**32 - 1), st.integers(0, 31))
def test_one_flipped_bit_is_seen(word: int, bit: int) -> None:
    a = np.array([word, 1], dtype=np.uint32)
    b = a ^ np.array([1 << bit, 0], dtype=np.uint32)
    assert not same_bits(torch.from_numpy(a.view(np.float32)), torch.from_numpy(b.view(np.float32)))


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_kl_equals_the_slow_one(scale: float) -> None:
    p, q = logits(1, 5, 37, scale=scale), logits(2, 5, 37, scale=scale)
    slow = [slow_kl(a, b) for a, b in zip(p.tolist(), q.tolist(), strict=True)]
    assert kl_rows(p, q).tolist() == pytest.approx(slow, rel=1e-9)
    assert kl_rows(p, p).abs().max() == 0
    # adding a constant to a row changes no probability
    assert kl_rows(p, p + 7).abs().max() < 1e-6


def test_kl_where_a_token_is_impossible() -> None:
    p = torch.tensor([[0.0, 1.0, -math.inf]])
    q = torch.tensor([[0.5, 1.0, 2.0]])
    assert kl_rows(p, q).item() == pytest.approx(slow_kl([0.0, 1.0], [0.5, 1.0]) + slow_gain(), rel=1e-6)
    assert kl_rows(p, p).item() == 0
    assert kl_rows(q, p).item() == math.inf


def slow_gain() -> float:
    """What q loses to the third token, which p never gives."""
    return -math.log(1 - softmax([0.5, 1.0, 2.0])[2])


@pytest.mark.parametrize("block", [1, 64, 1 << 22])
def test_nll_equals_the_slow_one(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    rows, targets = logits(3, 11, 29), torch.arange(11) * 2
    assert nll(rows, targets) == pytest.approx(slow_nll(rows.tolist(), targets.tolist()), rel=1e-9)


def test_nll_of_bf16_is_computed_in_float64() -> None:
    rows, targets = logits(4, 6, 50_000).bfloat16(), torch.arange(6)
    assert nll(rows, targets) == pytest.approx(slow_nll(rows.double().tolist(), targets.tolist()), rel=1e-9)


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_compare_measures_distance(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    a = logits(5, 7, 20)
    b = a.clone()
    b[3, 4] += 9.0
    found = compare("x", a, b, logits=True)
    slow = math.fsum(slow_kl(p, q) for p, q in zip(a.tolist(), b.tolist(), strict=True)) / 7
    moved = int(a[3].argmax() != b[3].argmax())
    assert moved == 1
    assert (found.bit_identical, found.positions) == (False, 7)
    assert found.max_abs_diff == pytest.approx(9.0, rel=1e-6)
    assert found.kl == pytest.approx(slow, rel=1e-9)
    assert found.top1 == pytest.approx(6 / 7)


def test_compare_of_equal_bits_needs_no_numbers() -> None:
    a = torch.full((3, 4), math.nan)
    found = compare("x", a, a.clone(), logits=True)
    assert (found.bit_identical, found.max_abs_diff, found.kl, found.top1) == (True, 0.0, 0.0, 1.0)


def test_compare_keeps_a_nan_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 1)
    a = logits(6, 4, 5)
    b = a.clone()
    b[1, 1] = math.nan
    found = compare("x", a, b, logits=True)
    assert math.isnan(found.max_abs_diff)
    assert found.kl is not None
    assert math.isnan(found.kl)


def test_compare_takes_equal_infinities_as_equal() -> None:
    a = logits(7, 3, 5)
    a[:, 0] = -math.inf
    b = a.clone()
    b[0, 1] += 0.25
    found = compare("x", a, b, logits=True)
    assert found.max_abs_diff == pytest.approx(0.25, rel=1e-5)
    assert found.kl is not None
    assert 0 < found.kl < 0.1


def test_compare_of_other_shapes_is_no_number() -> None:
    found = compare("x", logits(8, 3, 5), logits(8, 3, 6), logits=True)
    assert not found.bit_identical
    assert math.isnan(found.max_abs_diff)
    hidden = compare("x", logits(8, 3, 5), logits(9, 3, 5), logits=False)
    assert (hidden.kl, hidden.top1) == (None, None)
