"""What a decoder of `lanes` must get right: the inputs that its test and its benchmark share."""

from dataclasses import dataclass

import numpy as np

from tcw.codecs import lanes


@dataclass(frozen=True)
class Case:
    """One input: what is coded, how much of it, and in which way."""

    name: str
    kind: str  # a function of this module
    split: str  # of words; "integers" for integers
    numel: int
    segments: tuple[int, ...] | None = None
    pair: bool = False
    escape_above: int | None = None


CASES = [
    *(Case(f"weights-{s}", "weights", s, 12_301) for s in ("bf16", "f16", "f32")),
    *(Case(f"ragged-{n}", "weights", "bf16", n) for n in (0, 1, 2, 3, 4, 5, 127, 128, 129, 4095, 4096, 4097)),
    Case("one-symbol", "constant", "bf16", 9_000),
    Case("two-symbols", "two", "bf16", 4_500),
    Case("zero-runs", "zero_runs", "bf16", 20_000),
    Case("not-finite", "not_finite", "bf16", 5_000),
    Case("any-bits-bf16", "any_bits", "bf16", 9_001),
    Case("any-bits-f16", "any_bits", "f16", 9_001),
    Case("any-bits-f32", "any_bits", "f32", 9_001),
    Case("256-symbols-u8", "any_bits", "u8", 9_001),
    Case("12-bit-codes-u8", "long_codes", "u8", 40_000),
    Case("2000-symbols-u16", "wide", "u16", 30_000),
    Case("192-byte-lanes-bf16", "rare_chunk", "bf16", 65_536),
    Case("192-byte-lanes-u16", "each_twice", "u16", 8_192),
    Case("tables-bf16", "weights", "bf16", 9_000, segments=(4_096, 1, 0, 4_903)),
    Case("tables-f32", "weights", "f32", 9_000, segments=(4_102, 4_898)),
    Case("66-tables-u8", "long_codes", "u8", 6_400, segments=(*range(4, 196, 3), 0, 96)),
    Case("integers", "small", "integers", 9_000),
    Case("integers-tables", "small", "integers", 9_000, segments=(3_001, 5_999)),
    Case("integers-escape", "outliers", "integers", 9_000, escape_above=15),
    Case("integers-pair", "small", "integers", 9_001, pair=True),
    Case("integers-pair-escape-tables", "outliers", "integers", 9_001, (4_097, 1, 4_903), True, 7),
]


def make_inputs(case: Case) -> tuple[np.ndarray, lanes.Stream]:
    """Return (what a decoder must give, the stream it is given); the same at each call."""
    values = globals()[case.kind](np.random.default_rng(20_26), case)
    if case.split == "integers":
        stream = lanes.encode_integers(values, pair=case.pair, escape_above=case.escape_above, segments=case.segments)
    else:
        stream = lanes.encode(values, case.split, segments=case.segments)
    return values, stream


def cost(case: Case) -> int:
    """Bytes that a decoder must at least move: the stream in, the words out."""
    values, stream = make_inputs(case)
    return stream.nbytes + values.nbytes


def weights(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Gaussian weights of the split's type."""
    x = (rng.standard_normal(case.numel) * 0.02).astype(np.float32)
    if case.split == "bf16":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(np.float16).view(np.uint16) if case.split == "f16" else x.view(np.uint32)


def constant(rng: np.random.Generator, case: Case) -> np.ndarray:
    """One exponent, any mantissa: a lone symbol."""
    return (0x3F00 | rng.integers(0, 0x80, case.numel)).astype(np.uint16)


def two(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Two exponents: one bit each."""
    return (0x3F00 + 0x80 * rng.integers(0, 2, case.numel)).astype(np.uint16)


def zero_runs(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Weights with long runs of zeros, so that lanes differ much in size."""
    words = weights(rng, case)
    words[case.numel // 4 : case.numel // 2] = 0
    words[-3_000:] = 0x8000
    return words


def not_finite(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Weights among infinities, NaNs with payloads, zeros of both signs and subnormals."""
    words = weights(rng, case)
    odd = np.array([0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7F81, 0x0000, 0x8000, 0x0001, 0x807F], dtype=np.uint16)
    where = rng.integers(0, case.numel, 500)
    words[where] = odd[rng.integers(0, odd.size, 500)]
    return words


def any_bits(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Every bit pattern is as likely as any other: all 256 symbols."""
    dtype = lanes.SPLITS[case.split].word
    return rng.integers(0, np.iinfo(dtype).max, case.numel, dtype=dtype, endpoint=True)


def long_codes(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Counts that halve from symbol to symbol: an unlimited code would be longer than 12 bits."""
    return np.minimum(rng.geometric(0.5, case.numel) - 1, 255).astype(np.uint8)


def rare_chunk(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Exponents 252 to 255, each twice as frequent as the one before, and in one chunk the others: codes of 12 bits."""
    exponents = 255 - np.minimum(rng.geometric(0.5, case.numel) - 1, 3)
    exponents[4096:8192] = rng.permutation(4096) % 252
    return (exponents << 7 | rng.integers(0, 128, case.numel) | rng.integers(0, 2, case.numel) << 15).astype(np.uint16)


def each_twice(rng: np.random.Generator, case: Case) -> np.ndarray:
    """4,096 symbols that are equally frequent: codes of 12 bits, and nothing else."""
    return rng.permutation(np.arange(case.numel) % 4096 + 9_999).astype(np.uint16)


def wide(rng: np.random.Generator, case: Case) -> np.ndarray:
    """About two thousand different 16-bit symbols, far from 0."""
    return rng.integers(50_000, 52_000, case.numel).astype(np.uint16)


def small(rng: np.random.Generator, case: Case) -> np.ndarray:
    """Codes of a quantiser at about two bits."""
    return np.rint(rng.standard_normal(case.numel)).astype(np.int32)


def outliers(rng: np.random.Generator, case: Case) -> np.ndarray:
    """The same with a few codes in the thousands, of both signs, and the extremes of 32 bits."""
    values = small(rng, case)
    where = rng.choice(case.numel, 40, replace=False)
    values[where] = rng.integers(-100_000, 100_000, 40)
    values[where[:2]] = (1 << 31) - 1, -(1 << 31)
    return values
