"""What one group of heads holds: sinks | store | window, and how tokens pass from one to the next."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tcw.kv import AttentionCall, Group, KVMethod, Memory, Room, Scorer
from tcw.kv.attention import Attention
from tcw.kv.masks import added, columns
from tcw.kv.rope import Rope
from tcw.kv.stores import Store, pick

Pair = tuple[Tensor, Tensor]  # keys [B, G, n, D] and values [B, G, n, Dv]


@dataclass(frozen=True)
class GroupParts:
    """How a group of heads is held.

    Attributes:
        group: its heads and their budget.
        query_heads, kv_heads: int64, which of the layer's they are; None: all of them.
        scorer: chooses what stays.
        new_store: makes an empty store.
        counts: the method that may keep fewer tokens than the budget allows.
        sinks, window, interval: as in KVMethod.
        turns: rotates keys to their place in the cache; None: they stay where they were in the text.
        track: keep the position of every token, for `positions`.
    """

    group: Group
    query_heads: Tensor | None
    kv_heads: Tensor | None
    scorer: Scorer
    new_store: Callable[[], Store]
    counts: KVMethod
    sinks: int
    window: int
    interval: int
    turns: Rope | None = None
    track: bool = False


class HeadGroup:
    """The tokens of one group of heads of one layer.

    Attributes:
        sinks, window: exact keys and values; `sinks` is None until the first token leaves the window.
        store: what lies between them.
        real: bool [B, 1 or G, n], False for padding; None while there was none.
        newest: int32 [B or 1, w], RoPE positions of the window.
        places: int32 [B or 1, 1 or G, n - w], those of sinks and store, where they are tracked.
    """

    def __init__(self, parts: GroupParts) -> None:
        self.parts = parts
        self.store = parts.new_store()
        self.memory = Memory()
        self.sinks: Pair | None = None
        self.window: Pair | None = None
        self.real: Tensor | None = None
        self.newest: Tensor | None = None
        self.places: Tensor | None = None
        self._tracks = parts.track or parts.turns is not None

    @property
    def exact(self) -> Pair:
        """The window, once there is one."""
        assert self.window is not None
        return self.window

    @property
    def aside(self) -> int:
        """Tokens among the sinks."""
        return 0 if self.sinks is None else self.sinks[0].shape[2]

    def __len__(self) -> int:
        return self.aside + len(self.store) + (0 if self.window is None else self.window[0].shape[2])

    def positions(self) -> Tensor:
        """RoPE positions of all tokens held, int32 [B or 1, 1 or G, n]. Only where they are tracked."""
        assert self.newest is not None
        return self.newest[:, None] if self.places is None else join(self.places, self.newest[:, None])

    def extend(self, keys: Tensor, values: Tensor, real: Tensor | None, positions: Tensor) -> None:
        """Let a call's tokens, [B, G, q, D], join the window: `real` bool [B, q], `positions` int64 [B or 1, q]."""
        before, new = len(self), keys.shape[2]
        if self.window is None:
            self.window = (_owned(keys), _owned(values))
        else:
            self.window = (torch.cat([self.window[0], keys], 2), torch.cat([self.window[1], values], 2))
        if self.real is None and real is not None and not bool(real.all()):
            self.real = torch.ones(len(keys), 1, before, dtype=torch.bool, device=keys.device)
        if self.real is not None:
            self.real = join(self.real, self.real.new_ones(len(keys), 1, new) if real is None else real[:, None])
        fresh = positions.int()
        self.newest = fresh if self.newest is None else join(self.newest[:, None], fresh[:, None])[:, 0]
        for name, held in self.memory.tokens.items():
            self.memory.tokens[name] = torch.cat([held, held.new_zeros(*held.shape[:2], new)], 2)

    def read(self) -> Pair:
        """Keys and values of all tokens held, oldest first."""
        parts = [p for p in (self.sinks, self.store.read() if len(self.store) else None, self.exact) if p is not None]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([p[0] for p in parts], 2), torch.cat([p[1] for p in parts], 2)

    def step(
        self,
        base: Attention,
        module: torch.nn.Module,
        query: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        before: int,
        seen: "int | list[int]",
        **kwargs: Any,
    ) -> Tensor:
        """Attention of a call whose tokens have joined the window, [B, q, H, Dv]; then tokens age.

        `mask` and `query` as in `attend`, `positions` and `before` as in AttentionCall, `seen` as in `age`.
        """
        softcap, scaling = kwargs.get("softcap"), kwargs["scaling"]
        plain = kwargs.get("s_aux") is None and (mask is None or self.real is not None)  # no learned sinks, no own mask
        if plain and self._on_gpu(query) and self._rests(query):
            from tcw.kv import fused

            if fused.can_fuse(self.store, query, softcap):
                return fused.attention(query, self.sinks, self.store, self.exact, scaling, self.real)
        out, held = self.attend(base, module, query, mask, positions.shape[1], **kwargs)
        call = AttentionCall(query, *held, self.real, positions, scaling, softcap, before)
        self.parts.scorer.observe(call, self.memory)
        self.age(call, seen)
        return out

    @staticmethod
    def _on_gpu(query: Tensor) -> bool:
        return query.is_cuda

    def _rests(self, query: Tensor) -> bool:
        """Whether nobody wants to see the keys of this call: no scorer, no token that ages, no rotation."""
        idle = type(self.parts.scorer).observe is Scorer.observe and self.parts.turns is None
        return idle and len(self.store) > 0 and query.shape[2] == 1 and not self._leaving(1)

    def attend(
        self, base: Attention, module: torch.nn.Module, query: Tensor, mask: Tensor | None, new: int, **kwargs: Any
    ) -> tuple[Tensor, Pair]:
        """Attention of `query` [B, H, q, D] over all tokens held: [B, q, H, Dv], and the keys and values it saw.

        `mask` is [B, 1 or H, q, tokens seen], `new` how many of those tokens are this call's own.
        """
        keys, values = held = self._turned(*self.read())
        mask = columns(mask, self.real, query, keys.shape[1], keys.shape[2], new)
        bias = self.store.bias(query, kwargs["scaling"]) if len(self.store) else None
        if bias is not None:
            bias = torch.nn.functional.pad(bias, (self.aside, self.exact[0].shape[2]))
            mask = added(mask, bias, query, keys.shape[2])
        if (folded := self.store.folded()) is not None:
            mask = added(mask, None, query, keys.shape[2]).expand(len(query), query.shape[1], -1, -1)
            weight = folded[2].repeat_interleave(query.shape[1] // keys.shape[1], 1)[:, :, None]
            weight = weight.clamp(min=torch.finfo(mask.dtype).min).to(mask.dtype).expand(-1, -1, query.shape[2], -1)
            mask = torch.cat([mask, weight], -1)
            keys, values = torch.cat([keys, folded[0]], 2), torch.cat([values, folded[1]], 2)
        return base(module, query, keys, values, mask, **kwargs)[0], held

    def _turned(self, keys: Tensor, values: Tensor) -> Pair:
        """Keys as if they had lain in the text where they lie in the cache; padding takes no place."""
        if self.parts.turns is None:
            return keys, values
        if self.real is None:
            behind = torch.arange(keys.shape[2] - 1, -1, -1, device=keys.device)
        else:
            behind = self.real.long().flip(-1).cumsum(-1).flip(-1) - 1
        places = self.positions().long()
        return self.parts.turns.turn(keys, places[..., -1:] - behind - places), values

    def age(self, call: AttentionCall, seen: "int | list[int]") -> None:
        """Pass tokens from the window to the store, and forget what the budget has no room for.

        `seen`: tokens so far; of each sequence, where padding makes them differ.
        """
        parts, length, taken = self.parts, self.exact[0].shape[2], self._sinks_due
        leaving = self._leaving(call.queries.shape[2])
        if not leaving:
            return
        candidates, first = len(self.store) + leaving, self.aside + taken
        budgets = self._budgets(seen, first + length - taken - leaving)
        most = candidates if budgets is None else min(candidates, max(budgets))
        room = Room(first, first + candidates, most)
        room = Room(first, first + candidates, parts.counts.count(call, self.memory, room))
        scores = None
        if room.keep < candidates or self.store.wants_scores or (budgets and min(budgets) < candidates):
            scores = self._scores(call, room)
        if taken:
            scores = self._take_sinks(taken, scores)
        scores = None if scores is None else scores[:, :, first : first + candidates]
        scores = self._pass_on(leaving, scores, first, room.keep)
        if self.real is not None and budgets and scores is not None:
            self._hide_excess(scores, budgets, first)

    @property
    def _sinks_due(self) -> int:
        return self.parts.sinks if self.sinks is None else 0

    def _leaving(self, new: int) -> int:
        """How many tokens leave the window after a call of `new` tokens: all that may, or when generating none yet."""
        block, spare = self.store.block, self.exact[0].shape[2] - self.parts.window - self._sinks_due
        count = max(0, spare) // block * block
        return count if new > 1 or count >= self.parts.interval else 0

    def _budgets(self, seen: "int | list[int]", elsewhere: int) -> list[int] | None:
        """Tokens that may lie in the store, of each sequence; None: no limit."""
        limits = [self.parts.group.limit(each) for each in ([seen] if isinstance(seen, int) else seen)]
        return None if None in limits else [max(0, limit - elsewhere) for limit in limits if limit is not None]

    def _scores(self, call: AttentionCall, room: Room) -> Tensor:
        """The scorer's answer: padding last, no NaN, equal for all heads where the store wants that."""
        scores = self.parts.scorer.score(call, self.memory, room).nan_to_num(nan=-torch.inf)
        if self.store.shares_tokens:
            scores = scores.mean(1, keepdim=True).expand_as(scores)
        return scores if self.real is None else scores.masked_fill(~self.real, -torch.inf)

    def _take_sinks(self, count: int, scores: Tensor | None) -> Tensor | None:
        """Set the first real tokens apart; returns the scores in the new order."""
        (keys, values), newest = self.exact, self.newest
        assert newest is not None
        if self.real is not None:
            first = self.real & (self.real.long().cumsum(-1) <= count)
            order = (~first).to(torch.uint8).argsort(dim=-1, stable=True)
            keys, values, newest = pick(keys, order), pick(values, order), pick(newest[:, None], order)[:, 0]
            self.real = pick(self.real, order)
            self.memory.tokens = {name: pick(held, order) for name, held in self.memory.tokens.items()}
            scores = None if scores is None else pick(scores, order)
        self.sinks = (keys[:, :, :count].clone(), values[:, :, :count].clone())
        self.window, self.newest = (keys[:, :, count:], values[:, :, count:]), newest[:, count:]
        self.places = newest[:, None, :count].clone() if self._tracks else None
        return scores

    def _pass_on(self, leaving: int, scores: Tensor | None, first: int, keep: int) -> Tensor | None:
        """Move the oldest tokens of the window to the store and forget all but the best `keep` of what is there then.

        Survivors are chosen before an empty store sees them: it is to quantise those alone. Returns the scores of what
        is in the store.
        """
        stored = len(self.store)
        gone, places = self._leave(leaving)
        if scores is not None and not stored and keep < leaving:
            index = best(scores, keep, (leaving,))
            self._fold(gone, index, first)
            gone, places = (pick(gone[0], index), pick(gone[1], index)), pick(places, index)
            scores = self._settle(index, first, scores)
        new = gone[0].shape[2]
        if new:
            fresh = scores[:, :, stored:] if scores is not None and self.store.wants_scores else None
            order = self.store.append(*gone, places, fresh)
            if order is not None:
                scores = self._settle(order, first, scores, stored + new)
        if scores is not None and stored and keep < len(self.store):
            index = best(scores, keep, self.store.segments)
            self._fold(self.store.read() if self.store.folds else gone, index, first)
            self.store.keep(index)
            scores = self._settle(index, first, scores)
        return scores

    def _leave(self, count: int) -> tuple[Pair, Tensor]:
        """Take the oldest tokens out of the window, with their positions: int64 [B, 1 or G, count], -1 for padding."""
        (keys, values), newest = self.exact, self.newest
        assert newest is not None
        self.window, self.newest = (keys[:, :, count:].clone(), values[:, :, count:].clone()), newest[:, count:].clone()
        left = newest[:, None, :count]
        if self._tracks:
            self.places = left.clone() if self.places is None else join(self.places, left)
        left = left.long().expand(len(keys), -1, -1)
        if self.real is not None:
            first = self.aside + len(self.store)
            left = torch.where(self.real[:, :, first : first + count], left, -1)
        return (keys[:, :, :count], values[:, :, :count]), left

    def _fold(self, tokens: Pair, index: Tensor, first: int) -> None:
        """Tell the store of the tokens that `index` leaves out."""
        if not self.store.folds:
            return
        count = tokens[0].shape[2]
        forgotten = torch.ones(*index.shape[:2], count, dtype=torch.uint8, device=index.device).scatter(2, index, 0)
        rest = forgotten.argsort(dim=-1, descending=True, stable=True)[..., : count - index.shape[2]]
        real = None if self.real is None else pick(self.real[:, :, first : first + count], rest)
        self.store.fold(pick(tokens[0], rest), pick(tokens[1], rest), real)

    def _settle(self, index: Tensor, first: int, scores: Tensor | None, count: int | None = None) -> Tensor | None:
        """Of what is known of the `count` tokens from `first` on, keep that of `index` [B, G, m], in that order."""
        end = first + (count if count is not None else scores.shape[2] if scores is not None else 0)

        def settled(held: Tensor) -> Tensor:
            return join(join(held[..., :first], pick(held[..., first:end], index)), held[..., end:])

        self.memory.tokens = {name: settled(held) for name, held in self.memory.tokens.items()}
        self.real = None if self.real is None else settled(self.real)
        self.places = None if self.places is None else settled(self.places)
        return None if scores is None else pick(scores, index)

    def _hide_excess(self, scores: Tensor, budgets: list[int], first: int) -> None:
        """A sequence with less text may keep fewer tokens than its row has room for: the others count as padding."""
        assert self.real is not None
        ranks = scores.flip(-1).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).flip(-1)
        allowed = ranks < torch.tensor(budgets, device=scores.device)[:, None, None]
        end = first + scores.shape[2]
        middle = self.real[:, :, first:end] & allowed
        self.real = join(join(self.real[:, :, :first], middle), self.real[:, :, end:])

    def select_rows(self, rows: Tensor) -> None:
        """Keep the sequences `rows`, in that order."""
        rows = rows.to(self.exact[0].device)

        def chosen(held: Tensor) -> Tensor:
            return held.index_select(0, rows) if len(held) > 1 else held.expand(len(rows), *held.shape[1:]).clone()

        self.sinks = None if self.sinks is None else (chosen(self.sinks[0]), chosen(self.sinks[1]))
        self.window = (chosen(self.exact[0]), chosen(self.exact[1]))
        self.store.select_rows(rows)
        self.memory.tokens = {name: chosen(held) for name, held in self.memory.tokens.items()}
        self.memory.rows = {name: chosen(held) for name, held in self.memory.rows.items()}
        self.real, self.newest, self.places = (
            None if held is None else chosen(held) for held in (self.real, self.newest, self.places)
        )

    def tensors(self) -> list[Tensor]:
        """Everything held in memory."""
        held = [*(self.sinks or ()), *(self.window or ()), *self.store.tensors()]
        held += [*self.memory.tokens.values(), *self.memory.rows.values()]
        return held + [t for t in (self.real, self.newest, self.places) if t is not None]


