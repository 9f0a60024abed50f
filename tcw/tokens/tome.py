"""ToMe: in each block of the vision tower, merge the r pairs of tokens that are most alike.

    A, B      tokens in turn
    edges     each of A to the most similar of B: cosine of keys, mean over heads
    merge     along the r strongest edges; means count a token as often as it stands for original ones
    attend    log(size) is added to the logits of a merged token's key

Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, https://arxiv.org/abs/2210.09461. At most half of the
tokens are merged in a block. `schedule`, all so that `keep` is left after the last block:

    constant      the same r in each block from `first` on (the paper's)
    decreasing    r falls linearly to zero in the last block (the paper's other one)
    single        all in one block, at `depth`: a quarter of the tokens is merged and what is left matched again, until
                  k remain (ours; of a trained DINOv2-S's features it leaves less than the others do)

Where we differ: the paper gives r and takes what is left; here `keep` gives r. Tokens keep the order of the image, of
which A and B are taken anew in each block; the authors' code puts the rest of A before B. The class token is in
neither. Where the tower of a vision-language model needs its whole grid (Qwen-VL), all is merged at the language
model's input, by keys of the tower's last layer. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tcw.errors import UsageError
from tcw.methods import option
from tcw.tokens import INPUT, Shape, Stage, TokenMethod, block
from tcw.tokens._matching import matched, shares
from tcw.tokens._similarity import tower_keys
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan
from tcw.tokens.scores import last

CONSTANT, DECREASING, SINGLE = "constant", "decreasing", "single"


@dataclass(frozen=True)
class Tome(TokenMethod):
    """In each block of the vision tower, merge the pairs of tokens whose keys are most alike."""

    paper: ClassVar[str] = "arXiv 2210.09461"
    static: ClassVar[bool] = True

    schedule: str = option(
        CONSTANT, "as many merges in each block, ever fewer, or all in one", (CONSTANT, DECREASING, SINGLE)
    )
    first: int = option(0, "first block that merges, unless all is merged in one")
    depth: float = option(0.5, "where all is merged in one, 0..1 of the blocks")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first < 0:
            raise ValueError(f"`first` is 0 or more, got {self.first}")
        if not 0 <= self.depth < 1:
            raise ValueError(f"`depth` is 0 or more and below 1, got {self.depth:g}")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """A cut in each block that merges. Raises UsageError where the tower has too few blocks for `keep`."""
        if not shape.merges_inside:
            return (Stage(INPUT, _step_by_step, self.keep, layers=last),)
        if self.schedule == SINGLE:
            return (Stage(block(depth=self.depth), _step_by_step, self.keep, layers=last),)
        count = shape.blocks - self.first
        if count < 1:
            raise UsageError(f"`first={self.first}`: the tower has {shape.blocks} blocks", "begin at an earlier one")
        falls = self.schedule == DECREASING and count > 1
        weights = [(count - 1 - n) / (count - 1) if falls else 1.0 for n in range(count)]
        left = shares(self.keep, weights)
        return tuple(
            Stage(block(self.first + n), _plan, left[n], layers=last) for n, weight in enumerate(weights) if weight > 0
        )


def _plan(context: Context, k: int | None) -> Plan:
    assert k is not None, "a share is given"
    return matched(tower_keys(context), context.size, k)


def _step_by_step(context: Context, k: int | None) -> Plan:
    assert k is not None, "a share is given"
    return matched(tower_keys(context), context.size, k, most=0.25)
