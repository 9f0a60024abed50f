"""Small random attention calls, the same call behind padding, and attention by plain loops in double precision."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from tcw.kv import AttentionCall, Memory, Room, Scorer


def random_call(
    batch: int = 1, kv_heads: int = 2, shared: int = 2, queries: int = 12, held: int = 20, dim: int = 8,
    softcap: float | None = None, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0,
) -> AttentionCall:  # fmt: skip
    """A call of `queries` tokens over `held`, without padding."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=made) * scale).to(dtype)

    positions = torch.arange(held - queries, held).expand(batch, -1)
    return AttentionCall(
        normal(batch, kv_heads * shared, queries, dim), normal(batch, kv_heads, held, dim),
        normal(batch, kv_heads, held, dim + 2), None, positions, dim**-0.5, softcap, held - queries,
    )  # fmt: skip


def behind_padding(call: AttentionCall, padding: int) -> AttentionCall:
    """The same prompt with `padding` tokens of nonsense before it, and a second sequence that is all text."""
    other = random_call(
        1, call.keys.shape[1], call.queries.shape[1] // call.keys.shape[1], call.queries.shape[2] + padding,
        call.keys.shape[2] + padding, call.keys.shape[3], seed=99, dtype=call.keys.dtype,
    )  # fmt: skip

    def joined(mine: Tensor, theirs: Tensor) -> Tensor:
        return torch.cat([torch.cat([theirs[:, :, :padding] * 3, mine], 2), theirs])

    real = torch.ones(2, 1, other.keys.shape[2], dtype=torch.bool)
    real[0, :, :padding] = False
    first = torch.cat([torch.full((1, padding), 1), call.positions], 1)
    return replace(
        call, queries=joined(call.queries, other.queries), keys=joined(call.keys, other.keys),
        values=joined(call.values, other.values), real=real, positions=torch.cat([first, other.positions]),
    )  # fmt: skip


def attention(call: AttentionCall) -> list[list[list[list[float]]]]:
    """Attention [B][H][q][n] by the definition."""
    queries, keys = call.queries.double(), call.keys.double()
    batch, heads, rows, _ = queries.shape
    kv_heads, held = keys.shape[1:3]

    def row(b: int, h: int, i: int) -> list[float]:
        group, weights = h // (heads // kv_heads), []
        for j in range(held):
            logit = sum((queries[b, h, i] * keys[b, group, j]).tolist()) * call.scaling
            if call.softcap is not None:
                logit = call.softcap * math.tanh(logit / call.softcap)
            weights.append(math.exp(logit) if j <= held - rows + i else 0.0)
        return [w / sum(weights) for w in weights]

    return [[[row(b, h, i) for i in range(rows)] for h in range(heads)] for b in range(batch)]


def summed(weights: list[list[list[list[float]]]], kv_heads: int, rows: list[int]) -> list[list[list[float]]]:
    """[B][G][n]: attention of `rows`, summed over them and the query heads of a key-value head."""
    shared = len(weights[0]) // kv_heads
    return [
        [
            [
                sum(sequence[g * shared + r][i][j] for r in range(shared) for i in rows)
                for j in range(len(sequence[0][0]))
            ]
            for g in range(kv_heads)
        ]
        for sequence in weights
    ]


def scored(scorer: Scorer | None, call: AttentionCall, first: int = 2, window: int = 4, keep: int = 3) -> Tensor:
    """What a scorer makes of a first call."""
    assert scorer is not None
    memory = Memory()
    scorer.observe(call, memory)
    return scorer.score(call, memory, room_of(call, first, window, keep))


def room_of(call: AttentionCall, first: int = 2, window: int = 4, keep: int = 3) -> Room:
    """All between the sinks and the window."""
    return Room(first, call.keys.shape[2] - window, keep)


def assert_padding_changes_nothing(scorer: Scorer | None, call: AttentionCall, padding: int = 5) -> None:
    """The scores of the tokens in the room are those that the prompt has alone."""
    room = room_of(call)
    alone, padded = scored(scorer, call), scored(scorer, behind_padding(call, padding))
    assert torch.isfinite(padded[:, :, padding:]).all()
    torch.testing.assert_close(
        padded[:1, :, padding + room.first : padding + room.end], alone[:, :, room.first : room.end],
        atol=1e-6, rtol=1e-6,
    )  # fmt: skip
