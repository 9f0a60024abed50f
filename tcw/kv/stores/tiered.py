"""Two stores: one for the tokens that matter, a cheaper one for the others.

Of every m tokens appended, each head puts the round(share·m) with the highest scores into the first store and the rest
into the second. `read` gives the first store's tokens, then the second's.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tcw.kv.stores import Store, pick


class TieredStore(Store):
    """Tokens in two tiers, by their scores."""

    wants_scores = True

    def __init__(self, make_high: Callable[[], Store], make_low: Callable[[], Store], share: float) -> None:
        """`share` of the tokens go where `make_high` says."""
        self.high, self.low = make_high(), make_low()
        self.share = share

    @property
    def segments(self) -> tuple[int, ...]:
        """Tokens in each tier."""
        return (len(self.high), len(self.low))

    def __len__(self) -> int:
        return len(self.high) + len(self.low)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor | None = None) -> Tensor | None:
        """Divide the tokens by their scores, of equal ones the later is higher; padding is low."""
        assert scores is not None
        batch, heads, count = keys.shape[:3]
        highs, held = len(self.high), len(self)
        ranked = scores.masked_fill(positions < 0, -torch.inf).expand(batch, heads, -1)
        order = count - 1 - ranked.flip(-1).argsort(dim=-1, descending=True, stable=True)
        salient = round(self.share * count)
        chosen, rest = order[..., :salient].sort(-1).values, order[..., salient:].sort(-1).values
        for store, index in ((self.high, chosen), (self.low, rest)):
            if index.shape[2]:
                store.append(pick(keys, index), pick(values, index), pick(positions, index))
        old = torch.arange(held, device=keys.device).expand(batch, heads, -1)
        return torch.cat([old[..., :highs], chosen + held, old[..., highs:], rest + held], 2)

    def read(self) -> tuple[Tensor, Tensor]:
        """Tokens of the first tier, then of the second."""
        parts = [store.read() for store in (self.high, self.low) if len(store)]
        return torch.cat([keys for keys, _ in parts], 2), torch.cat([values for _, values in parts], 2)

    def keep(self, index: Tensor) -> None:
        """Forget in both tiers: of m tokens that stay, round(m·len(first) / len(both)) are of the first."""
        highs, held = len(self.high), len(self)
        salient = round(index.shape[2] * highs / held) if held else 0
        if highs:
            self.high.keep(index[..., :salient])
        if len(self.low):
            self.low.keep(index[..., salient:] - highs)

    def select_rows(self, rows: Tensor) -> None:
        """Of both tiers."""
        self.high.select_rows(rows)
        self.low.select_rows(rows)

    def tensors(self) -> list[Tensor]:
        """Of both tiers."""
        return self.high.tensors() + self.low.tensors()
