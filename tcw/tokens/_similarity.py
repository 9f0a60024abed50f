"""Cosine similarity of one image's tokens, and far-apart points: what scores, selects and merges are made of."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from tcw.tokens.context import Context

AT_ONCE = 4096
"""So many tokens or fewer: all similarities are computed in one product (64 MiB), else a few rows at a time."""

Features = Callable[[Context], Tensor]
"""A context -> float [N, C]: what tokens are compared by."""


def here(context: Context) -> Tensor:
    """Compare tokens by what they are at this stage."""
    return context.x


def tower_keys(context: Context) -> Tensor:
    """Compare tokens by the keys of the tower's last layer that has run, mean over heads."""
    assert context.tower is not None, "the stage asks for the last layer"
    return context.tower.keys(-1)


def unit(x: Tensor) -> Tensor:
    """Rows of `x` [N, C] in float32 at length 1; a row of zeros stays."""
    return functional.normalize(x.float(), dim=-1)


class Cosine:
    """Cosine similarities of N features [N, C], in float32. A token without a direction is like nothing: 0."""

    def __init__(self, features: Tensor) -> None:
        self.units = unit(features)
        self._all = self.units @ self.units.T if len(self.units) <= AT_ONCE else None

    def row(self, token: int) -> Tensor:
        """Similarity of all to one: [N]."""
        return self._all[token] if self._all is not None else self.units @ self.units[token]

    def nearest(self, tokens: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
        """What `most_similar` gives."""
        if self._all is None:
            return most_similar(self.units, tokens, among)
        best = self._all.index_select(0, tokens).index_select(1, among).max(1)
        return best.values, best.indices

    def isolated(self) -> int:
        """The token whose most similar other one is least similar; of several the first."""
        return int(torch.cat([block.max(1).values for block in self.others()]).argmin())

    def others(self) -> Iterator[Tensor]:
        """Similarities of some tokens after others to all [m, N], that to themselves -inf."""
        tokens = torch.arange(len(self.units), device=self.units.device)
        for some in tokens.split(AT_ONCE):
            block = self.units[some] @ self.units.T if self._all is None else self._all[some]
            block[torch.arange(len(some), device=some.device), some] = -torch.inf
            yield block

    def unlike_mean(self) -> int:
        """The token that is least similar to the mean direction; of several the first."""
        return int((self.units @ self.units.mean(0)).argmin())


def most_similar(units: Tensor, tokens: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `tokens` int64 [m] how similar the most similar one of `among` int64 [n] is, and its place there.

    Of equally similar ones the first. `units`: what `unit` gave. Returns float32 [m] and int64 [m].
    """
    best = [(units[some] @ units[among].T).max(1) for some in tokens.split(AT_ONCE)]
    return torch.cat([one.values for one in best]), torch.cat([one.indices for one in best])


def farthest_points(x: Tensor, count: int) -> Tensor:
    """`count` rows of `x` [N, C], each the farthest (Euclid) from those before: int64 [count], in that order.

    The first is the one farthest from the mean of all, so that nothing is drawn at random. O(N C) a step.
    """
    x = x.float()
    gap = torch.linalg.vector_norm(x - x.mean(0), dim=1)
    chosen = [int(gap.argmax())]
    gap = torch.full_like(gap, torch.inf)
    gap[chosen[0]] = -torch.inf
    while len(chosen) < count:
        gap = torch.minimum(gap, torch.linalg.vector_norm(x - x[chosen[-1]], dim=1))
        chosen.append(int(gap.argmax()))
        gap[chosen[-1]] = -torch.inf
    return torch.tensor(chosen, device=x.device)
