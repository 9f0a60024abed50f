"""What became of the images of the last batch: for reports and pictures."""

from dataclasses import dataclass, field

from torch import Tensor

from tcw.tokens.plan import Plan


@dataclass
class Trace:
    """One image (or video) through all stages.

    Attributes:
        sample: its row of the batch.
        number: which image of that sample it is, from 0.
        grid: (frames, rows, columns).
        place: float32 [N, 3], frame, row and column of each of its N tokens.
        cuts: for each stage in order its name ("input", "layer 16", "block 3") and one plan of all N tokens up to and
            including that stage.
    """

    sample: int
    number: int
    grid: tuple[int, int, int]
    place: Tensor
    cuts: list[tuple[str, Plan]] = field(default_factory=list)

    @property
    def original(self) -> int:
        """N."""
        return len(self.place)

    @property
    def plan(self) -> Plan | None:
        """All stages as one plan; None before the first."""
        return self.cuts[-1][1] if self.cuts else None
