"""Compensated: forgotten tokens leave their mean behind, in one slot.

    k̂ = mean of the forgotten keys (after RoPE),  v̂ = mean of their values,  N = how many they are
    out = (N·e^{q·k̂}·v̂ + Σ_kept e^{q·k_j}·v_j) / (N·e^{q·k̂} + Σ_kept e^{q·k_j})

so the slot is one more token whose logit is raised by log N. Tang et al., RazorAttention, ICLR 2025,
https://arxiv.org/abs/2407.15891, section 3.3. The means are kept in float32 and updated as more tokens are forgotten;
padding does not count.
"""

import torch
from torch import Tensor

from tcw.kv.stores import Store


class Compensated(Store):
    """Another store, and the mean of what it forgot."""

    folds = True

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.block, self.wants_scores, self.shares_tokens = inner.block, inner.wants_scores, inner.shares_tokens
        self.keys: Tensor | None = None  # float32 [B, G, 1, D]
        self.values: Tensor | None = None  # float32 [B, G, 1, Dv]
        self.count: Tensor | None = None  # float32 [B, G, 1]
        self._dtype = torch.float32

    @property
    def segments(self) -> tuple[int, ...]:
        """As the inner store has them."""
        return self.inner.segments

    def __len__(self) -> int:
        return len(self.inner)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor | None = None) -> Tensor | None:
        """Pass them to the inner store."""
        return self.inner.append(keys, values, positions, scores)

    def read(self) -> tuple[Tensor, Tensor]:
        """The inner store's tokens; the slot is not among them."""
        return self.inner.read()

    def keep(self, index: Tensor) -> None:
        """As the inner store does."""
        self.inner.keep(index)

    def bias(self, queries: Tensor, scaling: float) -> Tensor | None:
        """As the inner store has it."""
        return self.inner.bias(queries, scaling)

    def fold(self, keys: Tensor, values: Tensor, real: Tensor | None) -> None:
        """Move the means towards the tokens that are forgotten now."""
        there = torch.ones_like(keys[..., :1], dtype=torch.float32) if real is None else real[..., None].float()
        more = there.sum(2)
        if self.count is None or self.keys is None or self.values is None:
            self._dtype, self.count = keys.dtype, torch.zeros_like(more)
            self.keys, self.values = (torch.zeros_like(x[:, :, :1], dtype=torch.float32) for x in (keys, values))
        self.count = self.count + more
        share = 1 / self.count.clamp(min=1)[..., None]
        self.keys = self.keys + ((keys.float() - self.keys) * there).sum(2, keepdim=True) * share
        self.values = self.values + ((values.float() - self.values) * there).sum(2, keepdim=True) * share

    def folded(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The slot: keys [B, G, 1, D], values [B, G, 1, Dv] and log N, float32 [B, G, 1]."""
        if self.keys is None or self.values is None or self.count is None:
            return None
        return self.keys.to(self._dtype), self.values.to(self._dtype), self.count.log()

    def select_rows(self, rows: Tensor) -> None:
        """Keep those sequences, of the inner store and of the means."""
        self.inner.select_rows(rows)
        if self.keys is not None and self.values is not None and self.count is not None:
            self.keys, self.values, self.count = (x.index_select(0, rows) for x in (self.keys, self.values, self.count))

    def tensors(self) -> list[Tensor]:
        """The inner store's, the means and how many tokens they stand for."""
        return self.inner.tensors() + [t for t in (self.keys, self.values, self.count) if t is not None]
