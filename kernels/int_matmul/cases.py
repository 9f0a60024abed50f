"""What the kernel must get right: the inputs, and the errors allowed, that its test and its benchmark share."""

from dataclasses import dataclass

import torch

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
UNIT = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}  # half a step of the dtype, relative
SUMS = 2.0**-19  # what summing in float32 may lose, relative to all that is summed


@dataclass(frozen=True)
class Case:
    """One product. `multiprocessors` says how finely K is shared out; `kind` is a function of this module."""

    name: str
    bits: int
    m: int
    n: int
    k: int
    group_size: int = 64
    grid: str = "symmetric"
    dtype: str = "BF16"
    bias: bool = False
    multiprocessors: int = 1
    kind: str = "usual"


@dataclass(frozen=True)
class Inputs:
    """Operands, with W as an artifact stores it: `codes` int32 [N, ceil(K·bits/32)], `scale` and `zero` [N, groups]."""

    x: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bias: torch.Tensor | None
    bits: int
    group_size: int
    grid: str


def _every_way(bits: int) -> list[Case]:
    """Each way of the launcher, on sizes that fit nothing."""
    return [
        Case(f"w{bits}-gemv-1", bits, 1, 35, 100, 64, "zero", multiprocessors=2),
        Case(f"w{bits}-gemv-3-bias", bits, 3, 5, 131, 32, "symmetric", "F16", True, multiprocessors=1),
        Case(f"w{bits}-gemm-5", bits, 5, 130, 200, 64, "zero", "BF16", True, multiprocessors=4),
        Case(f"w{bits}-gemm-33", bits, 33, 40, 100, 0, "midrise", "F32", multiprocessors=1),
        Case(f"w{bits}-dequantize", bits, 65, 131, 77, 24, "float", "F32", True),
    ]


CASES = [
    *_every_way(2), *_every_way(3), *_every_way(4), *_every_way(8),
    *(Case(f"w2-gemv-{grid}", 2, 2, 33, 96, 32, grid, "F32") for grid in ("symmetric", "zero", "midrise", "float")),
    *(Case(f"w4-gemm-{grid}", 4, 7, 33, 96, 32, grid, "F16") for grid in ("symmetric", "zero", "midrise", "float")),
    *(Case(f"group-8-w{bits}-m{m}", bits, m, 17, 60, 8, "zero", "F32") for bits in (2, 8) for m in (4, 6)),
    Case("group-24-not-a-word", 2, 4, 9, 49, 24, "float", "F32"),
    Case("group-40", 4, 6, 9, 100, 40, "zero", "F32", True),
    Case("group-larger-than-k", 4, 1, 9, 50, 128, "zero"),
    Case("two-blocks-of-columns", 4, 2, 257, 40, 32, "zero", "F32"),
    Case("one-weight", 2, 1, 1, 1, 0, "midrise", "F32"),
    Case("one-column", 8, 6, 40, 1, 8, "zero", "F32", True),
    Case("one-row", 3, 64, 1, 90, 32, "symmetric", "F32"),
    Case("more-splits-than-tiles", 4, 1, 3, 64, 64, "zero", "F32", True, multiprocessors=132),
    Case("many-splits", 2, 4, 7, 320, 32, "zero", "F32", True, multiprocessors=132),
    Case("many-splits-gemm", 4, 16, 7, 320, 32, "zero", "F32", True, multiprocessors=132),
    Case("dense-words", 8, 2, 40, 128, 64, "symmetric", "F32", kind="all_ones"),
    Case("dense-words-w4-gemm", 4, 8, 40, 128, 64, "zero", "F32", kind="all_ones"),
    Case("zero-points-far-out", 8, 3, 20, 128, 64, "zero", "F32", kind="far_zeros"),
    Case("large-activations", 4, 3, 20, 128, 64, "symmetric", "F16", kind="large_x"),
    Case("tiny-and-negative-scales", 2, 2, 20, 128, 64, "midrise", "BF16", kind="odd_scales"),
    Case("no-activation", 4, 2, 20, 128, 64, "zero", "BF16", True, kind="no_x"),
]  # fmt: skip


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Make the operands of a case, the same at each call."""
    random = torch.Generator().manual_seed(case.m * 1_000_003 + case.n * 1009 + case.k * 7 + case.bits)
    dtype, groups = DTYPES[case.dtype], -(-case.k // (case.group_size or case.k))
    words = -(-case.k * case.bits // 32)
    zero = None
    if case.grid == "zero":
        zero = torch.randint(0, 1 << case.bits, (case.n, groups), generator=random, dtype=torch.uint8)
    elif case.grid == "float":
        zero = torch.randn(case.n, groups, generator=random).to(dtype)
    inputs = Inputs(
        x=torch.randn(case.m, case.k, generator=random).to(dtype),
        codes=torch.randint(-(1 << 31), 1 << 31, (case.n, words), generator=random, dtype=torch.int64).int(),
        scale=(torch.rand(case.n, groups, generator=random) + 0.1).to(dtype),
        zero=zero,
        bias=torch.randn(case.n, generator=random).to(dtype) if case.bias else None,
        bits=case.bits, group_size=case.group_size, grid=case.grid,
    )  # fmt: skip
    globals()[case.kind](inputs)
    moved = {f: v.to(device) for f, v in vars(inputs).items() if isinstance(v, torch.Tensor)}
    return Inputs(**{**vars(inputs), **moved})


def cost(case: Case) -> tuple[int, int]:
    """(bytes that must at least move, floating-point operations)."""
    inputs, width = make_inputs(case), DTYPES[case.dtype].itemsize
    tensors = [t for t in vars(inputs).values() if isinstance(t, torch.Tensor)]
    return sum(t.nbytes for t in tensors) + case.m * case.n * width, 2 * case.m * case.n * case.k


def usual(inputs: Inputs) -> None:
    """Random codes, scales of one sign."""


def all_ones(inputs: Inputs) -> None:
    """Every bit is set: words are -1, and shifting them drags the sign along."""
    inputs.codes.fill_(-1)


def far_zeros(inputs: Inputs) -> None:
    """Zero points at both ends: products cancel as much as they can."""
    assert inputs.zero is not None
    inputs.zero[::2] = 0
    inputs.zero[1::2] = (1 << inputs.bits) - 1


def large_x(inputs: Inputs) -> None:
    """Activations near the largest float16, of alternating sign: only a float32 sum holds them."""
    inputs.x.copy_(torch.where(torch.arange(inputs.x.shape[1]) % 2 == 0, 65504.0, -65472.0).expand_as(inputs.x))
    inputs.scale.mul_(0.01)


def odd_scales(inputs: Inputs) -> None:
    """Scales of both signs, zero, and the smallest there are."""
    inputs.scale[::4] *= -1
    inputs.scale[1::4] = 0
    inputs.scale[2::4] = 1e-38


def no_x(inputs: Inputs) -> None:
    """Activations of a dead layer: the bias is all there is."""
    inputs.x.zero_()
