"""Codes of unequal widths: the more a channel varies, the more bits it has; what hardly varies has none and is dropped.

The vectors that are appended lie in a basis of their own, the channels that vary most first (tcw/kv/stores/lowrank.py
gives it such vectors). σ_c is a channel's standard deviation, known beforehand, and s a size of the whole token:

    s = sqrt(mean_c (y_c / σ_c)²), to a quarter of an octave, one byte
    q_c = the nearest of 2^{b_c} levels to y_c / (σ_c s),   ŷ_c = level(q_c) σ_c s

Levels are those that leave the least mean squared error of a normal variable (Lloyd and Max: S. P. Lloyd, Least squares
quantization in PCM, 1982, https://doi.org/10.1109/TIT.1982.1056489). With s a token that is unlike the text on which σ
was measured, a number amid prose, keeps its shape.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tcw.kv.stores import Store, pick
from tcw.kv.stores._packing import pack, packed_width, unpack

WIDTHS = (0, 1, 2, 3, 4, 8)  # bits a channel may have
SIZES = 4  # of s in an octave
_ROUNDS = 2000  # of Lloyd's iteration; 16 levels need about 700 to stand still
_SIZE_CODE = 128  # of s = 1


@dataclass(frozen=True)
class Channels:
    """The channels of keys, or of values.

    Attributes:
        deviations: float32 [n_b] for each width b, widest first: σ of the channels that have b bits.
    """

    deviations: dict[int, Tensor]

    @property
    def count(self) -> int:
        """Channels that have bits."""
        return sum(len(sigma) for sigma in self.deviations.values())

    @property
    def width(self) -> int:
        """Bytes of a token's codes."""
        return sum(packed_width(len(sigma), bits) for bits, sigma in self.deviations.items())

    def encode(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Codes uint8 [..., width] and sizes uint8 [...] of vectors y [..., count]."""
        sigma = torch.cat(list(self.deviations.values()))
        z = y.float() / sigma
        size = z.square().mean(-1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
        size = (torch.log2(size) * SIZES).round().clamp(-_SIZE_CODE, _SIZE_CODE - 1)
        z = z / torch.exp2(size / SIZES)[..., None]
        codes = []
        for bits, part in zip(self.deviations, z.split([len(s) for s in self.deviations.values()], -1), strict=True):
            levels = lloyd(bits).to(z.device)
            nearest = torch.bucketize(part.contiguous(), (levels[1:] + levels[:-1]) / 2)
            codes.append(pack(nearest.to(torch.uint8), bits))
        return torch.cat(codes, -1), (size + _SIZE_CODE).to(torch.uint8)

    def decode(self, codes: Tensor, sizes: Tensor) -> Tensor:
        """Vectors, float32 [..., count]."""
        counts = [(bits, len(sigma)) for bits, sigma in self.deviations.items()]
        pieces = codes.split([packed_width(count, bits) for bits, count in counts], -1)
        parts = [lloyd(bits).to(codes.device)[unpack(piece, bits, count).int()]
                 for (bits, count), piece in zip(counts, pieces, strict=True)]  # fmt: skip
        scale = torch.exp2((sizes.float() - _SIZE_CODE) / SIZES)[..., None]
        return torch.cat(parts, -1) * torch.cat(list(self.deviations.values())) * scale


class SpectrumStore(Store):
    """Keys and values as codes of unequal widths.

    Attributes:
        held: codes uint8 [B, G, n, bytes] and sizes uint8 [B, G, n] of keys, then of values; () while empty.
    """

    def __init__(self, keys: Channels, values: Channels) -> None:
        self.channels = (keys, values)
        self.held: tuple[Tensor, ...] = ()
        self._dtype = torch.float32

    def __len__(self) -> int:
        return self.held[0].shape[2] if self.held else 0

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor | None = None) -> Tensor | None:
        """Round and pack vectors [B, G, m, count]; what is rounded stays so."""
        self._dtype = keys.dtype
        new = [t for c, y in zip(self.channels, (keys, values), strict=True) for t in c.encode(y)]
        self.held = tuple(torch.cat(pair, 2) for pair in zip(self.held, new, strict=True)) if self.held else tuple(new)
        return None

    def read(self) -> tuple[Tensor, Tensor]:
        """All vectors, in the dtype of those that were appended last."""
        keys, values = self.channels
        read = keys.decode(*self.held[:2]), values.decode(*self.held[2:])
        return read[0].to(self._dtype), read[1].to(self._dtype)

    def keep(self, index: Tensor) -> None:
        """Gather codes."""
        self.held = tuple(pick(held, index) for held in self.held)

    def select_rows(self, rows: Tensor) -> None:
        """Gather sequences."""
        self.held = tuple(held.index_select(0, rows) for held in self.held)

    def tensors(self) -> list[Tensor]:
        """Codes and sizes; deviations are the policy's."""
        return list(self.held)


@cache
def lloyd(bits: int) -> Tensor:
    """The 2^bits levels that represent a normal variable best, float32, ascending.

    For 8 bits the levels of a high rate: normal quantiles, sqrt(3) times as wide (Panter and Dite, 1951).
    """
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    levels = 3**0.5 * normal.icdf((torch.arange(1 << bits, dtype=torch.float64) + 0.5) / (1 << bits))
    end = torch.tensor([torch.inf], dtype=torch.float64)
    for _ in range(_ROUNDS if bits <= 4 else 0):
        bounds = torch.cat([-end, (levels[1:] + levels[:-1]) / 2, end])
        heights = torch.exp(-bounds.square() / 2) / (2 * torch.pi) ** 0.5
        levels = (heights[:-1] - heights[1:]) / normal.cdf(bounds).diff()
    return levels.float()


@cache
def distortion(bits: int) -> float:
    """The mean squared error of `lloyd(bits)` for a normal variable of variance 1; 1 for no bits."""
    if not bits:
        return 1.0
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    weight = torch.exp(-x.square() / 2)
    levels = lloyd(bits).double()
    nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    return float((weight * (x - nearest).square()).sum() / weight.sum())


def allot(energies: list[float], bits: int) -> list[int]:
    """Divide bits among channels so that the sum of their errors is the least.

    Args:
        energies: variances, in any order.
        bits: of all channels together; a few may be left over.

    Returns:
        The width of each channel, one of WIDTHS. Bit by bit to where it saves most, which is the best as each further
        bit saves less.
    """
    widths, left = [0] * len(energies), bits
    while True:
        wider = [
            (energy * (distortion(width) - distortion(up)) / (up - width), -i, up)
            for i, (energy, width) in enumerate(zip(energies, widths, strict=True))
            for up in WIDTHS[WIDTHS.index(width) + 1 :][:1]
            if up - width <= left
        ]
        if not wider:
            return widths
        _, i, up = max(wider)
        left -= up - widths[-i]
        widths[-i] = up
