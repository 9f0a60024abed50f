"""What scorers make of attention: sums over queries, and their smoothing.

A model's fast attention never writes its weights down. They are computed again here, for the queries that a scorer
asks for, and a block of them at a time, so that memory does not grow with the square of the text. Padding gives no
attention and gets none.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tcw.kv import AttentionCall, Memory, Room

_WEIGHTS = 1 << 24  # attention weights computed at a time: 64 MiB of float32


def newest(call: AttentionCall, count: int) -> Tensor:
    """Numbers of the last `count` queries of a call, or of all if there are fewer: int64 [m]."""
    queries = call.queries.shape[2]
    return torch.arange(max(0, queries - count), queries, device=call.queries.device)


def attended(call: AttentionCall, rows: Tensor) -> Tensor:
    """Attention that each token gets, summed over the queries `rows` (int64 [m]) and the query heads of a group.

    Returns:
        float32 [B, G, n].
    """
    total = call.keys.new_zeros(call.keys.shape[:3], dtype=torch.float32)
    for some in _blocks(call, rows):
        weights = call.attention(some)
        if (real := real_queries(call, some)) is not None:
            weights = weights * real[:, :, None, :, None]
        total = total + weights.sum((2, 3))
    return total


def seen_by(call: AttentionCall, rows: Tensor) -> Tensor:
    """How many of the queries `rows` (int64 [m]) may look at each token: float32 [B, 1 or G, n]."""
    total = call.keys.new_zeros(1, dtype=torch.float32)
    for some in _blocks(call, rows):
        visible = call.visible(some)
        if (real := real_queries(call, some)) is not None:
            visible = visible & real[..., None]
        total = total + visible.sum(2)
    return total


def real_queries(call: AttentionCall, rows: Tensor) -> Tensor | None:
    """Which of the queries `rows` (int64 [m]) are no padding: bool [B, 1 or G, m]; None: all."""
    if call.real is None:
        return None
    return call.real[..., call.real.shape[-1] - call.queries.shape[2] :][..., rows]


def remembered(memory: Memory, name: str, call: AttentionCall) -> Tensor:
    """What is known of each token by that name, zeros at first: float32 [B, G, n]."""
    held = memory.tokens.get(name)
    return call.keys.new_zeros(call.keys.shape[:3], dtype=torch.float32) if held is None else held


def newest_position(call: AttentionCall) -> Tensor:
    """The position of each sequence's newest real token: int64 [B or 1]."""
    if call.real is None:
        return call.positions[:, -1]
    own = call.real[:, 0, call.real.shape[-1] - call.positions.shape[1] :]
    return call.positions.masked_fill(~own, 0).amax(-1)


def candidates(call: AttentionCall, room: Room) -> Tensor:
    """The real tokens of the room that are no sinks: bool [B or 1, 1 or G, n].

    When tokens age for the first time, sinks still lie where they lie in the text, behind the padding.
    """
    places = torch.arange(call.keys.shape[2], device=call.keys.device)
    if call.real is None:
        return ((places >= room.first) & (places < room.end))[None, None]
    return call.real & (call.real.long().cumsum(-1) > room.first) & (places < room.end)


def smoothed(values: Tensor, call: AttentionCall, room: Room, kernel: int) -> Tensor:
    """The mean over `kernel` candidates side by side, an odd number; what lies beyond the first and the last is zero.

    Args:
        values: float32 [B, G, n].
        call: whose tokens these are.
        room: where the candidates are; padding between two of them does not part them.
        kernel: 1 leaves the values as they are.

    Returns:
        float32 [B, G, n], zero for all but candidates.
    """
    if call.real is None:
        pooled = _mean_of_neighbours(values[..., room.first : room.end], kernel)
        return torch.nn.functional.pad(pooled, (room.first, values.shape[-1] - room.end))
    inside = candidates(call, room).expand_as(values)
    order = (~inside).to(torch.uint8).argsort(dim=-1, stable=True)  # candidates first
    pooled = _mean_of_neighbours((values * inside).gather(-1, order), kernel)
    return torch.zeros_like(values).scatter(-1, order, pooled) * inside


def _mean_of_neighbours(values: Tensor, kernel: int) -> Tensor:
    return torch.nn.functional.avg_pool1d(values, kernel, stride=1, padding=kernel // 2)


def _blocks(call: AttentionCall, rows: Tensor) -> Iterator[Tensor]:
    batch, heads = call.queries.shape[:2]
    size = max(1, _WEIGHTS // max(1, batch * heads * call.keys.shape[2]))
    if call.keys.is_meta:  # weights without contents take no room
        size = max(1, len(rows))
    return iter(rows.split(size)) if len(rows) else iter(())
