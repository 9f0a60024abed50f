"""Uniform grids of 2^b levels: where they begin, how wide their steps are, and how little is stored of that.

T tokens by C channels of a head share one grid. Two kinds:

    asymmetric   x̂ = minimum + step·q               minimum and step in bfloat16
    symmetric    x̂ = step·(q - (2^b - 1) / 2)        step = unit·2^{(u - U) / 8}, u one byte, unit one float a head

bfloat16 has float32's range: float16 could hold neither the range of a float16 block nor keys of bfloat16 models. A
minimum is rounded down and a step up, so a grid spans its block, and |x̂ - x| <= step/2 for the step that is stored.

A symmetric grid takes, of the step that spans the block and the next few smaller ones, that with the least squared
error: with 2 or 3 bits it pays to clip what is rare. |x̂ - x| <= step/2 then holds where |x| <= step·2^{b-1}, and what
lies beyond is moved to the outermost level.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

OCTAVE = 8  # sizes of step in an octave
_UNIT_CODE = 176  # u of a step of one unit: 22 octaves lie below, 9.9 above
_TRIED = 9  # sizes, less one for each bit: down to 0.59 of the span for 2 bits, about the best for a Gaussian
_ZERO_UNIT = 256.0  # for heads that begin with zeros alone: steps reach from 2^-14 to 2^17.9


@dataclass(frozen=True)
class Grid:
    """A kind of grid.

    Attributes:
        bits: of a code: 1, 2, 3, 4 or 8.
        tokens, channels: T and C; 0 channels: all of a head.
        symmetric: which kind.
    """

    bits: int
    tokens: int = 1
    channels: int = 0
    symmetric: bool = False

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def fit(self, x: Tensor, real: Tensor | None, unit: Tensor) -> tuple[Tensor, ...]:
        """Find the grids of x, float32 [B, G, m, D]; a last block may be ragged.

        Args:
            x: the tokens.
            real: bool [B, 1 or G, m], False for tokens that no grid needs to span; None: all are real.
            unit: float32 [B, G, 1, 1], of steps, where symmetric.

        Returns:
            [B, G, ceil(m / T), ceil(D / C)] each: minimum and step in bfloat16, or u in uint8.
        """
        tiles = self._tiles(x)
        if self.symmetric:
            return (self._best_step(tiles, unit),)
        low, high = tiles.amin((3, 5)), tiles.amax((3, 5))
        if real is not None and self.tokens > 1:
            shown = self._tiles(real[..., None].expand(*x.shape))
            low = tiles.masked_fill(~shown, torch.inf).amin((3, 5)).nan_to_num(posinf=0.0)
            high = tiles.masked_fill(~shown, -torch.inf).amax((3, 5)).nan_to_num(neginf=0.0)
        minimum = round_down(low)
        step = -round_down(-((high - minimum.float()) / self.levels))
        return minimum, step

    def codes(self, x: Tensor, minimum: Tensor, step: Tensor) -> Tensor:
        """Round x, float32 [..., D], to the codes of grids that are already spread over it: uint8."""
        return ((x - minimum) / torch.where(step > 0, step, 1.0)).round_().clamp_(0, self.levels).to(torch.uint8)

    def spread(self, grids: tuple[Tensor, ...], unit: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Minimum and step in float32, [B, G, n, D or 1] each, of grids [B, G, n, ceil(D / C)], one for every token."""
        if self.symmetric:
            step = step_of(grids[0], unit)
            minimum = step * (-self.levels / 2)
        else:
            minimum, step = grids[0].float(), grids[1].float()
        channels = self.channels or dim
        if channels >= dim:
            return minimum, step
        return minimum.repeat_interleave(channels, -1)[..., :dim], step.repeat_interleave(channels, -1)[..., :dim]

    def _tiles(self, x: Tensor) -> Tensor:
        """Cut x [B, G, m, D] into [B, G, blocks, T, groups, C], the last token and channel repeated to fill them."""
        count, dim = x.shape[2:]
        channels = self.channels or dim
        more = -count % self.tokens
        if more:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, more, -1)], 2)
        if dim % channels:
            x = torch.cat([x, x[..., -1:].expand(-1, -1, -1, -dim % channels)], -1)
        return x.unflatten(-1, (-1, channels)).unflatten(2, (-1, self.tokens))

    def _best_step(self, tiles: Tensor, unit: Tensor) -> Tensor:
        """The u with the least squared error, of the one that spans a tile and smaller ones; 0 where all is zero."""
        largest = tiles.abs().amax((3, 5))
        span = (largest * 2 / self.levels / unit).clamp_min(2.0**-30)
        widest = (torch.ceil(torch.log2(span) * OCTAVE) + _UNIT_CODE).clamp(1, 255)
        chosen, least = widest, torch.full_like(widest, torch.inf)
        for smaller in range(_TRIED - self.bits):
            u = (widest - smaller).clamp_min(1)
            step = step_of(u, unit)[:, :, :, None, :, None]
            q = (tiles / step + self.levels / 2).round_().clamp_(0, self.levels)
            error = (q.sub_(self.levels / 2).mul_(step).sub_(tiles)).square_().sum((3, 5))
            chosen, least = torch.where(error < least, u, chosen), torch.minimum(error, least)
        return torch.where(largest > 0, chosen, 0.0).to(torch.uint8)


def unit_of(x: Tensor) -> Tensor:
    """The unit of steps for heads that begin with x [B, G, m, D]: their largest size, float32 [B, G, 1, 1]."""
    largest = x.abs().amax((2, 3), keepdim=True)
    return torch.where(largest > 0, largest, _ZERO_UNIT)


def step_of(u: Tensor, unit: Tensor) -> Tensor:
    """The steps, float32 like `u` [B, G, ...], that its codes stand for; 0 stands for 0."""
    sizes = torch.exp2((torch.arange(256, device=u.device) - _UNIT_CODE) / OCTAVE)
    sizes[0] = 0.0
    return sizes[u.long()] * unit


def round_down(x: Tensor) -> Tensor:
    """The largest bfloat16 that is not above x, float32."""
    bits = x.contiguous().view(torch.int32)
    return (torch.where(x < 0, bits + 0xFFFF, bits) & -0x10000).view(torch.float32).to(torch.bfloat16)


def hadamard(x: Tensor) -> Tensor:
    """Turn x [..., D], float32, by orthonormal Hadamard matrices, one for each block of D's largest power of two.

    Its own inverse. By sums and differences, as a matrix product's last bits depend on how many rows it has.
    """
    block, half = x.shape[-1] & -x.shape[-1], 1
    while half < block:
        pairs = x.unflatten(-1, (-1, 2, half))
        both = torch.empty_like(pairs)
        torch.add(pairs[..., 0, :], pairs[..., 1, :], out=both[..., 0, :])
        torch.sub(pairs[..., 0, :], pairs[..., 1, :], out=both[..., 1, :])
        x, half = both.flatten(-3), 2 * half
    return x * block**-0.5
