"""Bipartite soft matching, what ToMe and its kin merge by, and the shares of tokens that a run of merges leaves.

Tokens in turn go to A (the 1st, 3rd, ...) and B (2nd, 4th, ...). Each of A has one edge: to the most similar of B. The
strongest edges are merged. Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, section 3.1.
"""

import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.tokens._similarity import most_similar, unit
from tcw.tokens.plan import Plan
from tcw.tokens.selects import ranked

_HALVINGS = 60  # of an interval: as far as float64 goes
_ROUNDING = 1e-9  # of shares


def edges(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The edge of each token of A: its cosine float32 [a], its token and the one of B, int64 [a]; none of one token.

    `features` is [N, C].
    """
    tokens = torch.arange(len(features), device=features.device)
    a, b = tokens[::2], tokens[1::2]
    if len(b) == 0:
        return features.new_zeros(0, dtype=torch.float32), tokens[:0], tokens[:0]
    alike, place = most_similar(unit(features), a, b)
    return alike, a, b[place]


def merged(sources: Tensor, targets: Tensor, size: Tensor) -> Plan:
    """Merge each token of `sources` into the one of `targets`, which no edge leaves: means count by size [N]."""
    stands = torch.arange(len(size), device=size.device)
    stands[sources] = targets
    stays = torch.ones(len(size), dtype=torch.bool, device=size.device)
    stays[sources] = False
    number = stays.cumsum(0) - 1
    return Plan.merging(stays.nonzero()[:, 0], number[stands], size)


def matched(features: Tensor, size: Tensor, k: int, most: float = 0.5) -> Plan:
    """Merge along the strongest edges until k of N tokens are left.

    One matching merges the share `most` of the tokens (half at most, one at least); where that is not enough, what is
    left is matched again, by the means of its features.
    """
    plan = Plan.everything(size)
    while plan.kept > k:
        alike, a, b = edges(features)
        best = ranked(alike)[: min(plan.kept - k, max(1, int(plan.kept * most)))]
        step = merged(a[best], b[best], plan.size)
        features = step.apply(features)
        plan = plan.then(step)
    return plan


def shares(keep: float, weights: list[float]) -> list[float]:
    """What is left after each of a run of merges, as shares of N; after the last it is `keep`.

        s ← max(s - r · weight, s / 2)

    Raises UsageError where halving the tokens at each step would leave more than `keep`.
    """

    def run(r: float) -> list[float]:
        found, s = [], 1.0
        for weight in weights:
            s = max(s - r * weight, s / 2) if weight > 0 else s
            found.append(s)
        return found

    low, high = 0.0, 1.0 / min((weight for weight in weights if weight > 0), default=1.0)
    if run(high)[-1] > keep:
        raise UsageError(
            f"`keep={keep:g}`: {len(weights)} blocks that merge half of the tokens at most leave {run(high)[-1]:.3g}",
            "keep more, begin at an earlier block, or merge in one place (`tome:schedule=single`)",
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if run(middle)[-1] > keep else (low, middle)
    return [keep if abs(s - keep) < _ROUNDING else s for s in run(high)]