def best(scores: Tensor, keep: int, segments: tuple[int, ...]) -> Tensor:
    """The tokens with the highest scores [B, G, n], of equal ones the later: int64 [B, G, keep], ascending in segments.

    Each segment keeps its share, so that all heads keep equally many of it.
    """
    counts = _shares(keep, segments)
    chosen, start = [], 0
    for size, count in zip(segments, counts, strict=True):
        order = scores[..., start : start + size].flip(-1).argsort(dim=-1, descending=True, stable=True)
        chosen.append((size - 1 - order[..., :count]).sort(-1).values + start)
        start += size
    return torch.cat(chosen, -1)


def _shares(keep: int, segments: tuple[int, ...]) -> list[int]:
    total = sum(segments)
    bounds = [round(keep * sum(segments[:i]) / total) if total else 0 for i in range(len(segments) + 1)]
    return [b - a for a, b in pairwise(bounds)]


def join(a: Tensor, b: Tensor) -> Tensor:
    """Put tokens together, [B or 1, 1 or G, n] each, whose rows or heads may be shared."""
    if a.shape[2] == 0:
        return b.clone()
    shape = torch.broadcast_shapes(a.shape[:2], b.shape[:2])
    return torch.cat([a.expand(*shape, -1), b.expand(*shape, -1)], 2)


def _owned(x: Tensor) -> Tensor:
    """A tensor that holds no more memory than it shows."""
    x = x.contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()
