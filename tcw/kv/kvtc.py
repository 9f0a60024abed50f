"""KVTC: a transform coder. Keys and values of all heads are turned to where they vary most, and bits go there.

x is a token's keys before RoPE, those of all heads one after another, μ its mean over a calibration text and V the
eigenvectors of its covariance, λ_c the eigenvalues (PCA):

    y = Vᵀ(x - μ),   ŷ_c in b_c bits,   x̂ = V ŷ + μ

and the keys read are x̂, rotated to where the tokens stood in the text; values likewise, without a rotation. Bits are
divided by the least Σ λ_c D(b_c) for a number of bits a token, D being the error of 2^b levels for a normal variable;
channels with no bits are not even computed (tcw/kv/stores/spectrum.py). Staniszewski and Łańcucki, KV Cache Transform
Coding for Compact Storage in LLM Inference, ICLR 2026, https://arxiv.org/abs/2511.01815.

Where we differ: the paper packs caches to store them, and codes the bits once more without loss (DEFLATE); ours is read
at every step, so each layer stands by itself and a token's codes have a fixed size. Groups of the paper's channels have
their own scales; we have one for each token, in one byte, and the levels of Lloyd and Max. Bits are divided eight
channels at a time, by greedy choice, which equals the paper's dynamic programming where each further bit saves less.

`bits` are those of codes, on average over channels; a token costs 6 bytes a layer more. Calibration: μ, V and λ over
the text, without its first tokens, which are unlike all others and stay exact (`sinks`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.kv import AttentionCall, Group, KVMethod, LayerShape
from tcw.kv._subspace import Moments, best_basis
from tcw.kv.stores import Store
from tcw.kv.stores.lowrank import Factors, LowRank
from tcw.kv.stores.spectrum import WIDTHS, Channels, SpectrumStore, allot
from tcw.methods import option

if TYPE_CHECKING:
    from tcw.kv.calibrate import Session

TOGETHER = 8  # channels that have equal widths: their codes fill whole bytes
MOST = 4.0  # bits on average
_LEAST = 1e-6  # of the mean variance: a channel that never varied in the text


@dataclass(frozen=True)
class Kvtc(KVMethod):
    """Hold keys and values in 1 to 4 bits, spent where they vary most."""

    paper: ClassVar[str] = "arXiv 2511.01815"
    needs_calibration: ClassVar[bool] = True
    needs_rope: ClassVar[bool] = True

    bits: float = option(2.0, "of a number, on average")
    key_bits: float = option(0.0, "of a key's number; 0: as `bits`")
    value_bits: float = option(0.0, "of a value's number; 0: as `bits`")
    sinks: int = option(4, "first tokens that stay exact")
    window: int = option(32, "newest tokens that stay exact")
    interval: int = option(32, "when generating, round this many at a time")

    def __post_init__(self) -> None:
        if not all(0 < bits <= MOST for bits in (self.bits, *self.widths)):
            raise ValueError(f"bits are above 0 and at most {MOST:g}")
        if self.sinks < 0 or self.window < 0:
            raise ValueError("`sinks` and `window` are 0 or more")
        if self.interval < 1:
            raise ValueError("`interval` is 1 or more")

    @property
    def widths(self) -> tuple[float, float]:
        """Bits of a key's and of a value's number."""
        return self.key_bits or self.bits, self.value_bits or self.bits

    def store(
        self, layer: LayerShape, group: Group, tensors: dict[str, Tensor], inner: Callable[[], Store]
    ) -> Callable[[], Store]:
        """Codes of the turned vectors. Raises UsageError: the heads are divided."""
        if len(group.heads) != layer.kv_heads:
            raise UsageError(
                "`kvtc` codes all heads of a layer together, and another method of this policy divides them",
                "leave out one of them, or take `hadamard` in place of `kvtc`",
            )
        rope = layer.rope
        assert rope is not None
        keys, values = (_part(tensors, f"{layer.index}.{part}_") for part in ("key", "value"))
        return lambda: LowRank(keys[0], values[0], rope, SpectrumStore(keys[1], values[1]))

    def calibrate(self, session: "Session") -> dict[str, Tensor]:
        """Find where keys and values vary.

        Returns:
            By layer (`0.key_basis`), float32, of keys and values: `basis` [G·D, r], `mean` [G·D] and, for each width b
            that some channels have, `deviation_b` [n_b]; r is the sum of n_b.
        """
        seen = {layer.index: (Moments(), Moments()) for layer in session.layers}

        def look(layer: LayerShape, call: AttentionCall) -> None:
            assert layer.rope is not None
            keys = layer.rope.undo(call.keys, call.positions[:, None])
            for moments, x in zip(seen[layer.index], (keys, call.values), strict=True):
                moments.add(x[0].transpose(0, 1).flatten(1)[self.sinks :])

        session.watch(look)
        found: dict[str, Tensor] = {}
        for index, pair in seen.items():
            for part, moments, bits in zip(("key", "value"), pair, self.widths, strict=True):
                basis = best_basis(moments.covariance)
                own = _tensors(basis.encode, moments.mean, basis.energy, bits)
                found |= {f"{index}.{part}_{name}": tensor for name, tensor in own.items()}
        return found

    def outline(self, layers: tuple[LayerShape, ...]) -> dict[str, Tensor]:
        """Channels that all vary alike: as many bits, so as many bytes."""
        found: dict[str, Tensor] = {}
        for layer in layers:
            sizes = layer.kv_heads * layer.head_dim, layer.kv_heads * layer.value_dim
            for part, count, bits in zip(("key", "value"), sizes, self.widths, strict=True):
                own = _tensors(torch.zeros(count, count), torch.zeros(count), torch.ones(count), bits)
                found |= {f"{layer.index}.{part}_{name}": tensor for name, tensor in own.items()}
        return found


def _tensors(basis: Tensor, mean: Tensor, energy: Tensor, bits: float) -> dict[str, Tensor]:
    """What is kept of a basis [C, C] whose directions have these variances, largest first, with so many bits each."""
    groups = energy.split(TOGETHER)
    widths = allot([float(g.mean()) for g in groups], max(1, round(bits * len(groups))))
    energy = energy.clamp_min(float(energy.mean()) * _LEAST or 1.0)
    found = {"mean": mean}
    for width in sorted(set(widths) - {0}, reverse=True):
        own = torch.tensor([w == width for w, g in zip(widths, groups, strict=True) for _ in g])
        found[f"deviation_{width}"] = energy[own.to(energy.device)].sqrt()
    kept = sum(len(tensor) for name, tensor in found.items() if name != "mean")
    found["basis"] = basis[:, :kept]
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def _part(tensors: dict[str, Tensor], at: str) -> tuple[Factors, Channels]:
    """The basis and the channels of keys or values."""
    basis, named = tensors[at + "basis"], {width: f"{at}deviation_{width}" for width in reversed(WIDTHS)}
    channels = Channels({width: tensors[name] for width, name in named.items() if name in tensors})
    return Factors(basis, basis, tensors[at + "mean"]), channels
