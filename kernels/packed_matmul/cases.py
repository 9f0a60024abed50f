"""What packing and multiplying must get right: the inputs, and the errors allowed, that tests and benchmarks share."""

from dataclasses import dataclass

import torch

UNIT = 2.0**-8  # half a step of BF16, relative
SUMS = 2.0**-18  # what summing in float32 may lose, relative to all that is summed


@dataclass(frozen=True)
class Case:
    """One product. `multiprocessors` says how finely K is shared out; `kind` is a function of this module."""

    name: str
    m: int
    n: int
    k: int
    bias: bool = False
    kind: str = "usual"
    multiprocessors: int = 2


@dataclass(frozen=True)
class Inputs:
    """Operands: x BF16 [M, K], weight BF16 [N, K], bias BF16 [N] or None."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


CASES = [
    Case("one-weight", 1, 1, 1),
    Case("one-column", 2, 17, 1, True),
    Case("one-row", 1, 1, 200),
    *(Case(f"m{m}", m, 33, 128, m % 2 == 0) for m in (1, 2, 7, 8, 9, 16)),
    *(Case(f"k{k}", 3, 17, k, k == 65) for k in (63, 64, 65, 72, 200, 576)),
    Case("n17-wide", 9, 17, 65, True),
    Case("n48-wide", 16, 48, 576, True),
    Case("a-tile-for-each-warp", 1, 16, 512),
    Case("more-than-the-ring-holds", 2, 16, 3200, True),
    Case("shared-out", 1, 16, 4200, True, multiprocessors=8),
    Case("shared-out-wide", 10, 20, 4160, False, multiprocessors=8),
    Case("more-than-a-window", 1, 1, 19_000, True, multiprocessors=0),
    Case("more-than-a-window-wide", 9, 1, 9_500, multiprocessors=0),
    Case("zeros-among-weights", 4, 40, 300, kind="zeros"),
    Case("one-exponent", 5, 32, 128, kind="one_exponent"),
    Case("not-finite", 3, 40, 192, True, kind="not_finite"),
    Case("subnormal", 2, 16, 128, kind="subnormal"),
    Case("large", 2, 16, 128, kind="large"),
    Case("crowded-tiles", 12, 40, 300, kind="crowded"),
    Case("any-bits", 9, 35, 150, True, kind="any_bits"),
]


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """Make the operands of a case, the same at each call."""
    random = torch.Generator().manual_seed(case.m * 1_000_003 + case.n * 1009 + case.k)
    weight = (torch.randn(case.n, case.k, generator=random) * 0.02).to(torch.bfloat16)
    x = torch.randn(case.m, case.k, generator=random).to(torch.bfloat16)
    bias = torch.randn(case.n, generator=random).to(torch.bfloat16) if case.bias else None
    globals()[case.kind](weight, random)
    return Inputs(x.to(device), weight.to(device), None if bias is None else bias.to(device))


def usual(weight: torch.Tensor, random: torch.Generator) -> None:
    """Gaussian weights."""


def zeros(weight: torch.Tensor, random: torch.Generator) -> None:
    """A third of the weights is 0 or -0, and so are all of some tiles."""
    weight.masked_fill_(torch.rand(weight.shape, generator=random) < 0.2, 0.0)
    weight.masked_fill_(torch.rand(weight.shape, generator=random) < 0.1, -0.0)
    weight[:16, :128] = 0


def one_exponent(weight: torch.Tensor, random: torch.Generator) -> None:
    """All weights lie between 1 and 2, or -1 and -2: no escapes."""
    weight.copy_((1 + torch.rand(weight.shape, generator=random) * 0.99) * weight.sign())
    weight.masked_fill_(weight == 0, 1.0)


def not_finite(weight: torch.Tensor, random: torch.Generator) -> None:
    """Infinities, NaNs with payloads, zeros and subnormals in some rows, among finite weights in others."""
    odd = [0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7F81, 0x0000, 0x8000, 0x0001, 0x807F]
    values = torch.tensor(odd, dtype=torch.int32).to(torch.int16)
    words = weight.view(torch.int16)
    for row in range(0, weight.shape[0], 3):
        where = torch.randint(0, weight.shape[1], (4,), generator=random)
        words[row, where] = values[torch.randint(0, len(odd), (4,), generator=random)]


def subnormal(weight: torch.Tensor, random: torch.Generator) -> None:
    """The smallest weights there are."""
    words = torch.randint(0, 0x180, weight.shape, generator=random) | torch.randint(0, 2, weight.shape) << 15
    weight.view(torch.int16).copy_(words.to(torch.int16))


def large(weight: torch.Tensor, random: torch.Generator) -> None:
    """Weights near the top of what BF16 holds."""
    weight.mul_(2.0**120)


def crowded(weight: torch.Tensor, random: torch.Generator) -> None:
    """A tile of nothing but escapes, and tiles with some in one half alone, among others that have none."""
    weight.copy_((1 + 0.9 * torch.rand(weight.shape, generator=random)).to(torch.bfloat16))
    for i in range(8):  # what fills the palette
        weight[:, 256 + 2 * i : 258 + 2 * i] *= 2.0 ** (6 * i - 24)
    weight[:16, :64] *= 2.0 ** -(torch.arange(64) % 60 + 30)
    weight[16:19, 70] *= 2.0**40
    weight[32:, 188:192] *= 2.0**50


def any_bits(weight: torch.Tensor, random: torch.Generator) -> None:
    """Every bit pattern is as likely as any other: nearly all are escapes."""
    words = torch.randint(-(1 << 15), 1 << 15, weight.shape, generator=random)
    weight.view(torch.int16).copy_(words.to(torch.int16))
