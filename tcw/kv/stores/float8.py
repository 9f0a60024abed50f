"""Keys and values in FP8, E4M3: a byte an element and one scale a head.

    x̂ = scale·e4m3(x / scale)        |x̂ - x| <= max(|x| / 16, scale / 1024)

The scale is set by the first tokens that come, so that the largest lies 8 times below E4M3's limit of 448; a float's
range makes that headroom free. What exceeds it all the same becomes the limit, never NaN. Micikevicius et al., FP8
Formats for Deep Learning, 2022, https://arxiv.org/abs/2209.05433.
"""

import torch
from torch import Tensor

from tcw.kv.stores import Store, pick
from tcw.kv.stores._grids import unit_of

LARGEST = 448.0
HEADROOM = 8.0  # times the largest of the first tokens


class Floats8:
    """The keys, or the values, of a group: codes uint8 [B, G, n, D] and scale float32 [B, G, 1, 1]."""

    def __init__(self) -> None:
        self.codes: Tensor | None = None
        self.scale: Tensor | None = None
        self._dtype = torch.float32

    def append(self, x: Tensor) -> None:
        """Round x [B, G, m, D]."""
        self._dtype, x = x.dtype, x.detach().float()
        if self.scale is None:
            self.scale = unit_of(x) * (HEADROOM / LARGEST)
        scaled = (x / self.scale).clamp_(-LARGEST, LARGEST)
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)  # bytes: not every device gathers FP8
        self.codes = codes if self.codes is None else torch.cat([self.codes, codes], 2)

    def read(self) -> Tensor:
        """All tokens, in the dtype of those that were appended last."""
        assert self.codes is not None
        assert self.scale is not None
        limit = torch.finfo(self._dtype).max
        x = self.codes.view(torch.float8_e4m3fn).float().mul_(self.scale)
        return x.clamp_(-limit, limit).to(self._dtype)


class Float8Store(Store):
    """Keys and values as FP8 codes."""

    def __init__(self) -> None:
        self.keys, self.values = Floats8(), Floats8()

    def __len__(self) -> int:
        return 0 if self.keys.codes is None else self.keys.codes.shape[2]

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor | None = None) -> Tensor | None:
        """Round the tokens."""
        self.keys.append(keys)
        self.values.append(values)
        return None

    def read(self) -> tuple[Tensor, Tensor]:
        """All tokens."""
        return self.keys.read(), self.values.read()

    def keep(self, index: Tensor) -> None:
        """Gather codes."""
        for held in (self.keys, self.values):
            assert held.codes is not None
            held.codes = pick(held.codes, index)

    def select_rows(self, rows: Tensor) -> None:
        """Gather sequences."""
        for held in (self.keys, self.values):
            if held.codes is not None and held.scale is not None:
                held.codes, held.scale = held.codes.index_select(0, rows), held.scale.index_select(0, rows)

    def tensors(self) -> list[Tensor]:
        """Codes and scales."""
        held = (self.keys.codes, self.keys.scale, self.values.codes, self.values.scale)
        return [t for t in held if t is not None]
