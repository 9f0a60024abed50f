"""Pooled: the mean of some neighbouring tokens stands for all of them, in one slot.

Of m tokens at positions p_j, those of one chunk, none of them padding, p̄ their mean position, rounded down:

    k̄ = 1/m · Σ_j R(p̄ - p_j) k_j,   v̄ = 1/m · Σ_j v_j,   logit(q, k̄) += log m

R(d) rotates a key d positions further: keys are averaged as if they all stood in the middle of the chunk. log m makes
the slot weigh what m tokens with this key would. With `top`, a query sees only the slots with the highest logits.
"""

import torch
from torch import Tensor

from tcw.kv.rope import Rope
from tcw.kv.stores import Store, pick
from tcw.kv.stores._wrapper import Wrapper


class Pooled(Wrapper):
    """Means of chunks, held in another store.

    Attributes:
        counts: int32 [B, 1 or G, n], how many tokens a slot stands for; 0 where all were padding.
    """

    def __init__(self, chunk: int, rope: Rope, inner: Store, weighted: bool = True, top: int = 0) -> None:
        """Pool `chunk` tokens at a time; `weighted`: count a slot as often as it has tokens; `top` 0: all slots."""
        super().__init__(inner)
        self.block = chunk * inner.block
        self.chunk, self.rope, self.weighted, self.top = chunk, rope, weighted, top
        self.counts: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor | None = None) -> Tensor:
        """Pool tokens, chunk by chunk; the last chunk may be shorter.

        Returns the last token of each slot, int64 [B, G, slots]: with padding on the left, it is real if any is.
        """
        batch, heads, m, _ = keys.shape
        places = self._chunks(positions[..., None], fill=-1)
        real = places >= 0
        counts = real.sum(3, keepdim=True)
        share = real.float() / counts.clamp(min=1)
        centres = (places * real).sum(3, keepdim=True) // counts.clamp(min=1)
        centres = centres.masked_fill(counts == 0, -1)
        turned = self.rope.turn(self._chunks(keys.float()), (centres - places)[..., 0])
        means = [(x * share).sum(3).to(keys.dtype) for x in (turned, self._chunks(values.float()))]
        best = None if scores is None else self._chunks(scores[..., None], fill=-torch.inf).amax(3)[..., 0]
        held, slots = len(self.inner), counts.shape[2]
        order = self.inner.append(means[0], means[1], centres[..., 0, 0], best)
        fresh = counts[..., 0, 0].int()
        self.counts = fresh if self.counts is None else _joined(self.counts, fresh)
        ends = (torch.arange(1, slots + 1, device=keys.device) * self.chunk).clamp(max=m) - 1 + held
        ends = torch.cat([torch.arange(held, device=keys.device), ends]).expand(batch, heads, -1)
        if order is not None:
            self.counts, ends = pick(self.counts.expand(-1, heads, -1), order), pick(ends, order)
        return ends

    def _chunks(self, x: Tensor, fill: float = 0) -> Tensor:
        """[B, G, m, d] -> [B, G, slots, chunk, d]."""
        x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % self.chunk), value=fill)
        return x.unflatten(2, (-1, self.chunk))

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots."""
        return self.inner.read()

    def bias(self, queries: Tensor, scaling: float) -> Tensor | None:
        """Log of the tokens a slot stands for, if weighted; -inf for slots of padding, and for those not at the top."""
        assert self.counts is not None
        batch, heads, q, _ = queries.shape
        weights = self.counts.float().log() if self.weighted else torch.where(self.counts > 0, 0.0, -torch.inf)
        inner = self.inner.bias(queries, scaling)
        ratio = heads // weights.shape[1]
        bias = weights.repeat_interleave(ratio, 1)[:, :, None].expand(batch, heads, q, -1)
        bias = bias if inner is None else bias + inner
        if not 0 < self.top < len(self):
            return bias
        keys = self.read()[0]
        grouped = queries.float().unflatten(1, (keys.shape[1], -1))
        logits = (grouped @ keys.float().unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scaling + bias
        chosen = logits.topk(self.top, dim=-1).indices
        return torch.full_like(bias, -torch.inf).scatter(-1, chosen, 0) + bias

    def keep(self, index: Tensor) -> None:
        """Forget all slots but those of `index`."""
        assert self.counts is not None
        self.inner.keep(index)
        self.counts = pick(self.counts.expand(-1, index.shape[1], -1), index)

    def select_rows(self, rows: Tensor) -> None:
        """Keep those sequences."""
        self.inner.select_rows(rows)
        self.counts = None if self.counts is None else self.counts.index_select(0, rows)

    def tensors(self) -> list[Tensor]:
        """Those of the inner store, and the counts."""
        return self.inner.tensors() + ([] if self.counts is None else [self.counts])


def _joined(a: Tensor, b: Tensor) -> Tensor:
    heads = max(a.shape[1], b.shape[1])
    return torch.cat([a.expand(-1, heads, -1), b.expand(-1, heads, -1)], 2)
