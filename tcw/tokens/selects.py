"""Which k of N tokens stay. Every factory here makes a `Select`: context, scores or None, k -> int64 [k], ascending.

    top_k, windows_top_k        the highest scores, of all or of each window
    grid                        evenly over the image
    max_min, max_sum            far apart from each other
    mmr, dpp                    high scores and far apart
    bipartite_dedup             what is left when the most alike are removed, a few at a time
    important_then_diverse      some by score, the others as above

Of equal tokens the first is taken, always.
"""

import math
from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tcw.tokens import Select
from tcw.tokens._similarity import Cosine, Features, here
from tcw.tokens.context import Context
from tcw.tokens.scores import min_max

_PAPER = 576  # tokens of an image in LLaVA-1.5
ISOLATED, UNLIKE_MEAN = "isolated", "unlike-mean"
SPENT = 1e-4
"""A determinant that grows by less than this factor is at the end of what float32 can tell (`dpp`)."""


def ranked(scores: Tensor) -> Tensor:
    """Tokens by falling score, of equal ones the first first: int64 [N]."""
    return scores.float().sort(stable=True, descending=True).indices


def top_k() -> Select:
    """The k highest scores."""

    def select(context: Context, scores: Tensor | None, k: int) -> Tensor:
        return ranked(_needed(scores))[:k].sort().values

    return select


def windows_top_k(across: int = 3) -> Select:
    """The highest scores of each of `across` x `across` windows of a frame, as many of each as there are.

    The best of each window, then the second best, and so on; the last round goes to the windows with the higher ones.
    """

    def select(context: Context, scores: Tensor | None, k: int) -> Tensor:
        order = ranked(_needed(scores))
        window = windows(context, across)[order]
        order, window = order[window.argsort(stable=True)], window.sort(stable=True).values
        starts = torch.searchsorted(window, window)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - starts
        by_score = ranked(_needed(scores))
        return by_score[rank[by_score].argsort(stable=True)][:k].sort().values

    return select


