"""INT8: a weight in 8 bits, so close to the original that it is hard to measure.

    w ≈ (q - 128) · s,   q in 0..255,   one s for each output channel, or for each group of `group_size` columns

The codes are chosen by GPTQ (tcw/weights/_gptq.py), or simply rounded (`algo=rtn`), which needs no calibration; at 8
bits the two differ little. `algo=awq` scales the inputs first (tcw/weights/_awq.py) and then does as `gptq` does.
"""

from dataclasses import dataclass
from typing import ClassVar

from tcw.methods import option
from tcw.tensor import TensorInfo
from tcw.weights._integer import Grid, IntegerMethod, check_options
from tcw.weights._linears import TARGETS


@dataclass(frozen=True)
class Int8(IntegerMethod):
    """8-bit integers with searched scales and GPTQ: about half of BF16, with hardly a trace in the output."""

    needs_calibration: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2210.17323"
    WIDTHS: ClassVar[tuple[int, ...]] = (8,)
    limits: ClassVar[dict[str, float]] = {"max_kl": 0.01, "min_top1": 0.94, "max_weight_error": 0.02}

    algo: str = option("gptq", "how codes are chosen; rtn needs no calibration", choices=("gptq", "rtn", "awq"))
    group_size: int = option(0, "columns that share a scale; 0 for a whole row")
    grid: str = option("symmetric", "levels about 0, or with a zero point", choices=("symmetric", "zero"))
    targets: str = option("linear", "which tensors", choices=TARGETS)
    damp: float = option(0.01, "share of the Hessian's mean diagonal that is added to it")

    def __post_init__(self) -> None:
        check_options(self.group_size, self.damp)

    def grid_of(self, info: TensorInfo, bits: float | None = None) -> Grid:
        """The same for every tensor."""
        return Grid(8, self.grid, self.group_size, info.dtype)
