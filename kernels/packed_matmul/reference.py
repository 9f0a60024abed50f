"""The definition of right: weight by weight from the text of layout.py, and the product in float64."""

from dataclasses import dataclass

import torch
from tcw.kernels.packed_matmul.cases import Inputs
from tcw.kernels.packed_matmul.layout import PackedWeight


def decode(weight: PackedWeight) -> torch.Tensor:
    """W, BF16 [N, K], from its bytes. Slow on purpose, and trusting."""
    n, k = weight.shape
    wide = -(-k // 64)
    tiles, escapes = weight.tiles.tolist(), _escapes(weight)
    words = [
        [_word(weight, tiles[tile], escapes[tile], *_place(row % 16, column % 64)) for column in range(k)
         for tile in (row // 16 * wide + column // 64,)]
        for row in range(n)
    ]  # fmt: skip
    return torch.tensor(words, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def _place(row: int, column: int) -> tuple[int, int]:
    """(lane, weight of that lane) of a place in a tile."""
    r, g = divmod(row, 8)
    h, t, i, c = column // 32, column // 8 % 4, column // 4 % 2, column % 4
    return 4 * g + t, 16 * h + 8 * i + 4 * r + c


def _escapes(weight: PackedWeight) -> list[dict[tuple[int, int], int]]:
    """For each tile: (lane, weight) -> bits 14..8."""
    found, values = [], [v & 0xFFFF for v in weight.escapes.tolist()]
    for tile, word in enumerate(weight.index.tolist()):
        at = weight.base.tolist()[tile // 4] + (word >> 20 & 0xFFF)
        first, second = word & 1023, word >> 10 & 1023
        mine = {}
        for i in range(first + second):
            lane, which = divmod(values[at + i] & 511, 16)
            mine[lane, which + (16 if i >= first else 0)] = values[at + i] >> 9
        found.append(mine)
    return found


def _word(weight: PackedWeight, tile: list[int], escapes: dict[tuple[int, int], int], lane: int, which: int) -> int:
    """The 16 bits of one weight."""
    low = tile[which // 16 * 512 + 16 * lane + which % 16]
    code, sign = (_of_p4 if weight.form == "p4" else _of_p3)(tile, lane, which)
    return sign << 15 | escapes.get((lane, which), weight.palette[code]) << 8 | low


def _of_p4(tile: list[int], lane: int, which: int) -> tuple[int, int]:
    """Code and sign."""
    v, i = divmod(which, 8)
    here = tile[1024 + 16 * lane + 4 * v :]
    return here[i // 2] >> 4 * (i % 2) & 7, here[i] >> 7 if i < 4 else here[i - 4] >> 3 & 1


def _of_p3(tile: list[int], lane: int, which: int) -> tuple[int, int]:
    """Code and sign."""
    u, i = divmod(which, 16)
    code = tile[1024 + 128 * u + 4 * lane + i % 8 // 2] >> (4 * (i % 2) + 2 * (i // 8)) & 3
    q, b = divmod(which, 4)
    return code, tile[1280 + 4 * lane + b] >> q & 1


@dataclass(frozen=True)
class Expected:
    """What a product must give, float64 [M, N]: the result, and the sum of |x| |W| and |b|."""

    y: torch.Tensor
    size: torch.Tensor


def matmul(inputs: Inputs) -> Expected:
    """The product, from the inputs' exact values."""
    x, weight = inputs.x.double(), inputs.weight.double()
    bias = torch.zeros(weight.shape[0]).double() if inputs.bias is None else inputs.bias.double()
    y = torch.stack([torch.stack([(row * column).sum() for column in weight]) for row in x]) + bias
    return Expected(y, x.abs() @ weight.abs().T + bias.abs())
