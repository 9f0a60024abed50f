"""Grid: keep visual tokens evenly over the image. The control that methods which look at the image have to beat.

Of every frame the same share; of a frame, rows and columns in the image's proportion, and exactly the tokens asked for:
rows differ by one token where it does not divide. Knows nothing of the image but its size. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.methods import option
from tcw.tokens import Shape, Stage, TokenMethod, choose
from tcw.tokens._controls import PLACES, check_depth, place
from tcw.tokens.merges import drop
from tcw.tokens.selects import grid


@dataclass(frozen=True)
class Grid(TokenMethod):
    """Keep visual tokens evenly over the image: a control that looks at nothing."""

    paper: ClassVar[str] = "none: a control"
    static: ClassVar[bool] = True

    at: str = option("input", "cut at the language model's input, or before a layer of it", choices=PLACES)
    depth: float = option(0.5, "with at=layer: how far into the layers, 0..1")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_depth(self.depth)

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut."""
        return (Stage(place(self.at, self.depth), choose(grid(), drop()), self.keep),)
