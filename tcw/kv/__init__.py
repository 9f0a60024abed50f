"""KV-cache policies: one policy a file.

What a layer holds of the tokens it has seen, for each group of its key-value heads, oldest first:

    sinks | store | window            the first tokens, the aged ones, the newest ones; sinks and window are exact

    attention  over all of it and the tokens of this call, as the model would compute it
    observe    a scorer looks at that attention, if it wants to
    age        tokens that leave the window are scored together with those in the store; as many as the budget
               allows stay, in the store's format; the others are forgotten

A method may give any of three things, and a policy is made of one or more methods: a *scorer* (which tokens matter),
*groups* (how many tokens which heads keep) and a *store* (how they are held). So eviction and quantisation combine by
construction: `snapkv:ratio=0.5` and `kivi:bits=4` together evict first and quantise what is left.

B batch, H query heads, G key-value heads (of the group at hand), r = H / G, q tokens of this call, n tokens held, those
of this call included, D head_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from tcw.methods import Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tcw.kv.calibrate import Session
    from tcw.kv.rope import Rope
    from tcw.kv.stores import Store

ENGINE = (
    "attention", "cache", "calibrate", "fused", "groups", "layer", "masks", "passes", "plan", "policy", "rope",
    "shapes", "stored", "stores",
)  # fmt: skip


@dataclass(frozen=True)
class LayerShape:
    """A full-attention layer, as a policy sees it.

    Attributes:
        index: its number in the model (`layer_idx`).
        depth: its number among the `count` full-attention layers, from 0.
        heads, kv_heads: of queries, and of keys and values.
        head_dim, value_dim: elements of a key, and of a value.
        dtype: what keys and values are computed in.
        rope: how positions enter queries and keys; None where they do not, or not by rotation.
    """

    index: int
    depth: int
    count: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: "torch.dtype"
    rope: "Rope | None" = None


@dataclass(frozen=True)
class Group:
    """Key-value heads of one layer that keep equally many tokens.

    Attributes:
        heads: their numbers, ascending.
        limit: tokens seen -> tokens that each of them may hold, sinks and window included; None: all.
    """

    heads: tuple[int, ...]
    limit: "Callable[[int], int | None]" = field(default=lambda seen: None)


@dataclass
class Memory:
    """What scorers remember of a group. Counted in the cache's bytes, and follows its tokens and rows.

    Attributes:
        tokens: by name [B, G, n], a value for each token held; the engine adds zeros for new tokens before `observe`.
        rows: by name [B, ...], a value for each sequence.
        facts: by name, plain numbers: the same for all sequences.
    """

    tokens: "dict[str, Tensor]" = field(default_factory=dict)
    rows: "dict[str, Tensor]" = field(default_factory=dict)
    facts: dict[str, int] = field(default_factory=dict)


@dataclass
class AttentionCall:
    """One call of a layer's attention, for one group of heads, after it was computed.

    Attributes:
        queries: [B, H, q, D] after RoPE; query head h belongs to key-value head h // r of this group.
        keys, values: [B, G, n, D]; after RoPE; the last q of n are this call's own.
        real: bool [B, 1 or G, n], False for padding; None where there is none.
        positions: int64 [B, q], RoPE positions of this call's tokens (of padding: any number).
        scaling: what q·k is multiplied with.
        softcap: logits are softcap·tanh(logits / softcap), if not None.
        seen: tokens seen before this call, padding included.
    """

    queries: "Tensor"
    keys: "Tensor"
    values: "Tensor"
    real: "Tensor | None"
    positions: "Tensor"
    scaling: float
    softcap: float | None
    seen: int

    def visible(self, rows: "Tensor") -> "Tensor":
        """Which tokens the queries `rows` (int64 [m], numbers in 0..q-1) may look at: bool [B, 1 or G, m, n]."""
        import torch

        q, n = self.queries.shape[2], self.keys.shape[2]
        at = torch.arange(n, device=self.keys.device) - (n - q)
        seen = (at[None, :] <= rows[:, None])[None, None]
        return seen if self.real is None else seen & self.real[:, :, None, :]

    def attention(self, rows: "Tensor") -> "Tensor":
        """Attention of the queries `rows` (int64 [m]) over all tokens: float32 [B, G, r, m, n].

        Rows of padding are zero. Costs m·n: ask for a few rows at a time.
        """
        import torch

        batch, heads, _, dim = self.queries.shape
        kv_heads = self.keys.shape[1]
        queries = self.queries[:, :, rows].reshape(batch, kv_heads, heads // kv_heads, len(rows), dim).float()
        logits = queries @ self.keys.float().unsqueeze(2).transpose(-1, -2) * self.scaling
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        hidden = ~self.visible(rows).unsqueeze(2)
        return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1).nan_to_num(0.0)


@dataclass(frozen=True)
class Room:
    """The tokens that may be forgotten: those at `first` to `end` - 1 of all held, of which `keep` will stay."""

    first: int
    end: int
    keep: int


class Scorer:
    """Says which of a group's tokens matter. One serves one group of one layer; what it remembers is in Memory."""

    def observe(self, call: AttentionCall, memory: Memory) -> None:
        """Look at a call; `memory.tokens` has a place for every token of `call.keys` already, new ones are zero."""

    def score(self, call: AttentionCall, memory: Memory, room: Room) -> "Tensor":
        """How much each token matters, float32 [B, G, n]; the highest of those in `room` stay. Called after `observe`.

        Scores of tokens outside the room, and of padding, are ignored. Equal scores: the later token stays.
        """
        raise NotImplementedError


