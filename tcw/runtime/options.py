"""What one can say about weights that stay compressed: names, and defaults."""

from dataclasses import dataclass

from tcw.errors import UnknownName

AUTO, WHOLE, PLAIN, SLICES = "auto", "whole", "plain", "slices"
HEADS = (AUTO, WHOLE, PLAIN, SLICES)
FORMS = ("p4", "p3")  # of packed BF16 weights


@dataclass(frozen=True)
class Options:
    """How weights are decoded on a GPU; `head` is explained in resident.py.

    Attributes:
        scratch: bytes for decoded weights; None for twice the largest weight in the blocks, which is the least.
        head: "auto", "whole", "plain" or "slices".
        overlap: decode a unit beside the one before it. Without that the scratch may be half as large.
        offload: keep coded weights of the blocks in the host's memory.
    """

    scratch: int | None = None
    head: str = AUTO
    overlap: bool = True
    offload: bool = False

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise UnknownName("way with the head", str(self.head), HEADS)