def windows(context: Context, across: int) -> Tensor:
    """The number of the window that each token is in: int64 [N]; `across` x `across` to a frame."""
    frame, row, column = context.place.long().unbind(1)
    down, right = (one * across // _extent(frame, one) for one in (row, column))
    return (frame * across + down) * across + right


def _extent(frame: Tensor, line: Tensor) -> Tensor:
    """How many rows (or columns) the frame of each token has."""
    most = torch.zeros(int(frame.max()) + 1, dtype=line.dtype, device=line.device)
    return most.scatter_reduce(0, frame, line + 1, "amax")[frame]


def grid() -> Select:
    """Tokens evenly over frames, over the rows of a frame and over the columns of a row; needs no scores.

    Rows and columns are taken in the proportion of the image. Works with what earlier cuts have left, too.
    """

    def select(context: Context, scores: Tensor | None, k: int) -> Tensor:
        frame, row, column = context.place.unbind(1)
        groups = _runs(frame)
        kept = []
        for tokens, count in zip(groups, _shares([len(one) for one in groups], k), strict=True):
            if count:
                lines = _runs(row[tokens])
                taken = _evenly(len(lines), _lines(len(lines), [len(one) for one in lines], count))
                lines = [tokens[lines[i]] for i in taken]
                for line, n in zip(lines, _shares([len(one) for one in lines], count), strict=True):
                    kept += [line[column[line].argsort(stable=True)][_evenly(len(line), n)]]
        return torch.cat(kept).sort().values

    return select


def _runs(keys: Tensor) -> list[Tensor]:
    """Positions of each distinct key, keys ascending."""
    return [(keys == key).nonzero()[:, 0] for key in keys.unique()]


def _evenly(count: int, n: int) -> list[int]:
    """`n` of `count` places, evenly, as far from the first end as from the other."""
    return [(2 * i + 1) * count // (2 * n) for i in range(n)]


def _lines(count: int, lengths: list[int], k: int) -> int:
    """How many of `count` rows are used for `k` tokens: as dense as columns, and enough of them."""
    wanted = round(math.sqrt(k * count * count / sum(lengths)))
    wanted = min(max(wanted, 1), count, k)
    while sum(lengths[i] for i in _evenly(count, wanted)) < k:
        wanted += 1
    return wanted


def _shares(lengths: list[int], k: int) -> list[int]:
    """Divide `k` in proportion to `lengths`, what is left over evenly among them."""
    ends = [0, *accumulate(lengths)]
    until = [(2 * end * k + ends[-1]) // (2 * ends[-1]) for end in ends]
    return [b - a for a, b in pairwise(until)]


def max_min(first: str = ISOLATED, features: Features = here) -> Select:
    """Greedy k-centre: each token is the one whose nearest chosen one is farthest. Distance is 1 - cosine.

    With scores (0 or more), a token's distance counts as many times as its score. `first`: "isolated", the token whose
    nearest other one is farthest (DivPrune), or "unlike-mean", the one least like the mean direction (ours). O(N) each.
    """

    def select(context: Context, scores: Tensor | None, k: int) -> Tensor:
        cosine = Cosine(features(context))
        weight = 1.0 if scores is None else scores.float()
        gap = torch.full((context.tokens,), torch.inf, device=context.x.device)

        def value(newest: int) -> Tensor:
            torch.minimum(gap, (1 - cosine.row(newest)).clamp(min=0), out=gap)
            return gap * weight

        return _greedy(_first(cosine, first), k, context, value)

    return select


def max_sum(first: str = UNLIKE_MEAN, features: Features = here) -> Select:
    """Greedy max-sum diversification: each token is the one farthest from all chosen ones together (1 - cosine)."""

    def select(context: Context, scores: Tensor | None, k: int) -> Tensor:
        cosine = Cosine(features(context))
        total = torch.zeros(context.tokens, device=context.x.device)

        def value(newest: int) -> Tensor:
            return total.add_(1 - cosine.row(newest))

        return _greedy(_first(cosine, first), k, context, value)

    return select


def mmr(lam: float = 0.5, features: Features = here) -> Select:
    """Maximal marginal relevance: argmax λ · score - (1 - λ) · cosine with the most similar chosen one.

    Scores are brought to 0..1; the first is the highest score.
    """

    def select(context: Context, scores: Tensor | None, k: int) -> Tensor:
        importance = min_max(_needed(scores))
        cosine = Cosine(features(context))
        nearest = torch.full_like(importance, -torch.inf)

        def value(newest: int) -> Tensor:
            torch.maximum(nearest, cosine.row(newest), out=nearest)
            return lam * importance - (1 - lam) * nearest

        return _greedy(int(importance.argmax()), k, context, value)

    return select


def dpp(features: Features = here) -> Select:
    """Greedy most probable set of a determinantal point process with kernel diag(r) cos diag(r), r the scores in 0..1.

    Each token is the one that makes the determinant grow most, with one row of a Cholesky factor a step (Chen et al.,
    NeurIPS 2018): O(N k). Where it can no longer grow (more tokens than dimensions, copies), the highest scores follow.
    """

    def select(context: Context, scores: Tensor | None, k: int) -> Tensor:
        cosine = Cosine(features(context))
        r = torch.ones(context.tokens, device=context.x.device) if scores is None else min_max(scores)
        left = r.square() * cosine.units.any(1)
        factor = torch.zeros(k, context.tokens, device=context.x.device)
        chosen: list[int] = []
        while len(chosen) < k and float((relative := _growth(left, r)).max()) > SPENT:
            newest = int(torch.where(relative > SPENT, left, -torch.inf).argmax())
            n = len(chosen)
            row = r[newest] * r * cosine.row(newest) - factor[:n, newest] @ factor[:n]
            factor[n] = row / left[newest].sqrt()
            left = left - factor[n].square()
            left[newest] = -torch.inf
            chosen.append(newest)
        return _filled(chosen, r, k)

    return select


def _growth(left: Tensor, r: Tensor) -> Tensor:
    """What is left of each token's own kernel entry: 0..1."""
    return left / r.square().clamp(min=torch.finfo(torch.float32).tiny)


def bipartite_dedup(removed: int = 8, features: Features = here) -> Select:
    """Remove the most alike, at most `removed` a round, until k are left (VisPruner). Needs no scores.

    The tokens that are left, in their order, are dealt to two sides in turn; those of the first side go that are most
    similar to one of the second.
    """

    def select(context: Context, scores: Tensor | None, k: int) -> Tensor:
        everything = torch.arange(context.tokens, device=context.x.device)
        return deduplicated(Cosine(features(context)), everything, k, removed)

    return select


def deduplicated(cosine: Cosine, tokens: Tensor, k: int, removed: int) -> Tensor:
    """`bipartite_dedup` of some tokens (int64, ascending): those k of them that are left."""
    if not k:
        return tokens[:0]
    while len(tokens) > k:
        here, there = tokens[::2], tokens[1::2]
        alike, _ = cosine.nearest(here, there)
        go = ranked(alike)[: min(removed, len(tokens) - k)]
        stays = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        stays[2 * go] = False
        tokens = tokens[stays]
    return tokens


def important_then_diverse(important: float = 0.5, removed: int = 8, features: Features = here) -> Select:
    """The share `important` of k by score (one at least), the others by `bipartite_dedup` of the rest (VisPruner).

    `removed` is for the 576 tokens of the paper; of more tokens more go in a round, or the work grows with their cube.
    """

    def select(context: Context, scores: Tensor | None, k: int) -> Tensor:
        order = ranked(_needed(scores))
        top = min(k, max(1, math.floor(important * k + 0.5)))
        round_ = max(removed, context.tokens * removed // _PAPER)
        rest = deduplicated(Cosine(features(context)), order[top:].sort().values, k - top, round_)
        return torch.cat([order[:top], rest]).sort().values

    return select


def _greedy(first: int, k: int, context: Context, value: Callable[[int], Tensor]) -> Tensor:
    """`first`, then k - 1 times the token with the highest `value(newest chosen)` that is not chosen yet."""
    taken = torch.zeros(context.tokens, dtype=torch.bool, device=context.x.device)
    newest = first
    for _ in range(k - 1):
        taken[newest] = True
        newest = int(value(newest).masked_fill(taken, -torch.inf).argmax())
    taken[newest] = True
    return taken.nonzero()[:, 0]


def _first(cosine: Cosine, how: str) -> int:
    return cosine.isolated() if how == ISOLATED else cosine.unlike_mean()


def _filled(chosen: list[int], scores: Tensor, k: int) -> Tensor:
    """`chosen`, and of the others the highest scores, until they are k."""
    taken = torch.tensor(chosen, dtype=torch.int64, device=scores.device)
    order = ranked(scores.index_fill(0, taken, -torch.inf))
    return torch.cat([taken, order[: k - len(chosen)]]).sort().values


def _needed(scores: Tensor | None) -> Tensor:
    assert scores is not None, "this selection goes by scores"
    return scores
