"""Packed weights made plain again in torch: what runs where there is no kernel, on any device."""

import torch
from tcw.kernels.packed_matmul.layout import COLUMNS, ROWS, PackedWeight, rowed, slabs


def unpack_in_torch(weight: PackedWeight, out: torch.Tensor) -> None:
    """Write the weights to `out`, BF16 [N, K], contiguous, on the weight's device."""
    palette = torch.tensor(weight.palette, dtype=torch.uint8, device=weight.device)
    wide = -(-weight.shape[1] // COLUMNS)
    words = out.view(torch.uint8).view(*weight.shape, 2)
    for rows in slabs(weight.shape):
        tiles = slice(rows.start // ROWS * wide, -(-rows.stop // ROWS) * wide)
        low, high = _decoded(weight, tiles, palette)
        for byte, values in enumerate((low, high)):
            words[rows, :, byte] = rowed(values, wide)[: rows.stop - rows.start, : weight.shape[1]]


def _decoded(weight: PackedWeight, tiles: slice, palette: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high bytes [tiles, lane, weight]."""
    data = weight.tiles[tiles]
    low = data[:, :1024].view(-1, 2, 32, 16).transpose(1, 2).reshape(-1, 32, 32)
    codes, signs = {"p3": _codes3, "p4": _codes4}[weight.form](data[:, 1024:])
    upper = palette.index_select(0, codes.flatten().int()).view(-1, 32, 2, 16).transpose(1, 2).contiguous()
    half, escapes = _escapes(weight, tiles)
    upper.view(-1)[half * 512 + (escapes & 511)] = (escapes >> 9 & 127).to(torch.uint8)
    return low, upper.transpose(1, 2).reshape(-1, 32, 32) | signs << 7


def _escapes(weight: PackedWeight, tiles: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each escape of some tiles, int64: the half of a tile, counted from the first of them, and its entry."""
    word, base = weight.index[tiles], weight.base.long().repeat_interleave(4)[: len(weight.index)][tiles]
    first = base + (word >> 20 & 0xFFF)
    counts = torch.stack([word & 1023, word >> 10 & 1023], dim=1).long()
    starts = torch.stack([first, first + counts[:, 0]], dim=1).flatten()
    counts = counts.flatten()
    half = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    at = torch.arange(len(half), device=counts.device) + (starts - before)[half]
    return half, weight.escapes[at].long()


def _codes4(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and signs [tiles, lane, weight] from bytes [tiles, 512]."""
    data = data.view(-1, 32, 4, 4)
    codes = torch.stack([data & 7, data >> 4 & 7], dim=-1)
    return codes.view(-1, 32, 32), torch.stack([data >> 7, data >> 3 & 1], dim=3).view(-1, 32, 32)


def _codes3(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and signs [tiles, lane, weight] from bytes [tiles, 384]."""
    planes = data[:, :256].view(-1, 2, 32, 4).transpose(1, 2)
    halves = [torch.stack([planes >> s & 3, planes >> s + 4 & 3], dim=-1).flatten(3) for s in (0, 2)]
    sign = data[:, 256:].view(-1, 32, 1, 4)
    signs = sign >> torch.arange(8, dtype=torch.uint8, device=data.device).view(1, 1, 8, 1) & 1
    return torch.stack(halves, dim=3).view(-1, 32, 32), signs.reshape(-1, 32, 32)
