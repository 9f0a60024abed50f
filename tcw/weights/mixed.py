"""Mixed precision: 2, 3, 4 or 8 bits for each tensor, so that all together keep to a number of real bits per weight.

A survey of the original model measures what each width costs each tensor: the squared error of every output, weighted
by how much the model's own prediction depends on it. That is the second-order estimate of the KL divergence, as in
HAWQ (Dong et al., 2019, https://arxiv.org/abs/1911.03852) with the Fisher matrix for the Hessian. A dynamic program
then finds the cheapest choice under the budget (tcw/calibration/allocate.py); layers that share an input share a
width, since engines run them as one. Real bits count scales and padding: with groups of 128 the choices are about
2.13, 3.13, 4.13 and 8.13.

All grids are symmetric, which every engine can load, but a scale may be negative: then the extra level lies above 0
instead of below. That gives 2 bits the levels -2..1 or -1..2, whichever suits a group, and is as good as a zero point
at fewer bits.

Embeddings and output heads are included (`targets=all`) and never get fewer than 4 bits. Without calibration every
tensor gets the width nearest to the budget.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tcw.methods import option
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Curve, Statistics
from tcw.weights._integer import Grid, IntegerMethod, check_options, finite, words
from tcw.weights._linears import TARGETS, is_embedding

CHOICES = (2, 3, 4, 8)
LEAST_EMBEDDING = 4
_ROWS = 256  # quantised of each tensor by `probe`


@dataclass(frozen=True)
class Mixed(IntegerMethod):
    """2, 3, 4 or 8 bits for each tensor, chosen to harm the output least at an average that you set."""

    needs_calibration: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 1911.03852"
    WIDTHS: ClassVar[tuple[int, ...]] = CHOICES

    bits: float = option(3.0, "real bits per weight on average, all side data included")
    algo: str = option("gptq", "how codes are chosen; rtn needs no calibration", choices=("gptq", "rtn"))
    group_size: int = option(128, "columns that share a scale; 0 for a whole row")
    targets: str = option("all", "which tensors", choices=TARGETS)
    damp: float = option(0.01, "share of the Hessian's mean diagonal that is added to it")
    tune: int = option(2, "rounds of better scales and codes after GPTQ")

    @property
    def limits(self) -> dict[str, float]:
        """What verify holds it to: a bit less costs four times the KL; wide enough for 135 M parameters."""
        lost = max(0.005, 1.5 * 4 ** (3 - self.bits))
        return {"max_kl": lost, "min_top1": max(0.0, 1 - 0.5 * lost**0.5), "max_bits_per_weight": self.bits + 0.1}

    def __post_init__(self) -> None:
        check_options(self.group_size, self.damp, self.tune)
        if not 2.0 <= self.bits <= 9.0:
            raise ValueError(f"bits is an average from 2 to 9, not {self.bits}")

    def allocates(self) -> bool:
        """Widths are chosen over the whole model, where it is calibrated."""
        return self.calibrates()

    def grid_of(self, info: TensorInfo, bits: float | None = None) -> Grid:
        """The width whose real bits are nearest to `bits`; without them, to the average that was asked for."""
        goal = self.bits if bits is None or not math.isfinite(bits) else bits
        return min(self._grids(info), key=lambda grid: abs(_real(grid, info) - goal))

    def _grids(self, info: TensorInfo) -> list[Grid]:
        least = LEAST_EMBEDDING if is_embedding(info) else 0
        return [Grid(b, "symmetric", self.group_size, info.dtype) for b in CHOICES if b >= least]

    def predict(self, tensor: TensorData) -> int:
        """Bytes of a tensor that has the average; where widths are not chosen over the model, those of its own."""
        if not self.allocates():
            return super().predict(tensor)
        return min(tensor.info.nbytes, round(self.bits * tensor.info.numel / 8))

    def probe(self, tensor: TensorData, statistics: Statistics) -> dict[float, np.ndarray]:
        """Real bits of each width -> squared error of each output, float64 [out].

        Some rows are quantised as `encode` would; the others are taken to suffer the same share of their power.
        """
        from tcw.weights._tune import sample_errors

        weights = finite(tensor)
        hessian = statistics.hessian if self.calibrates() else None
        grids = self._grids(tensor.info)
        errors = sample_errors(weights, hessian, grids, self.damp, _ROWS)
        return {_real(grid, tensor.info): error for grid, error in zip(grids, errors, strict=True)}

    def share_out(self, curves: list[Curve]) -> dict[str, float]:
        """The choice of real bits for each tensor that harms least at the average `bits`."""
        from tcw.calibration import allocate

        return allocate.choose(curves, self.bits)


def _real(grid: Grid, info: TensorInfo) -> float:
    """Bits per weight that a row takes on a grid, all parts included: the same for all tensors of one width."""
    width = info.shape[1]
    return (32 * words(width, grid.bits) + grid.side_bits * grid.groups(width)) / width