class KVMethod(Method):
    """A method that changes what a layer holds of its keys and values. Give any of `scorer`, `groups` and `store`.

    `tensors` are what `calibrate` returned, on the layer's device (for `groups` on the CPU); {} for a method that does
    not calibrate.
    """

    family: ClassVar[str] = "kv"
    needs_rope: ClassVar[bool] = False
    reindexes: ClassVar[bool] = False  # keys are rotated to their place in the cache, not in the text, when read
    counts_padding: ClassVar[bool] = False  # a text behind padding is not treated as it would be alone
    wraps: ClassVar[bool] = False  # `store` wraps what other methods chose, and goes with any of them

    limits: ClassVar[dict[str, float]] = {
        "max_key_nll_rise": 0.5,
        "max_next_nll_rise": 0.05,
    }  # for `tcw verify`, in nats

    sinks: int = 0  # first tokens that stay exact and are never forgotten
    window: int = 0  # newest tokens, likewise
    interval: int = 1  # when generating, tokens age this many at a time

    def scorer(self, layer: LayerShape, group: Group, tensors: "dict[str, Tensor]") -> Scorer | None:
        """Make the scorer of a group, or None: this method does not score."""
        return None

    def groups(self, layer: LayerShape, tensors: "dict[str, Tensor]") -> tuple[Group, ...] | None:
        """Divide a layer's key-value heads by how many tokens they keep; None: this method does not limit them."""
        return None

    def store(
        self, layer: LayerShape, group: Group, tensors: "dict[str, Tensor]", inner: "Callable[[], Store]"
    ) -> "Callable[[], Store] | None":
        """Give what makes an empty store for a group's aged tokens, or None: this method leaves that to others.

        `inner` makes the store that other methods of the policy have chosen (a dense one, if none has): wrap it or not.
        """
        return None

    def count(self, call: AttentionCall, memory: Memory, room: Room) -> int:
        """How many tokens of `room` stay: `room.keep`, or fewer where the method sees that fewer will do."""
        return room.keep

    def check(self, layers: tuple[LayerShape, ...]) -> None:
        """Refuse a model that this method cannot serve. Raises UsageError."""

    def calibrate(self, session: "Session") -> "dict[str, Tensor]":
        """Measure on the model what the method needs: small tensors that are stored in the artifact."""
        return {}

    def outline(self, layers: tuple[LayerShape, ...]) -> "dict[str, Tensor]":
        """Tensors with the names and shapes of those that `calibrate` would return, any values: for plans before it."""
        return {}
