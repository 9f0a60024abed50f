"""Ward's linkage: in the middle of the vision tower, merge tokens into k groups, each its mean.

    cost(A, B) = |A||B| / (|A| + |B|) · ‖mean A - mean B‖²
    merge the two groups with the lowest cost until k are left

Ward, Hierarchical Grouping to Optimize an Objective Function, JASA 58 (1963): what is merged first is what adds least
to the squared distance of all tokens to their group's mean. A token counts as often as it stands for original ones,
and so does a group as a key from there on (tcw/tokens/tower.py). That this is done to the tokens of a vision tower is
ours: bipartite matching (`tome`) is made for a few merges in each block, and done all at once it puts unlike tokens
together. Tokens are compared by what they are in the block, at length 1. A group stands where the token nearest to its
mean does.

The place matters more than the groups: in the first quarter of a tower, tokens are not yet what they will be, and no
way of grouping them holds when all are made there. `cuts` above 1 shares the merges out over as many blocks, evenly
around `depth`; that costs about the same FLOPs and keeps more, and each cut takes the time of a linkage
(benchmarks/tokens_quality.py). Where the tower of a vision-language model needs its whole grid (Qwen-VL), the groups
are made at the language model's input. Calibration: none.

Groups that are each other's cheapest partner can be merged in any order without changing the tree (Ward's cost never
falls when groups are merged), so all such pairs of a round are merged at once.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tcw.methods import option
from tcw.tokens import INPUT, Shape, Stage, TokenMethod, block
from tcw.tokens._similarity import unit
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan

_ZERO = 1e-12  # of the squared lengths: below that, two groups are the same


@dataclass(frozen=True)
class Ward(TokenMethod):
    """Merge tokens into groups that vary least, in the middle of the vision tower."""

    paper: ClassVar[str] = "doi 10.1080/01621459.1963.10500845"
    static: ClassVar[bool] = True

    depth: float = option(0.5, "where, 0..1 of the tower's blocks; of several cuts, their middle")
    cuts: int = option(1, "in how many blocks, each merging as many tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cuts < 1:
            raise ValueError(f"`cuts` is 1 or more, got {self.cuts}")
        if not 0 <= self.depth < 1:
            raise ValueError(f"`depth` is 0 or more and below 1, got {self.depth:g}")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """A cut in the middle of each of `cuts` equal parts of the blocks around `depth`."""
        if not shape.merges_inside:
            return (Stage(INPUT, _plan, self.keep),)
        reach = min(self.depth, 1 - self.depth)
        left: dict[int, float] = {}
        for n in range(self.cuts):  # of several in one block, the last
            place = self.depth + reach * ((2 * n + 1) / self.cuts - 1)
            left[int(place * shape.blocks + 1e-6)] = 1 - (1 - self.keep) * (n + 1) / self.cuts
        return tuple(Stage(block(number), _plan, share) for number, share in left.items())


def _plan(context: Context, k: int | None) -> Plan:
    assert k is not None, "a share is given"
    x = unit(context.x)
    return means(x, linkage(x, context.size, k), context.size)


def means(x: Tensor, group: Tensor, size: Tensor) -> Plan:
    """Each group of tokens as its mean, at the place of the token nearest to it; of several the first.

    Args:
        x: float32 [N, C], what tokens are compared by.
        group: int64 [N], 0..k-1.
        size: float32 [N], what tokens count.
    """
    k = int(group.max()) + 1
    total = torch.zeros(k, device=x.device).index_add_(0, group, size)
    centre = torch.zeros(k, x.shape[1], device=x.device).index_add_(0, group, x * size[:, None]) / total[:, None]
    order = (x - centre[group]).square().sum(1).sort(stable=True).indices
    order = order[group[order].sort(stable=True).indices]
    head = order[torch.searchsorted(group[order], torch.arange(k, device=x.device))]
    rank = torch.empty_like(head)
    rank[head.argsort()] = torch.arange(k, device=x.device)
    return Plan.merging(head.sort().values, rank[group], size)


def linkage(x: Tensor, size: Tensor, k: int) -> Tensor:
    """Ward's linkage of the rows of `x` [N, C], each counting `size` [N] times: int64 [N], groups 0..k-1.

    Groups are numbered by their first tokens. O(N²) memory; on a CPU N = 256 takes about 20 ms, N = 1369 half a second.
    """
    tokens = len(x)
    centre, weight = x.double(), size.double()
    first = torch.arange(tokens, device=x.device)
    height = torch.zeros_like(weight)
    tree: list[tuple[Tensor, Tensor, Tensor]] = []  # heights, and the first tokens of what is merged
    while len(first) > 1:
        cost = _costs(centre, weight)
        if sum(int((merged[0] < cost.min()).sum()) for merged in tree) >= tokens - k:
            break  # what is merged from here on is above the cut
        a, b = _mutual(cost)
        high = torch.maximum(cost[a, b], torch.maximum(height[a], height[b]))  # rounding must not lower a parent
        tree.append((high, first[a], first[b]))
        both = weight[a] + weight[b]
        centre[a] = (centre[a] * weight[a, None] + centre[b] * weight[b, None]) / both[:, None]
        weight[a], height[a] = both, high
        stays = torch.ones(len(first), dtype=torch.bool, device=x.device)
        stays[b] = False
        centre, weight, first, height = centre[stays], weight[stays], first[stays], height[stays]
    return _cut(tree, tokens, k).to(x.device)


def _costs(centre: Tensor, weight: Tensor) -> Tensor:
    """Ward's cost of merging any two groups: float64 [n, n], symmetric, infinite on the diagonal."""
    square = centre.square().sum(1)
    sums = square[:, None] + square
    far = sums - 2 * centre @ centre.T
    far = torch.where(far <= _ZERO * sums, 0.0, far)
    cost = torch.minimum(far, far.T) * (weight[:, None] * weight / (weight[:, None] + weight))
    return cost.fill_diagonal_(torch.inf)


def _mutual(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Groups that are each other's cheapest partner, the first of each pair and the second.

    Of equally cheap partners of group i, j is the one with the lowest i xor j. That is the same seen from j, so there
    is always a pair; and where all groups are alike, all are paired.
    """
    number = torch.arange(len(cost), device=cost.device)
    tie = torch.where(cost == cost.min(1, keepdim=True).values, number[:, None] ^ number, len(cost) * 2)
    partner = tie.fill_diagonal_(len(cost) * 2).argmin(1)
    first = (partner[partner] == number) & (number < partner)
    return number[first], partner[first]


def _cut(tree: list[tuple[Tensor, Tensor, Tensor]], tokens: int, k: int) -> Tensor:
    """The groups after the `tokens - k` lowest merges: int64 [N]."""
    root = list(range(tokens))
    if tree:
        height, a, b = (torch.cat(column) for column in zip(*tree, strict=True))
        for one in height.sort(stable=True).indices[: tokens - k].tolist():
            root[int(b[one])] = int(a[one])
    for token in range(tokens):  # a group's first token is its root, and comes before the others
        root[token] = root[root[token]]
    return torch.tensor(root).unique(return_inverse=True)[1]
