"""INT4: a weight in 4 bits and a scale for each group of columns.

    w ≈ (q - 8) · s,   q in 0..15,   or (q - z) · s with a zero point z of its own in each group (`grid=zero`)

GPTQ chooses the codes (tcw/weights/_gptq.py): each rounding error is made up for by the columns that follow, as far as
the layer's inputs are correlated. Scales are searched, never taken from the largest weight (tcw/weights/_grid.py), and
then scales and codes are improved in turns (tcw/weights/_tune.py, `tune` rounds). `algo=awq` is activation-aware
scaling of the inputs (Lin et al., 2023, https://arxiv.org/abs/2306.00978; tcw/weights/_awq.py) followed by the same;
the paper rounds to nearest instead. `algo=rtn` rounds to nearest on searched scales and needs no calibration.

The defaults, symmetric groups of 128, are what engines have their fastest kernels for.
"""

from dataclasses import dataclass
from typing import ClassVar

from tcw.methods import option
from tcw.tensor import TensorInfo
from tcw.weights._integer import Grid, IntegerMethod, check_options
from tcw.weights._linears import TARGETS


@dataclass(frozen=True)
class Int4(IntegerMethod):
    """4-bit integers in groups, codes by GPTQ: about a quarter of BF16."""

    needs_calibration: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2210.17323"
    WIDTHS: ClassVar[tuple[int, ...]] = (4,)
    limits: ClassVar[dict[str, float]] = {"max_kl": 0.4, "min_top1": 0.6, "max_weight_error": 0.3}

    algo: str = option("gptq", "how codes are chosen; rtn needs no calibration", choices=("gptq", "rtn", "awq"))
    group_size: int = option(128, "columns that share a scale; 0 for a whole row")
    grid: str = option("symmetric", "levels about 0, or with a zero point", choices=("symmetric", "zero"))
    targets: str = option("linear", "which tensors", choices=TARGETS)
    damp: float = option(0.01, "share of the Hessian's mean diagonal that is added to it")
    tune: int = option(2, "rounds of better scales and codes after GPTQ")

    def __post_init__(self) -> None:
        check_options(self.group_size, self.damp, self.tune)

    def grid_of(self, info: TensorInfo, bits: float | None = None) -> Grid:
        """The same for every tensor."""
        return Grid(4, self.grid, self.group_size, info.dtype)
