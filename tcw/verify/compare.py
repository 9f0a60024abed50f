"""How far apart two outputs are: in bits, in the largest element, in nats, in the most likely token.

Everything is computed in float64, some rows at a time, so a vocabulary of 256,000 needs no large memory.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tcw.verify.verdict import Sequence

_BLOCK = 1 << 22  # elements in float64 at a time
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class _Distance:
    """Sums over rows; `largest` is NaN once a difference was no number."""

    largest: float
    kl: float
    top1: float


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Say whether dtype, shape and every bit agree: NaN equals the same NaN, 0.0 is not -0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = _INTEGERS[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def compare(
    label: str,
    reference: torch.Tensor,
    artifact: torch.Tensor,
    *,
    logits: bool,
    perplexity: tuple[float, float] | None = None,
) -> Sequence:
    """Compare the outputs [..., width] of two models for one input.

    Args:
        label: the input, for a person.
        reference: the output of the reference.
        artifact: the output of the artifact.
        logits: whether rows are logits, so that KL and top-1 have a meaning.
        perplexity: of both models on this input, when it is text.
    """
    width = reference.shape[-1] if reference.dim() else 1
    positions = reference.numel() // max(width, 1)
    if same_bits(reference, artifact):
        return _sequence(label, positions, _Distance(0.0, 0.0, positions), logits, perplexity, True)
    if reference.shape != artifact.shape:
        return _sequence(label, positions, _Distance(math.nan, math.nan, math.nan), logits, perplexity)
    distance = _distance(reference.reshape(-1, width), artifact.reshape(-1, width))
    return _sequence(label, positions, distance, logits, perplexity)


def kl_rows(reference: torch.Tensor, artifact: torch.Tensor) -> torch.Tensor:
    """KL(reference || artifact) in nats for each row of logits, float64 [rows].

    A token that the reference gives no probability (a logit of -inf) adds nothing.
    """
    p, q = (torch.log_softmax(t.double(), dim=-1) for t in (reference, artifact))
    terms = p.exp() * (p - q)
    return torch.where(torch.isneginf(p), 0.0, terms).sum(dim=-1)


def nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of -log p(target), in nats, for logits [rows, vocabulary] and targets [rows], in float64."""
    total = 0.0
    for rows in _blocks(logits):
        block = logits[rows].double()
        total += float((torch.logsumexp(block, dim=-1) - block.gather(1, targets[rows, None])[:, 0]).sum())
    return total


def worst(gaps: list[float]) -> float:
    """The largest, or NaN as soon as one is no number."""
    return math.nan if any(map(math.isnan, gaps)) else max(gaps, default=0.0)


def _sequence(
    label: str,
    positions: int,
    distance: _Distance,
    logits: bool,
    perplexity: tuple[float, float] | None,
    identical: bool = False,
) -> Sequence:
    kl, top1 = (distance.kl / max(positions, 1), distance.top1 / max(positions, 1)) if logits else (None, None)
    return Sequence(label, positions, identical, distance.largest, kl, top1, perplexity)


def _distance(reference: torch.Tensor, artifact: torch.Tensor) -> _Distance:
    largest, kl, top1 = 0.0, 0.0, 0.0
    for rows in _blocks(reference):
        a, b = reference[rows].double(), artifact[rows].double()
        # equal infinities are no distance, though inf - inf is no number
        gap = torch.where(a == b, 0.0, (a - b).abs())
        largest = worst([largest, float(gap.max()) if gap.numel() else 0.0])
        kl += float(kl_rows(a, b).sum())
        top1 += int((a.argmax(dim=-1) == b.argmax(dim=-1)).sum())
    return _Distance(largest, kl, top1)


def _blocks(table: torch.Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK // max(table.shape[-1], 1))
    return (slice(first, first + step) for first in range(0, table.shape[0], step))
