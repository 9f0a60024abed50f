"""What the kept tokens take in of the others. Every factory here makes a `Merge`: context, kept tokens -> `Plan`.

    drop            nothing
    nearest_mean    each other token goes into the most similar kept one, which becomes the mean
    ot              each other token is shared out over the kept ones (optimal transport)

Two give kept tokens and what they take in at once: `clusters` (DPC-kNN) and `linked` (trees from frame to frame).
Means count a token as often as the number of original tokens that it stands for.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from tcw.tokens import Merge
from tcw.tokens._similarity import Features, here, most_similar, unit
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan
from tcw.tokens.selects import ranked


def drop() -> Merge:
    """Forget the others."""

    def merge(context: Context, keep: Tensor) -> Plan:
        return Plan.dropping(keep, context.size)

    return merge


def into_nearest(
    context: Context,
    keep: Tensor,
    takers: Tensor | None = None,
    given: Tensor | None = None,
    features: Features = here,
) -> Plan:
    """Each token that is not kept goes into the most similar (cosine) kept one; of equally similar ones the first.

    Args:
        context: the image.
        keep: int64 [K], ascending.
        takers: which of `keep` take in others, bool [K]; None: all. If none does, the others are dropped.
        given: which tokens are given to them, bool [N]; the rest is dropped. None: all.
        features: what is compared.
    """
    own = torch.arange(len(keep), device=keep.device)
    assign = torch.full((context.tokens,), -1, dtype=torch.int64, device=keep.device)
    assign[keep] = own
    others = assign < 0 if given is None else (assign < 0) & given
    numbers = own if takers is None else own[takers]
    if len(numbers) and bool(others.any()):
        tokens = others.nonzero()[:, 0]
        _, place = most_similar(unit(features(context)), tokens, keep[numbers])
        assign[tokens] = numbers[place]
    return Plan.merging(keep, assign, context.size)


def nearest_mean(features: Features = here) -> Merge:
    """Each other token goes into the most similar kept one, which becomes the mean of all that it stands for."""

    def merge(context: Context, keep: Tensor) -> Plan:
        return into_nearest(context, keep, features=features)

    return merge


def ot(epsilon: float = 0.1, distance: float = 0.5, rounds: int = 100, tolerance: float = 1e-2) -> Merge:
    """Each other token is shared out over the kept ones by entropic optimal transport (AOT).

        cost = (1 - cosine) + `distance` · how far apart they are, the image being 1 x 1

    Where we differ: with uniform marginals a column of the plan holds 1/K of the mass, and the update that the authors
    write moves a token by less than a percent. Here each other token gives away exactly itself (rows sum to its size).
    """

    def merge(context: Context, keep: Tensor) -> Plan:
        others = torch.ones(context.tokens, dtype=torch.bool, device=keep.device)
        others[keep] = False
        tokens = others.nonzero()[:, 0]
        units, spot = unit(context.x), _spots(context)
        cost = (1 - units[tokens] @ units[keep].T) + distance * _apart(spot[tokens], spot[keep])
        return shared(context, keep, tokens, transport(cost, epsilon, rounds, tolerance))

    return merge


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances of rows, out of one product: [len(a), len(b)]."""
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return squares.clamp(min=0).sqrt()


def _spots(context: Context) -> Tensor:
    """Row and column of each token, the image being 1 x 1: [N, 2]."""
    _, rows, columns = context.grid
    return context.place[:, 1:] / torch.tensor([max(rows, 1), max(columns, 1)], device=context.place.device)


def transport(cost: Tensor, epsilon: float, rounds: int = 100, tolerance: float = 1e-2) -> Tensor:
    """Sinkhorn's plan for `cost` [n, m], all n and all m alike: float32 [n, m], each row made to sum to 1.

    In logarithms, so that no cost is too high. Stops when the rows' potentials change by less than `tolerance` (mean).
    """
    kernel = -cost.float() / epsilon
    rows, columns = kernel.new_zeros(len(cost)), kernel.new_zeros(cost.shape[1])
    if not cost.numel():
        return kernel
    for _ in range(rounds):
        columns = -math.log(cost.shape[1]) - (kernel + rows[:, None]).logsumexp(0)
        before, rows = rows, -math.log(len(cost)) - (kernel + columns).logsumexp(1)
        if float((rows - before).abs().mean()) < tolerance:
            break
    return (kernel + columns).softmax(1)


