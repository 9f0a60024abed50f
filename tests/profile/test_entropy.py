"""Exponents counted from the bits, against NumPy's own frexp and the textbook formula in float64."""

import math

import numpy as np
import pytest

from tcw.profile.entropy import EXPONENTS, entropy_bits, exponent_counts
from tcw.tensor import DTYPE_BITS, TensorData, TensorInfo

WORDS = {8: np.uint8, 16: np.uint16, 32: np.uint32}


def _tensor(words: np.ndarray, dtype: str) -> TensorData:
    return TensorData(TensorInfo("x", dtype, words.shape), words.view(np.uint8).reshape(-1))


def _bits_of(dtype: str, numel: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 1 << DTYPE_BITS[dtype], numel, dtype=WORDS[DTYPE_BITS[dtype]])


@pytest.mark.parametrize("dtype", EXPONENTS)
@pytest.mark.parametrize("numel", [0, 1, 3, 1000, (1 << 20) + 5])
def test_counts_are_those_of_bincount(dtype: str, numel: int) -> None:
    words = _bits_of(dtype, numel)
    shift, width = EXPONENTS[dtype]
    expected = np.bincount((words.astype(np.int64) >> shift) % (1 << width), minlength=1 << width)
    counts = exponent_counts(_tensor(words, dtype))
    assert counts is not None
    assert np.array_equal(counts, expected)


def test_float32_exponents_are_those_of_frexp() -> None:
    values = np.random.default_rng(0).normal(0, 0.02, 5000).astype(np.float32)
    counts = exponent_counts(_tensor(values.view(np.uint32), "F32"))
    assert counts is not None
    _, exponents = np.frexp(values)
    assert np.array_equal(counts, np.bincount(exponents + 126, minlength=256))


def test_other_dtypes_have_none() -> None:
    assert exponent_counts(TensorData(TensorInfo("x", "I64", (2,)), np.zeros(16, np.uint8))) is None
    assert exponent_counts(TensorData(TensorInfo("x", "F64", (2,)), np.zeros(16, np.uint8))) is None


def test_entropy_is_the_formula_term_by_term() -> None:
    counts = np.array([0, 5, 1, 0, 94, 7])
    expected = 0.0
    for count in counts:
        if count:
            expected -= count / 107 * math.log2(count / 107)
    assert entropy_bits(counts) == pytest.approx(expected, abs=1e-12)
    assert entropy_bits(np.ones(256)) == pytest.approx(8.0)


def test_entropy_of_nothing_and_of_one_symbol_is_zero() -> None:
    for counts in (np.zeros(256, np.int64), np.array([0, 9, 0])):
        assert entropy_bits(counts) == 0.0
        assert math.copysign(1, entropy_bits(counts)) == 1.0
