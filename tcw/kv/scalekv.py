"""ScaleKV: layers that look all over the text, drafters, keep more tokens than those that do not, refiners.

    selectivity = share of attention within the newest `window` tokens
                · share of the 32 most attended tokens in the attention to older ones
    drafters    = the `drafters` share of layers with the lowest selectivity
    tokens of a drafter = `times` · tokens of a refiner          beside sinks and window; together the budget

Li et al., Memory-Efficient Visual Autoregressive Modeling with Scale-Aware KV Cache Compression, NeurIPS 2025,
https://arxiv.org/abs/2505.19602, section 3.3, equations 2 to 4 (Attention Selectivity Index). Which tokens a layer
keeps is `snapkv`'s choice, the paper's equation 5, or that of any other method named by `score`, with its defaults.

Where we differ: the paper is about images made scale by scale. The current token map becomes the newest `window`
tokens, and as a text has no scales, the index is not normalised within each, nor do refiners shrink from one to the
next. The second factor is divided by all attention to older tokens (the paper prints the plain sum): else a layer
that looks at nothing but the window would have selectivity 0 and pass for a drafter. Sinks are left out of it, as
they are always kept. The number 32, `drafters` and `times` are ours, the paper gives none for texts. Calibration: one
run over any text, and what the scoring method needs; it leaves a number for each layer.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.kv import AttentionCall, LayerShape
from tcw.kv._layer_budgets import Division, LayerBudgets, whole
from tcw.methods import option

if TYPE_CHECKING:
    from tcw.kv.calibrate import Session

_TOP = 32
_QUERIES = 64  # of each sequence, evenly spaced


@dataclass(frozen=True)
class Scalekv(LayerBudgets):
    """Keep more tokens in layers that look all over the text than in those that look at little."""

    paper: ClassVar[str] = "arXiv 2505.19602"
    needs_calibration: ClassVar[bool] = True

    drafters: float = option(0.5, "share of the layers that keep more")
    times: float = option(4.0, "how many times as many tokens those keep")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drafters <= 1:
            raise ValueError(f"`drafters` is between 0 and 1, not {self.drafters}")
        if self.times < 1:
            raise ValueError(f"`times` is 1 or more, not {self.times}")

    def divide(self, layers: int, tensors: dict[str, Tensor]) -> Division:
        """Two levels, drafters above refiners."""
        order = tensors["selectivity"].argsort(stable=True).tolist()
        drafters = frozenset(order[: round(self.drafters * layers)])
        return lambda mean, most: _two_levels(drafters, layers, self.times, mean, most)

    def calibrate(self, session: "Session") -> dict[str, Tensor]:
        """Measure the selectivity of each layer.

        Returns:
            `selectivity`, float32 [layers], and what the scoring method measures.

        Raises:
            UsageError: no sequence is longer than sinks and window.
        """
        sums = torch.zeros(len(session.layers), 4, dtype=torch.float64)

        def look(layer: LayerShape, call: AttentionCall) -> None:
            sums[layer.depth] += self._shares(call).cpu()

        session.watch(look)
        queries, current, top, older = sums.unbind(1)
        if not bool(queries.all()):
            raise UsageError(
                f"the calibration text has no {self.sinks + self.window + 1} tokens in a row", "give a longer text"
            )
        selectivity = current / queries * top / older.clamp(min=torch.finfo(torch.float32).tiny)
        return {**super().calibrate(session), "selectivity": selectivity.float()}

    def outline(self, layers: tuple[LayerShape, ...]) -> dict[str, Tensor]:
        """What `calibrate` would return, zeros: the lower layers are drafters."""
        return {**super().outline(layers), "selectivity": torch.zeros(len(layers))}

    def _shares(self, call: AttentionCall) -> Tensor:
        """Queries looked at, their attention in the window, to the most attended older tokens, to all older: [4]."""
        held, first = call.keys.shape[2], self.sinks + self.window
        rows = torch.linspace(first, held - 1, min(_QUERIES, max(0, held - first)), device=call.keys.device).long()
        if not len(rows):
            return torch.zeros(4)
        weights = call.attention(rows).flatten(1, 2).mean(0)  # [H, m, n]
        tokens = torch.arange(held, device=call.keys.device)
        age = rows[:, None] - tokens
        older = weights * ((age >= self.window) & (tokens >= self.sinks))
        top = older.topk(min(_TOP, held), dim=-1).values
        sums = [part.sum(-1).mean(0).sum() for part in (weights * (age < self.window), top, older)]
        return torch.stack([torch.full_like(sums[0], len(rows)), *sums])


@lru_cache(maxsize=256)
def _two_levels(drafters: frozenset[int], layers: int, times: float, mean: int, most: int) -> list[int]:
    more, rest, total = Fraction(times), layers - len(drafters), layers * mean
    drafter = min(Fraction(most), more * total / (more * len(drafters) + rest))
    refiner = (total - drafter * len(drafters)) / max(1, rest)
    return whole(drafter if depth in drafters else refiner for depth in range(layers))
