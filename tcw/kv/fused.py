"""Attention of a new token over packed keys and values without unpacking them: part by part, on a GPU.

Of the tokens in a part, attention needs no more than its own result and how much weight the part has:

    out = Σ_t e^{l_t} v_t / Σ_t e^{l_t}         lse = log Σ_t e^{l_t}         l_t = scaling·q·k_t

for over parts i the result is Σ_i e^{lse_i} out_i / Σ_i e^{lse_i}. The store's part comes from a kernel that reads
codes (`tcw.kernels.kv_dequant_attention`), that of sinks and window from plain torch, in float32. Letters of shapes are
those of `tcw.kv`.
"""

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from tcw.kernels.kv_dequant_attention import BITS, ROWS, Packed, kv_dequant_attention
from tcw.kv.stores import Store
from tcw.kv.stores.integers import Integers, IntegerStore
from tcw.kv.stores.tiered import TieredStore

Part = tuple[Tensor, Tensor]  # float32 out [B, H, q, Dv] and lse [B, H, q]; 0 and -inf where nothing is seen
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WIDEST = 256  # channels: more leave no room for a tile in shared memory


def can_fuse(store: Store, query: Tensor, softcap: float | None = None) -> bool:
    """Say whether the kernel serves this store for `query` [B, H, q, D]: q is 1, on an NVIDIA GPU from Ampere on."""
    return (
        query.shape[2] == 1 and softcap is None and query.is_cuda and _has_kernel(query.device) and fits(store, query)
    )


def fits(store: Store, query: Tensor) -> bool:
    """Say whether the kernel knows how the store holds its tokens, and has room for the query; on any device."""
    if query.dtype not in _DTYPES or (torch.is_grad_enabled() and query.requires_grad):
        return False
    parts = _integers(store)
    return bool(parts) and all(
        part.fusible and all(_knows(side) for side in (part.keys, part.values)) and _rows(part, query) <= ROWS
        for part in parts
    )


def attend(store: Store, query: Tensor, scaling: float, real: Tensor | None) -> Part:
    """Attention of `query` [B, H, q, D] over all tokens of a store that `fits`.

    `real` is bool [B, 1 or G, n] for tokens in the order of `read`, False for padding; None: there is none.
    """
    parts, first = [], 0
    for part in _integers(store):
        seen = None if real is None else real[..., first : first + len(part)]
        parts.append(kv_dequant_attention(query, _packed(part.keys), _packed(part.values), scaling, seen))
        first += len(part)
    return merge(parts)


def dense_part(query: Tensor, keys: Tensor, values: Tensor, scaling: float, visible: Tensor | None) -> Part:
    """Attention of `query` [B, H, q, D] over `keys` [B, G, n, D] and `values` [B, G, n, Dv] of any dtype, in float32.

    `visible` is bool [B, 1 or G, 1 or q, n]; None: each query sees all.
    """
    (batch, heads, q, _), groups = query.shape, keys.shape[1]
    grouped = query.float().unflatten(1, (groups, heads // groups))
    logits = grouped @ keys.float().unsqueeze(2).transpose(-1, -2) * scaling
    if visible is not None:
        logits = logits.masked_fill(~visible.unsqueeze(2), -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)  # NaN where nothing is visible
    out = weights @ values.float().unsqueeze(2)
    return out.reshape(batch, heads, q, -1), logits.logsumexp(-1).reshape(batch, heads, q)


def merge(parts: Sequence[Part]) -> Part:
    """Attention over the tokens of all parts together; at least one."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    weights = lses.softmax(0).nan_to_num(0.0)  # NaN where no part has anything
    outs = torch.stack([out for out, _ in parts])
    return (weights[..., None] * outs).sum(0), lses.logsumexp(0)


def attention(
    query: Tensor,
    sinks: tuple[Tensor, Tensor] | None,
    store: Store,
    window: tuple[Tensor, Tensor],
    scaling: float,
    real: Tensor | None,
) -> Tensor:
    """Attention of one new token a sequence, `query` [B, H, 1, D], over all that a group holds: [B, 1, H, Dv].

    Args:
        query: after RoPE.
        sinks: keys [B, G, s, D] and values [B, G, s, Dv], or None.
        store: one that `can_fuse`.
        window: keys and values, those of the new token among them.
        scaling: what q·k is multiplied with.
        real: bool [B, 1 or G, n], False for padding among sinks, store and window; None: there is none.

    Returns:
        In the dtype of the query.
    """
    first = 0 if sinks is None else sinks[0].shape[2]
    end = first + len(store)
    keys, values = window if sinks is None else (torch.cat([s, w], 2) for s, w in zip(sinks, window, strict=True))
    stored = visible = None
    if real is not None:
        stored, visible = real[..., first:end], torch.cat([real[..., :first], real[..., end:]], -1).unsqueeze(2)
    out, _ = merge([attend(store, query, scaling, stored), dense_part(query, keys, values, scaling, visible)])
    return out.to(query.dtype).transpose(1, 2)


def _integers(store: Store) -> list[IntegerStore]:
    """The stores of codes that a store is made of, in the order of `read`, without empty ones; [] for another kind."""
    stores = [store.high, store.low] if isinstance(store, TieredStore) else [store]
    found = [part for part in stores if isinstance(part, IntegerStore)]
    return [part for part in found if len(part)] if len(found) == len(stores) else []


def _knows(side: Integers) -> bool:
    """Say whether the kernel reads such codes: `tokens` and `channels` that share a grid are powers of two, or all."""
    grid = side.grid
    shared = [(grid.channels, side.dim)] + ([(grid.tokens, len(side))] if side.blocks is None else [])
    even = all(count >= most or count & (count - 1) == 0 for count, most in shared)
    return grid.bits in BITS and side.dim <= _WIDEST and even


def _rows(part: IntegerStore, query: Tensor) -> int:
    """Rows of queries that look at one head."""
    assert part.keys.codes is not None
    return query.shape[1] // part.keys.codes.shape[1] * query.shape[2]


def _packed(side: Integers) -> Packed:
    """Keys or values as the kernel takes them: the very tensors that are held."""
    assert side.codes is not None
    return Packed(
        side.codes, side.minimum, side.step, side.grid.bits, side.dim, side.grid.tokens, side.grid.channels or side.dim,
        side.blocks, side.scale,
    )  # fmt: skip


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    """Say whether Triton is installed and compiles for this GPU what was tried."""
    return (
        importlib.util.find_spec("triton") is not None
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
