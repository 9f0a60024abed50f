"""Stores: how a group of heads holds its aged tokens. One format a file; this one has the interface and the plain one.

A store holds rectangles: as many tokens for each of B sequences and G heads. It never sees sinks or the window.
"""

import torch
from torch import Tensor


class Store:
    """Holds keys and values of aged tokens.

    Attributes:
        block: tokens are appended in multiples of this.
        wants_scores: `append` is to be given the scores of what it appends.
        folds: `fold` is to be given the tokens that are forgotten.
        shares_tokens: all heads must hold the same tokens: scores are averaged over heads.
        segments: parts, in the order of `read`, from which tokens are forgotten in proportion; () is one part.
    """

    block: int = 1
    wants_scores: bool = False
    folds: bool = False
    shares_tokens: bool = False

    @property
    def segments(self) -> tuple[int, ...]:
        """Tokens in each part, in the order of `read`."""
        return (len(self),)

    def __len__(self) -> int:
        """Tokens held, as many as `read` returns."""
        raise NotImplementedError

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor | None = None) -> Tensor | None:
        """Take over tokens that leave the window, oldest first.

        Args:
            keys: [B, G, m, D] after RoPE; the store must not keep a view of it.
            values: [B, G, m, Dv].
            positions: int64 [B, 1 or G, m], RoPE positions; -1 for padding.
            scores: float32 [B, G, m], where `wants_scores`.

        Returns:
            None if the tokens now lie in the order they came in. Otherwise int64 [B, G, len(self)]: for each token
            (or slot) held its number in "those held before, then the appended ones".
        """
        raise NotImplementedError

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys [B, G, n, D] and values [B, G, n, Dv], in the model's dtype."""
        raise NotImplementedError

    def keep(self, index: Tensor) -> None:
        """Forget all tokens but those numbered `index`, int64 [B, G, m], ascending within each of `segments`."""
        raise NotImplementedError

    def fold(self, keys: Tensor, values: Tensor, real: Tensor | None) -> None:
        """Be told of tokens that are forgotten: [B, G, m, D]; `real` is bool [B, G, m], False for padding."""

    def folded(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Stand-ins for forgotten tokens, or None: keys [B, G, k, D], values [B, G, k, Dv], and what to add to logits.

        That is float32 [B, G, k], -inf where there is nothing to stand in for.
        """
        return None

    def bias(self, queries: Tensor, scaling: float) -> Tensor | None:
        """What to add to the logits of `read`'s tokens, [B, H, q, n], for queries [B, H, q, D]; None: nothing."""
        return None

    def select_rows(self, rows: Tensor) -> None:
        """Keep the sequences `rows`, int64 [B'], in that order; one may appear more than once."""
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """Every tensor held, scales, tables and positions included: their storages are counted."""
        raise NotImplementedError


def pick(held: Tensor, index: Tensor) -> Tensor:
    """Take tokens `index` [B or 1, G or 1, m] of `held` [B or 1, G or 1, n, ...]: a copy [B, G, m, ...]."""
    rows, heads = max(held.shape[0], index.shape[0]), max(held.shape[1], index.shape[1])
    rest = held.shape[3:]
    index = index.reshape(*index.shape, *[1] * len(rest)).expand(rows, heads, -1, *rest)
    return held.expand(rows, heads, *held.shape[2:]).gather(2, index)


class DenseStore(Store):
    """Tokens as they are."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor | None = None) -> Tensor | None:
        """Copy the tokens."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys.clone(), values.clone()
        else:
            self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
        return None

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values, not copied."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def keep(self, index: Tensor) -> None:
        """Copy the chosen ones."""
        keys, values = self.read()
        self.keys, self.values = pick(keys, index), pick(values, index)

    def select_rows(self, rows: Tensor) -> None:
        """Copy the chosen sequences."""
        if len(self):
            keys, values = self.read()
            self.keys, self.values = keys.index_select(0, rows), values.index_select(0, rows)

    def tensors(self) -> list[Tensor]:
        """Keys and values."""
        return [t for t in (self.keys, self.values) if t is not None]