def shared(context: Context, keep: Tensor, given: Tensor, shares: Tensor) -> Plan:
    """Kept tokens `keep` int64 [K] take in the tokens `given` int64 [n] by `shares` [n, K], rows of which sum to 1.

    A kept token becomes the mean of itself and what it is given, by size. Tokens in neither are dropped.
    """
    mass = shares.float().T * context.size[given]
    mix = torch.zeros(len(keep), context.tokens, device=keep.device)
    mix[:, given] = mass
    mix[torch.arange(len(keep), device=keep.device), keep] = context.size[keep].float()
    size = mix.sum(1)
    assign = torch.full((context.tokens,), -1, dtype=torch.int64, device=keep.device)
    if len(given):
        assign[given] = shares.argmax(1)
    assign[keep] = torch.arange(len(keep), device=keep.device)
    return Plan(keep, assign, context.size, size, mix / size[:, None])


def dpc_knn(features: Tensor, k: int, neighbours: int = 7) -> tuple[Tensor, Tensor]:
    """Density peaks (Du et al., 2016): k centres of `features` [N, C], and the centre that each token is nearest to.

        density = exp(-mean squared distance to the nearest `neighbours`) · peak = distance to the nearest denser one

    The k highest products are the centres. Distances are Euclidean, over their mean (ours: the authors divide by √C,
    and then the scale of the features decides what is dense). Returns int64 [k], ascending, and int64 [N], numbers
    of centres.
    """
    x = features.float() - features.float().mean(0)
    far = _apart(x, x).fill_diagonal_(0)
    far = far / far.mean().clamp(min=torch.finfo(torch.float32).tiny)
    nearest = far.topk(min(neighbours + 1, len(x)), largest=False).values[:, 1:]
    crowd = nearest.square().mean(1) if nearest.shape[1] else far.new_zeros(len(x))
    order = ranked(-crowd)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    peak = torch.where(rank[None] < rank[:, None], far, torch.inf).min(1).values
    peak = torch.where(peak.isinf(), far.max(), peak)
    centres = ranked((-crowd).exp() * peak)[:k].sort().values
    assign = far[:, centres].argmin(1)
    assign[centres] = torch.arange(len(centres), device=assign.device)
    return centres, assign


def clusters(context: Context, k: int, neighbours: int = 7, features: Features = here) -> Plan:
    """Make k clusters (`dpc_knn`), each the mean of its tokens at its centre's place."""
    centres, assign = dpc_knn(features(context), k, neighbours)
    return Plan.merging(centres, assign, context.size)


def linked(
    context: Context, threshold: float, free: Tensor | None = None, roots: int = 1, features: Features = here
) -> Tensor:
    """Trees from frame to frame: the root of each token, int64 [N] (FlashVID).

    A token links to the most similar (cosine) one of the frame before, if that is above `threshold`, else it is a root.

    Args:
        context: the image.
        threshold: see above.
        free: tokens that may be linked and linked to, bool [N]; None: all. The others are their own roots.
        roots: so many of the free tokens stay roots at least: then only the most similar are linked.
        features: what is compared.
    """
    tokens = torch.arange(context.tokens, device=context.x.device)
    free = torch.ones_like(tokens, dtype=torch.bool) if free is None else free
    frame, units = context.place[:, 0], unit(features(context))
    parent, alike = tokens.clone(), torch.full((context.tokens,), -torch.inf, device=context.x.device)
    found = [tokens[free & (frame == one)] for one in frame.unique()]
    for before, now in pairwise(found):
        if len(before) and len(now):
            alike[now], place = most_similar(units, now, before)
            parent[now] = before[place]
    strong = ranked(alike)[: max(0, int(free.sum()) - roots)]
    stays = torch.zeros_like(free)
    stays[strong] = alike[strong] > threshold
    parent = torch.where(stays, parent, tokens)
    for _ in range(max(1, len(found).bit_length())):
        parent = parent[parent]
    return parent
