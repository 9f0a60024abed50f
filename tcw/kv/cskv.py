"""CSKV: fewer channels. A token's keys, of all heads together, become one short code, and its values another.

    K ≈ F_k E_kᵀ (K - μ_k) + μ_k before RoPE,   V ≈ F_v E_vᵀ (V - μ_v) + μ_v        (tcw/kv/stores/lowrank.py)

Wang et al., CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios, NeurIPS workshop on
Efficient Natural Language and Speech Processing, 2024, https://arxiv.org/abs/2409.10593: a "bi-branch cache", codes for
distant tokens and true keys and values for the newest 32; keys are rotated at each read. With `kivi:bits=4` beside it
the codes are quantised, those of keys by channel and those of values by token, as the paper combines the two.

Where we differ: the paper computes codes from the layer's input, starts from an activation-aware SVD of the projections
and trains both factors on the error of K and V. We compute codes from K and V themselves, where the best factors have
a closed form (tcw/kv/_subspace.py): with C the covariance on a text, E = F = the first r eigenvectors of C leave the
least error of K. That is `metric=plain`. An error of a key matters as queries see it, so `metric=query` measures it by
M, block-diagonal by head: the mean of q qᵀ over the head's queries, each rotated on by a distance drawn at random. With
U the first eigenvectors of M^½ C M^½, E = M^½ U and F = M^-½ U leave the least error of q·k. Means are taken out first,
which the paper does not: before RoPE, most of a key's length is its mean. The first tokens stay exact and are left out
of all that: their keys are unlike others. The factors are weights of the policy, float32; all its caches share them.
Calibration: C, μ and M.

On SmolLM2-135M after 1000 tokens, values need more channels than keys. With `key_rank=0.25,value_rank=1` the text goes
on at a KL divergence of 0.008 nats a token and a copied passage at 0.029 (`plain`: 0.010 and 0.056), with
`key_rank=1,value_rank=0.5` at 0.058 and 0.113. By default it is 0.018 and 0.034; without exact first tokens, 0.57.

`ratio=` gives layers different ranks: of all eigenvalues, each matrix's divided by their sum, the largest stay.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.kv import AttentionCall, Group, KVMethod, LayerShape
from tcw.kv._subspace import Basis, Moments, best_basis
from tcw.kv.stores import Store
from tcw.kv.stores._wrapper import Wrapper
from tcw.kv.stores.lowrank import Factors, LowRank
from tcw.methods import option

if TYPE_CHECKING:
    from tcw.kv.calibrate import Session


@dataclass(frozen=True)
class Cskv(KVMethod):
    """Keep fewer channels of each key and value: low-rank codes, fitted to a text."""

    paper: ClassVar[str] = "arXiv 2409.10593"
    needs_calibration: ClassVar[bool] = True
    needs_rope: ClassVar[bool] = True
    wraps: ClassVar[bool] = True

    key_rank: float = option(0.25, "share of the channels of all heads that a code of keys has")
    value_rank: float = option(0.75, "and one of values")
    ratio: float = option(0.0, "share of all channels, keys' and values', divided among layers; 0: as the two above")
    metric: str = option("query", "whose error of keys is the least: as queries see it, or of keys", ("query", "plain"))
    sinks: int = option(4, "first tokens that stay exact; the paper has none")
    window: int = option(32, "newest tokens that stay exact")
    interval: int = option(32, "when generating, encode this many at a time")

    def __post_init__(self) -> None:
        if not (0 < self.key_rank <= 1 and 0 < self.value_rank <= 1 and 0 <= self.ratio <= 1):
            raise ValueError("`key_rank` and `value_rank` are above 0 and at most 1, `ratio` between 0 and 1")
        if self.sinks < 0 or min(self.window, self.interval) < 1:
            raise ValueError("`sinks` is 0 or more, `window` and `interval` 1 or more")

    def store(
        self, layer: LayerShape, group: Group, tensors: dict[str, Tensor], inner: Callable[[], Store]
    ) -> Callable[[], Store]:
        """Code the tokens, and let the format of other methods hold the codes.

        Raises UsageError: the heads are divided, or the other format holds no codes.
        """
        if len(group.heads) != layer.kv_heads:
            raise UsageError(
                "`cskv` codes all heads of a layer together, and another method of this policy divides them",
                "leave out one of them, or take `kivi` in place of `cskv`",
            )
        rope = layer.rope
        assert rope is not None
        at = f"{layer.index}."
        keys = Factors(tensors[at + "key_encode"], tensors[at + "key_decode"], tensors[at + "key_mean"])
        values = Factors(tensors[at + "value_basis"], tensors[at + "value_basis"], tensors[at + "value_mean"])

        def make() -> Store:
            made = inner()
            if isinstance(made, Wrapper):
                raise UsageError(
                    "`cskv` would code what another method of this policy has changed before",
                    "give `pooled-memory` after `cskv`, and a format such as `kivi`",
                )
            return LowRank(keys, values, rope, made)

        return make

    def calibrate(self, session: "Session") -> dict[str, Tensor]:
        """Fit the factors of every layer.

        Returns:
            By layer (`0.key_encode`), float32: `key_encode` and `key_decode` [G·D, r_k], `key_mean` [G·D],
            `value_basis` [G·Dv, r_v] and `value_mean` [G·Dv]. `key_decode` equals `key_encode` with `metric=plain`.
        """
        seen = [_Seen(layer, self.sinks, self.metric == "query") for layer in session.layers]
        generator = torch.Generator().manual_seed(session.seed)
        session.watch(lambda layer, call: seen[layer.depth].add(call, generator))
        bases = [each.bases() for each in seen]
        found: dict[str, Tensor] = {}
        for each, (keys, values), (key_rank, value_rank) in zip(seen, bases, self._ranks(bases), strict=True):
            own = {
                "key_encode": keys.encode[:, :key_rank], "key_decode": keys.decode[:, :key_rank],
                "value_basis": values.encode[:, :value_rank],
                "key_mean": each.keys.mean, "value_mean": each.values.mean,
            }  # fmt: skip
            found |= {f"{each.layer.index}.{name}": tensor.float().contiguous() for name, tensor in own.items()}
        return found

    def outline(self, layers: tuple[LayerShape, ...]) -> dict[str, Tensor]:
        """Zeros; with `ratio`, of the ranks that layers have on average."""
        found: dict[str, Tensor] = {}
        for layer in layers:
            c, cv = layer.kv_heads * layer.head_dim, layer.kv_heads * layer.value_dim
            keys, values = (self.ratio, self.ratio) if self.ratio else (self.key_rank, self.value_rank)
            shapes = {
                "key_encode": (c, _share(keys, c)), "key_decode": (c, _share(keys, c)), "key_mean": (c,),
                "value_basis": (cv, _share(values, cv)), "value_mean": (cv,),
            }  # fmt: skip
            found |= {f"{layer.index}.{name}": torch.zeros(shape) for name, shape in shapes.items()}
        return found

    def _ranks(self, bases: list[tuple[Basis, Basis]]) -> list[tuple[int, int]]:
        """Of keys and of values, for each layer."""
        if not self.ratio:
            return [(_share(self.key_rank, len(k.energy)), _share(self.value_rank, len(v.energy))) for k, v in bases]
        shares = [[basis.energy / basis.energy.sum() for basis in pair] for pair in bases]
        every = torch.cat([share for pair in shares for share in pair])
        cut = every.sort(descending=True).values[_share(self.ratio, len(every)) - 1]
        return [(max(1, int((k >= cut).sum())), max(1, int((v >= cut).sum()))) for k, v in shares]


class _Seen:
    """What calibration saw of a layer."""

    def __init__(self, layer: LayerShape, sinks: int, looks: bool) -> None:
        self.layer, self.sinks, self.looks = layer, sinks, looks
        self.keys, self.values = Moments(), Moments()
        self.queries = [Moments() for _ in range(layer.kv_heads)]

    def add(self, call: AttentionCall, generator: torch.Generator) -> None:
        """See a sequence: its keys and queries before RoPE, the queries rotated on by a random distance."""
        rope, positions = self.layer.rope, call.positions[:, None]
        assert rope is not None
        for moments, x in ((self.keys, rope.undo(call.keys, positions)), (self.values, call.values)):
            moments.add(x[0].transpose(0, 1).flatten(1)[self.sinks :])
        if self.looks:
            q = call.queries.shape[2]
            away = torch.randint(0, q, (1, 1, q), generator=generator).to(positions.device)
            turned = rope.turn(rope.undo(call.queries, positions), away)
            for moments, x in zip(self.queries, turned[0].chunk(self.layer.kv_heads), strict=True):
                moments.add(x.flatten(0, 1))

    def bases(self) -> tuple[Basis, Basis]:
        """Of keys and of values."""
        metric = torch.block_diag(*(m.products for m in self.queries)) if self.looks else None
        return best_basis(self.keys.covariance, metric), best_basis(self.values.covariance)


def _share(share: float, of: int) -> int:
    return max(1, round(share * of))
