"""Masks for what a cache still holds, out of the mask over every token that was seen.

A mask is bool (True: visible) or added to the logits, [B, 1 or H, q, tokens]; None hides nothing but, with several
queries, the future.
"""

import torch
from torch import Tensor


def columns(
    mask: Tensor | None, real: Tensor | None, query: Tensor, kv_heads: int, held: int, new: int
) -> Tensor | None:
    """The mask over tokens that are held.

    Args:
        mask: over all tokens seen.
        real: bool [B, 1 or kv_heads, held], False for padding; None: there is none.
        query: [B, H, q, D].
        kv_heads: of the tokens held.
        held: how many tokens those are.
        new: how many of them, the last ones, are this call's own.

    Of this call's tokens each query sees what `mask` says; of older ones all that are real.
    """
    q, heads = query.shape[2], query.shape[1]
    if mask is None:
        return None if q == 1 or held == q else _causal(q, held, query.device)
    if mask.shape[-1] == held and real is None:
        return mask
    fresh, old = mask[..., mask.shape[-1] - new :], real
    if old is None:
        visible = torch.ones(1, 1, held - new, dtype=torch.bool, device=mask.device)
    else:
        visible = old[..., : held - new]
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(heads // kv_heads, 1)
    past = visible[:, :, None].expand(len(mask), -1, q, -1)
    if mask.dtype != torch.bool:
        past = torch.zeros_like(past, dtype=mask.dtype).masked_fill(~past, torch.finfo(mask.dtype).min)
    shape = torch.broadcast_shapes(past.shape[:3], fresh.shape[:3])
    return torch.cat([past.expand(*shape, -1), fresh.expand(*shape, -1)], -1)


def added(mask: Tensor | None, bias: Tensor | None, query: Tensor, held: int) -> Tensor:
    """The mask in its additive form, plus `bias` [B, H, q, held]."""
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        mask = query.new_zeros(1, 1, query.shape[2], held)
    elif mask.dtype == torch.bool:
        mask = query.new_zeros(mask.shape).masked_fill(~mask, lowest)
    return mask if bias is None else (mask + bias.to(mask.dtype)).clamp(min=lowest)


def _causal(q: int, held: int, device: torch.device) -> Tensor:
    at = torch.arange(held, device=device) - (held - q)
    return (at[None] <= torch.arange(q, device=device)[:, None])[None, None]
