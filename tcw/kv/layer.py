"""One layer of a cache under a policy: groups of heads that each keep what they may."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from tcw.errors import TcwError, UsageError
from tcw.kv import LayerShape
from tcw.kv.attention import Attention, mark
from tcw.kv.groups import HeadGroup


class PolicyLayer(CacheLayerMixin):  # type: ignore[misc]
    """Holds the keys and values of a full-attention layer.

    Its logical length is what the model has seen; what lies in memory is less. transformers asks for the former and
    makes positions and masks by it.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False
    is_sliding = False

    def __init__(self, shape: LayerShape, make_groups: Callable[[torch.device], list[HeadGroup]]) -> None:
        """`make_groups` is called once the device is known."""
        super().__init__()
        self.shape = shape
        self._make_groups = make_groups
        self.groups: list[HeadGroup] = []
        self.seen = 0
        self._real_seen: Tensor | None = None  # int64 [B, 1], where there is padding
        self._new: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the groups on the keys' device. Raises TcwError when the model is not as its configuration says."""
        found = key_states.shape[1], key_states.shape[3], value_states.shape[3]
        said = self.shape.kv_heads, self.shape.head_dim, self.shape.value_dim
        if found != said:
            raise TcwError(
                f"layer {self.shape.index} has {found[0]} heads of {found[1]} and {found[2]} elements, "
                f"its configuration says {said[0]} of {said[1]} and {said[2]}",
                "use this model without a KV policy",
            )
        self.groups = self._make_groups(key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take this call's keys and values; attention, which comes next, will find this layer by their mark."""
        if self._new is not None:
            raise TcwError(
                "this model does not pass its keys to the attention function that a KV policy needs",
                "use it without a policy: `past_key_values=None`, or export the weights alone",
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._new = (key_states, value_states)
        return mark(key_states, self), value_states

    def _take(self) -> tuple[Tensor, Tensor]:
        """The keys and values that `update` was given."""
        assert self._new is not None
        new, self._new = self._new, None
        return new

    def attend(
        self,
        base: Attention,
        module: torch.nn.Module,
        query: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of `query` [B, H, q, D] over what is held and this call's own: [B, q, H, Dv]. Then tokens age."""
        keys, values = self._take()
        length, seen = keys.shape[2], self.seen
        if mask is not None and mask.shape[-1] != seen + length:
            raise UsageError(
                f"an attention mask for {mask.shape[-1]} tokens does not fit {seen + length}",
                "give a 2D attention_mask over all tokens so far, as `generate` does",
            )
        real = _real(mask, length)
        if real is not None and self._real_seen is None and bool(real.all()):
            real = None  # a mask that hides the future alone
        positions = self._positions(real, length, kwargs.get("position_ids"), keys)
        self.seen += length
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        seen_each = self.seen if self._real_seen is None else self._real_seen[:, 0].tolist()
        outs = []
        for group in self.groups:
            heads, kv = group.parts.query_heads, group.parts.kv_heads
            mine = (query, keys, values) if heads is None else (query[:, heads], keys[:, kv], values[:, kv])
            group.extend(*mine[1:], real, positions)
            own = mask if heads is None or mask is None or mask.shape[1] == 1 else mask[:, heads]
            outs.append(group.step(base, module, mine[0], own, positions, seen, seen_each, scaling=scaling, **kwargs))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)[:, :, self._order]

    @property
    def _order(self) -> Tensor:
        """What puts the heads of all groups, one group after another, back in the model's order."""
        return torch.cat([g.parts.query_heads for g in self.groups if g.parts.query_heads is not None]).argsort()

    def _positions(self, real: Tensor | None, length: int, given: Tensor | None, keys: Tensor) -> Tensor:
        """RoPE positions of this call's tokens, int64 [B or 1, q]: the model's own, else the count of real tokens."""
        if real is None and self._real_seen is None:
            counted = torch.arange(self.seen, self.seen + length, device=keys.device)[None]
        else:
            before = self._real_seen if self._real_seen is not None else keys.new_full((len(keys), 1), self.seen).long()
            fresh = torch.ones(len(keys), length, dtype=torch.bool, device=keys.device) if real is None else real
            counted = before + fresh.long().cumsum(1) - 1
            self._real_seen = counted[:, -1:] + 1
        return given if given is not None and given.dim() == 2 and given.shape[1] == length else counted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: over all tokens seen."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.groups, self.seen, self._real_seen, self._new = [], 0, None, None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what was forgotten cannot be brought back. Raises UsageError."""
        raise UsageError(
            "a cache under a KV policy cannot be cut back", "generate without an assistant model, or without the policy"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences that beam search goes on with."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.groups:
            self.batch_select_indices(torch.arange(len(self.groups[0].exact[0])).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences, in the order given."""
        for group in self.groups:
            group.select_rows(indices)
        if self._real_seen is not None:
            self._real_seen = self._real_seen.index_select(0, indices.to(self._real_seen.device))

    def offload(self) -> None:
        """Refuse. Raises UsageError."""
        raise UsageError("a cache under a KV policy cannot be offloaded", "leave out `cache_implementation`")

    def tensors(self) -> list[Tensor]:
        """Everything held in memory."""
        own = [] if self._real_seen is None else [self._real_seen]
        return own + [t for g in self.groups for t in g.tensors()]


def _real(mask: Tensor | None, length: int) -> Tensor | None:
    """Which of this call's tokens are no padding, bool [B, q]: the newest query sees all that are real."""
    if mask is None:
        return None
    seen = mask[:, 0, -1, -length:]
    return seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min
