"""INT2: four levels a weight. Small, and never near-lossless: measure before you ship it.

    grid       levels                                       side data a group
    float      q · s + z, z any number                      32 bits; the default, with groups of 128
    midrise    (-1.5, -0.5, 0.5, 1.5) · s                   16 bits; has no zero, likes weights without outliers
    zero       (q - z) · s, z in 0..3                       18 bits; what other engines can load

A symmetric grid -2..1 is not offered: it wastes a level on the side where it is not needed. With so few levels
everything before the rounding counts. The model is rotated (`rotate=on`, tcw/calibration/rotation.py; QuaRot, Ashkboos
et al., 2024, https://arxiv.org/abs/2404.00456), which leaves its output as it was but spreads the outliers of a few
inputs over all columns: most layers are rounded a little worse for it and the few that ruin a model much better.
Scales and zeros are searched for least squared error; GPTQ chooses the codes; and `tune` rounds improve scales, zeros
and codes in turns (tcw/weights/_tune.py, which says how that differs from SignRound and EfficientQAT).
"""

from dataclasses import dataclass
from typing import ClassVar

from tcw.methods import option
from tcw.tensor import TensorInfo
from tcw.weights._integer import Grid, IntegerMethod, check_options
from tcw.weights._linears import TARGETS


@dataclass(frozen=True)
class Int2(IntegerMethod):
    """2-bit integers, tuned after GPTQ: about a seventh of BF16, and it shows in the output."""

    needs_calibration: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2210.17323"
    WIDTHS: ClassVar[tuple[int, ...]] = (2,)
    limits: ClassVar[dict[str, float]] = {"max_kl": 2.5, "min_top1": 0.25}  # not broken, no more than that

    algo: str = option("gptq", "how codes are chosen; rtn needs no calibration", choices=("gptq", "rtn"))
    group_size: int = option(128, "columns that share a scale; 0 for a whole row")
    grid: str = option("float", "the four levels", choices=("float", "midrise", "zero"))
    rotate: bool = option(True, "rotate the model first, which leaves its output as it was")
    targets: str = option("linear", "which tensors", choices=TARGETS)
    damp: float = option(0.01, "share of the Hessian's mean diagonal that is added to it")
    tune: int = option(4, "rounds of better scales and codes after GPTQ")

    def __post_init__(self) -> None:
        check_options(self.group_size, self.damp, self.tune)

    def rotates(self) -> bool:
        """As the option says."""
        return self.rotate

    def grid_of(self, info: TensorInfo, bits: float | None = None) -> Grid:
        """The same for every tensor."""
        return Grid(2, self.grid, self.group_size, info.dtype)
