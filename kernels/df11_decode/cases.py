"""What a decoder of the official layout must get right: the inputs that its test and its benchmark share."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from tcw.codecs import df11
from tcw.codecs.df11_stream import BLOCK_BITS, BLOCK_BYTES, BLOCK_CELLS, CELL
from tcw.codecs.df11_tables import build_luts


@dataclass(frozen=True)
class Case:
    """One input: which weights, how many of them, and in which matrices."""

    name: str
    kind: str  # a function of this module
    numel: int
    sizes: tuple[int, ...] = ()


CASES = [
    Case("weights", "weights", 31_001),  # three blocks
    *(Case(f"ragged-{n}", "weights", n) for n in (1, 2, 7, 8, 9, 23, 24, 25, 1_543, 12_650)),
    Case("groups", "weights", 9_001, (5_000, 1, 0, 3_993, 7)),
    Case("zero-runs", "zero_runs", 20_000),
    Case("exponents-to-239", "wide", 9_000),
    Case("one-symbol", "constant", 9_000),
    Case("one-bit-full-blocks", "full", 66_000),  # 32,768 weights a block: more than the official kernel can launch
    Case("one-bit-and-two-symbols", "two", 34_000),
    Case("two-bit-full-blocks", "four", 33_500),
    Case("codes-of-1-to-32-bits", "staircase", 6_000),
    Case("codes-of-27-to-32-bits", "far", 3_000),
    Case("another-writers-code", "canonical", 12_000),
    Case("position-forgotten", "forgotten", 16_381),
]


def make_inputs(case: Case) -> tuple[np.ndarray, df11.Group]:
    """Return (the BF16 words that a decoder must give, the arrays it is given); the same at each call."""
    return globals()[case.kind](np.random.default_rng(20_26), case)


def cost(group: df11.Group) -> int:
    """Bytes that a decoder must at least move: the arrays in, the words out."""
    return group.nbytes + 2 * group.sign_mantissa.size


# ---- weights of the official writer's code


def weights(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, df11.Group]:
    """Gaussian weights: about 2.6 bits an exponent."""
    words = gaussian(rng, case.numel)
    return words, df11.encode(words, case.sizes)


def zero_runs(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, df11.Group]:
    """Weights with runs of zeros of both signs: neighbouring cells hold very different numbers of codes."""
    words = gaussian(rng, case.numel)
    words[case.numel // 4 : case.numel // 2] = 0
    words[-3_000:] = 0x8000
    return words, df11.encode(words)


def wide(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, df11.Group]:
    """Every exponent that can be coded is as likely as any other: codes of 8 bits."""
    words = with_exponents(rng, rng.integers(0, 240, case.numel))
    return words, df11.encode(words)


def constant(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, df11.Group]:
    """One exponent, any sign and mantissa."""
    words = with_exponents(rng, np.full(case.numel, 239))
    return words, df11.encode(words)


# ---- other writers' codes


def full(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, df11.Group]:
    """One exponent of one bit, in blocks as full as can be."""
    return coded(rng, {120: "0"}, np.full(case.numel, 120))


def two(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, df11.Group]:
    """Two exponents of one bit."""
    return coded(rng, {0: "0", 239: "1"}, rng.choice([0, 239], case.numel))


def four(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, df11.Group]:
    """Four exponents of two bits: the most weights a run that the smaller kernel takes."""
    return coded(rng, {118: "00", 119: "01", 120: "10", 121: "11"}, rng.integers(118, 122, case.numel))


def staircase(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, df11.Group]:
    """Codes of each length from 1 to 32, all as frequent as another."""
    code = {100 + n: "1" * n + "0" for n in range(32)}
    return coded(rng, code | {99: "1" * 32}, rng.integers(99, 132, case.numel))


def far(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, df11.Group]:
    """Codes that take four look-up rows each: two to five of them in a run."""
    code = {n: "1" * (n - 1) + "0" for n in (2, 12, 20, *range(27, 33))}  # rows are made of codes that end in them
    return coded(rng, code | {239: "1" * 32, 0: "0"}, rng.choice([*range(27, 33), 239], case.numel))


def canonical(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, df11.Group]:
    """A canonical code, as another writer might take, with codes on both sides of the table's 10 bits."""
    lengths = {118: 1, 119: 2, 120: 3, 121: 4, 7: 9, 8: 10, 9: 11, 10: 12, 11: 17, 12: 17}
    starts = accumulate((1 << (17 - n) for n in lengths.values()), initial=0)
    code = {s: format(at >> (17 - n), f"0{n}b") for (s, n), at in zip(lengths.items(), starts, strict=False)}
    chances = [0.4, 0.25, 0.15, 0.1, *(0.1 / 6,) * 6]
    return coded(rng, code, rng.choice(list(lengths), case.numel, p=chances))


def forgotten(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, df11.Group]:
    """The last code ends, byte-aligned, in a block of its own: dfloat11 then leaves out the last position."""
    exponents = rng.choice([5, 6, 7], case.numel)
    exponents[-1] = 8
    words, group = coded(rng, {5: "00", 6: "01", 7: "10", 8: "1" * 16}, exponents)
    return words, replace(group, output_positions=group.output_positions[:-4])


def gaussian(rng: np.random.Generator, n: int) -> np.ndarray:
    """BF16 words of weights of deviation 0.02."""
    x = (rng.standard_normal(n) * 0.02).astype(np.float32)
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def with_exponents(rng: np.random.Generator, exponents: np.ndarray) -> np.ndarray:
    """BF16 words of these exponents, any sign and mantissa."""
    rest = rng.integers(0, 1 << 16, exponents.size, dtype=np.uint16)
    return (rest & np.uint16(0x807F)) | exponents.astype(np.uint16) << np.uint16(7)


def coded(rng: np.random.Generator, code: Mapping[int, str], exponents: np.ndarray) -> tuple[np.ndarray, df11.Group]:
    """Words of these exponents, and a group that codes them as `code` says, which may be any prefix code.

    None of what the official writer refuses is refused here.
    """
    words = with_exponents(rng, exponents)
    texts = [code[e] for e in exponents.tolist()]
    starts = np.cumsum([0, *(len(text) for text in texts)])[:-1]
    stream = np.packbits(np.frombuffer("".join(texts).encode(), np.uint8) - ord("0"))
    blocks = -(-stream.size // BLOCK_BYTES)
    cells = CELL * np.arange(BLOCK_CELLS * blocks)
    first = np.searchsorted(starts, cells)  # code of each cell, where one starts there
    gaps = np.append(starts, 0)[first] - cells
    gaps[(first == starts.size) | (gaps >= CELL)] = 0
    positions = np.append(np.searchsorted(starts, BLOCK_BITS * np.arange(blocks)), words.size)
    return words, df11.Group(
        luts=build_luts({symbol: (len(text), int(text, 2)) for symbol, text in code.items()}),
        encoded_exponent=stream,
        sign_mantissa=(words >> 8 & 0x80 | words & 0x7F).astype(np.uint8),
        output_positions=positions.astype("<u4").view(np.uint8),
        gaps=np.packbits(np.unpackbits(gaps.astype(np.uint8)[:, None], axis=1)[:, 3:].reshape(-1)),
        split_positions=np.empty(0, np.int64),
    )
