"""Expected Attention: keep the tokens that queries to come are expected to look at, if their values weigh much.

    q ~ N(μ, Σ)                                       a head's queries before RoPE
    R̄ = mean of the rotations of the next `future` positions
    z_j = E[exp(R̄q·k_j / √D)] = exp( R̄μ·k_j / √D + k_jᵀ R̄ΣR̄ᵀ k_j / 2D )
    score_j = ( mean over the query heads of a group of z_j / Σ z + ε ) · ‖v_j‖

Devoto, Jeblick, Jégou, Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
Distribution, 2025, https://arxiv.org/abs/2510.00636, with its 512 positions and ε = 0.02; the sum is over all tokens
but sinks. We turn the keys by R̄ᵀ instead of turning Σ by R̄, which is the same.

ε decides much. With half of 640 tokens kept on SmolLM2-135M, ε = 0 keeps 94 % of the later attention and ε = 0.02
keeps 79 %; yet a pass key in the text is read out with ε = 0.02 (0.26 nats a token, 0.24 with all tokens) and lost
with ε = 0 (2.68): tokens with weighty values are rarely looked at, and matter when they are.

Where we differ: μ and Σ are measured once, on a calibration text without the first 4 tokens of each sequence;
kvpress, the authors' library, offers that too, but by default takes those of the prompt. Those would have to stay
with each sequence, to forget tokens while generating: on SmolLM2-135M 4.5 MB, as much as 195 tokens; and a short
prompt has none worth the name. The attention kept differs by less than one part in a hundred. A value counts with its
own norm, as in kvpress, not with that of its product with the output projection, as in the paper. Soft caps of logits
are not considered. Calibration: one run over any text; it leaves D·(D + 1) numbers for each query head.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.kv import AttentionCall, Group, LayerShape, Memory, Room, Scorer
from tcw.kv._attention_stats import candidates, newest_position
from tcw.kv._evict import Evicting
from tcw.kv.rope import Rope
from tcw.methods import option

if TYPE_CHECKING:
    from tcw.kv.calibrate import Session

_SKIPPED = 4  # first tokens of a text, whose queries are unlike all others


@dataclass(frozen=True)
class ExpectedAttention(Evicting):
    """Keep the tokens that queries to come are expected to look at, weighted with their values."""

    paper: ClassVar[str] = "arXiv 2510.00636"
    needs_calibration: ClassVar[bool] = True
    needs_rope: ClassVar[bool] = True

    future: int = option(512, "positions ahead over which rotations are averaged")
    epsilon: float = option(0.02, "attention that any token is granted: the higher, the more the values decide")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.future < 1:
            raise ValueError(f"`future` is 1 or more, not {self.future}")
        if self.epsilon < 0:
            raise ValueError(f"`epsilon` is 0 or more, not {self.epsilon}")

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer:
        """Score with the statistics of the group's query heads."""
        assert layer.rope is not None
        shared, heads = layer.heads // layer.kv_heads, list(group.heads)
        mean, covariance = (
            tensors[f"{layer.index}.{name}"].unflatten(0, (layer.kv_heads, shared))[heads]
            for name in ("mean", "covariance")
        )
        return _Expected(layer.rope.to(mean.device), mean, covariance, self.future, self.epsilon)

    def calibrate(self, session: "Session") -> dict[str, Tensor]:
        """Measure mean and covariance of the queries, as they were before RoPE.

        Returns:
            For each layer `INDEX.mean`, float32 [H, D], and `INDEX.covariance`, float32 [H, D, D].

        Raises:
            UsageError: the text is too short.
        """
        gathered: dict[int, _Gathered] = {}

        def look(layer: LayerShape, call: AttentionCall) -> None:
            assert layer.rope is not None
            queries = layer.rope.undo(call.queries, call.positions[:, None])[:, :, _SKIPPED:]
            gathered.setdefault(layer.index, _Gathered()).add(queries.transpose(0, 1).flatten(1, 2))

        session.watch(look)
        if any(each.count < 2 for each in gathered.values()):
            raise UsageError(f"no sequence of the calibration text has {_SKIPPED + 2} tokens", "give a longer text")
        means = {f"{index}.mean": each.mean for index, each in gathered.items()}
        return means | {f"{index}.covariance": each.squares / each.count for index, each in gathered.items()}

    def outline(self, layers: tuple[LayerShape, ...]) -> dict[str, Tensor]:
        """What `calibrate` would return, zeros."""
        means = {f"{layer.index}.mean": torch.zeros(layer.heads, layer.head_dim) for layer in layers}
        shapes = {f"{layer.index}.covariance": (layer.heads, layer.head_dim, layer.head_dim) for layer in layers}
        return means | {name: torch.zeros(shape) for name, shape in shapes.items()}


class _Gathered:
    """Mean and centred squares of what comes in parts: Chan, Golub, LeVeque, Updating Formulae, 1979."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Add float32 [H, m, D]."""
        count = rows.shape[1]
        if not count:
            return
        mean = rows.mean(1)
        centred = rows - mean[:, None]
        apart, total = mean - self.mean, self.count + count
        between = apart[:, :, None] * apart[:, None, :] * (self.count * count / total)
        self.squares = self.squares + centred.transpose(1, 2) @ centred + between
        self.mean = self.mean + apart * (count / total)
        self.count = total


class _Expected(Scorer):
    """Args: the rotation; mean [G, r, D] and covariance [G, r, D, D]; positions ahead; ε."""

    def __init__(self, rope: Rope, mean: Tensor, covariance: Tensor, future: int, epsilon: float) -> None:
        self.rope, self.mean, self.covariance, self.epsilon = rope, mean, covariance, epsilon
        turns = rope.angles(torch.arange(1, future + 1, device=mean.device))
        self.ahead = torch.polar(torch.ones_like(turns), turns).mean(0) * rope.scaling  # complex64 [d]

    def score(self, call: AttentionCall, memory: Memory, room: Room) -> Tensor:
        keys = self._turned_back(call)
        rivals = candidates(call, replace(room, end=call.keys.shape[2]))  # for attention: all but sinks and padding
        attention = torch.zeros_like(keys[..., 0])
        for head in range(self.mean.shape[1]):
            expected = (keys @ self.mean[:, head, :, None]).squeeze(-1) * call.scaling
            spread = ((keys @ self.covariance[:, head]) * keys).sum(-1) * call.scaling**2 / 2
            logits = (expected + spread).masked_fill(~rivals, -torch.inf)
            attention = attention + logits.softmax(-1).nan_to_num(0.0)
        return (attention / self.mean.shape[1] + self.epsilon) * call.values.float().norm(dim=-1)

    def _turned_back(self, call: AttentionCall) -> Tensor:
        """R̄ᵀk: float32 [B, G, n, D]."""
        keys = call.keys.float()
        angles = self.rope.angles(newest_position(call))
        turn = (torch.polar(torch.ones_like(angles), angles) * self.ahead)[:, None, None]
        turned = self.rope.unbands(self.rope.bands(keys) * turn.conj())
        return torch.cat([turned, keys[..., self.rope.rotary_dim :]], -1)
