"""A linear layer that decodes and multiplies some rows of its weight at a time: no scratch for all of it at once."""

import math
from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import linear

from tcw.codecs.lanes_layout import CHUNK
from tcw.kernels.lanes_decode import Group, decode
from tcw.runtime.arena import Arena
from tcw.runtime.coded import Coded


class SlicedLinear(nn.Module):  # type: ignore[misc]
    """A linear layer, y = x Wᵀ + b; `weight` is W as it stands in the code, which any operation sees decoded."""

    def __init__(self, weight: Coded, bias: nn.Parameter | None, arena: Arena) -> None:
        """Cut W, the only stream of its group, into slices that the scratch holds, at rows that begin a chunk."""
        super().__init__()
        part = weight.store
        self.out_features, self.in_features = part.shape
        self.weight, self.bias, self._arena = weight, bias, arena
        step = CHUNK // math.gcd(CHUNK, self.in_features)
        room = arena.memory.numel() // (self.in_features * part.group.dtype.itemsize)
        rows = max(step, room // step * step)
        ends = [*range(rows, self.out_features, rows), self.out_features]
        self._slices = [
            _cut(part.group, begin * self.in_features, end * self.in_features)
            for begin, end in zip([0, *ends], ends, strict=False)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        first, kept = self._slices[0], torch.is_grad_enabled()  # gradients need every slice until the end
        with self._arena.lend(first.numel * first.dtype.itemsize) as memory:
            outs = [None if kept else memory.view(first.dtype)[: part.numel] for part in self._slices]
            found = [
                linear(x, decode(part, out=out).view(-1, self.in_features))
                for part, out in zip(self._slices, outs, strict=True)
            ]
        y = torch.cat(found, -1)
        return y if self.bias is None else y + self.bias


def _cut(group: Group, begin: int, end: int) -> Group:
    """Words begin..end of a group of one stream, as a group: the same codes, other units. `begin` begins a chunk."""
    first_unit = group.units[0].cpu()
    size = int(first_unit[1] - first_unit[0])
    first, last = begin // CHUNK, -(-end // CHUNK)
    chunks = torch.arange(first, last, size)
    words = chunks * CHUNK, ((chunks + size) * CHUNK).clamp(max=end)
    rows = [chunks, (chunks + size).clamp(max=last), *words, torch.zeros_like(chunks), words[0] - begin]
    units = torch.stack(rows, dim=1).to(group.device)
    return replace(group, starts=(0,), sizes=(end - begin,), numel=end - begin, units=units)
