"""Positions of tokens, their gathering into shorter rows, and masks over what layers still hold."""

import torch
from torch import Tensor

from tcw.errors import UsageError


def padded(rows: list[Tensor], fill: int = -1) -> Tensor:
    """Rows of different lengths (int64 [n]) as one [B, L], filled up at the left."""
    length = max(len(row) for row in rows)
    out = rows[0].new_full((len(rows), length), fill)
    for b, row in enumerate(rows):
        out[b, length - len(row) :] = row
    return out


def gathered(x: Tensor, index: Tensor) -> Tensor:
    """`x` [B, S, ...] at `index` [B, L]; zeros where that is -1. A batch of 1 in `x` serves all rows."""
    x = x.expand(len(index), *x.shape[1:])
    rows = torch.arange(len(index), device=index.device)[:, None]
    found = x[rows, index.clamp(min=0)]
    missing = (index < 0).reshape(*index.shape, *[1] * (x.dim() - 2))
    return found.masked_fill(missing, 0)


def at_rows(x: Tensor, index: Tensor) -> Tensor:
    """`gathered` for what has axes before the batch: [..., B, S, d] (cosines, sines, positions of several axes)."""
    if x.dim() == 3:
        return gathered(x, index)
    return torch.stack([at_rows(part, index) for part in x])


def full(position_ids: Tensor | None, batch: int, length: int, seen: int, device: torch.device) -> Tensor:
    """Positions of this call's tokens, [axes, B, S], as the model has or would count them.

    Of four rows (Qwen's text positions and three axes) the first is left out: it only serves packed sequences.
    """
    if position_ids is None:
        position_ids = torch.arange(seen, seen + length, device=device)[None]
    if position_ids.dim() == 2:
        position_ids = position_ids[None]
    if position_ids.shape[0] == 4:
        position_ids = position_ids[1:]
    return position_ids.expand(-1, batch, -1)


def closed(positions: Tensor, real: Tensor, start: Tensor | None) -> Tensor:
    """Positions with their gaps closed, [axes, B, L].

    A position that no token of the row has on any axis is taken out, so that the order on each axis and the equality of
    a text token's axes stay; with one axis that is 0, 1, 2, ... `start` [B]: where rows go on (None: their first).
    """
    out = torch.zeros_like(positions)
    for b in range(positions.shape[1]):
        mine = positions[:, b, real[b]]
        if not mine.numel():
            continue
        used, rank = torch.unique(mine, return_inverse=True)
        out[:, b, real[b]] = rank + (used[0] if start is None else start[b])
    return out


def after(positions: Tensor, real: Tensor, before: Tensor | None) -> Tensor:
    """The position that comes next in each row: [B]."""
    highest = positions.amax(0).masked_fill(~real, -1).amax(-1) + 1
    return highest if before is None else torch.where(real.any(-1), highest, before)


def visible(queries: Tensor, keys: Tensor, implementation: str, like: Tensor) -> Tensor | None:
    """The mask of a layer in the form that its attention takes, from numbers of tokens in the text (-1: padding).

    Args:
        queries: int64 [B, q], ascending in each row.
        keys: int64 [B, k], those of earlier calls and of this one.
        implementation: the name of the attention function.
        like: gives the dtype.
    """
    complete = bool((keys >= 0).all())
    if implementation.startswith("flash"):
        return None if complete else (keys >= 0)
    eager = "eager" in implementation
    if complete and (queries.shape[1] == 1 or (not eager and queries.shape == keys.shape)):
        return None  # a single query sees all; SDPA makes a plainly causal mask itself
    seen = (keys[:, None, :] >= 0) & (keys[:, None, :] <= queries[:, :, None])
    seen = (seen | (queries < 0)[:, :, None])[:, None]  # a row that sees nothing is not a number, and that spreads
    if not eager:
        return seen
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, torch.finfo(like.dtype).min)


def real_of(attention_mask: object, embeds: Tensor, held: int) -> Tensor:
    """Which tokens are no padding: bool [B, all tokens so far]; `held`: tokens before those of `embeds` [B, S, D].

    Raises UsageError for a mask of another form.
    """
    batch, length = embeds.shape[:2]
    if attention_mask is None:
        return torch.ones(batch, held + length, dtype=torch.bool, device=embeds.device)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise UsageError(
            "a token policy needs the attention mask as [batch, tokens]", "pass the mask that the processor returns"
        )
    return attention_mask.bool()


def following(real: Tensor, start: Tensor) -> Tensor:
    """Positions of tokens [B, S] that go on at `start` [B]: [1, B, S]."""
    return ((real.cumsum(1) - 1).clamp(min=0) + start[:, None])[None]
