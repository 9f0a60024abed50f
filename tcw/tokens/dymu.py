"""DyMU: merge tokens that are more alike than a threshold, so that plain images get fewer tokens than busy ones.

    A, B, edges    as ToMe has them (tcw/tokens/_matching.py), in every block of the vision tower
    merge          along every edge with a similarity above the block's τ; means and attention count by size
    τ              over batches of b images: the similarity of the first edge that is left when the r·b strongest of
                   the batch are merged, 0 at least; the mean over batches

Wang et al., DyMU: Dynamic Merging and Virtual Unmerging for Efficient VLMs, 2025, https://arxiv.org/abs/2504.17040. r
is what ToMe would merge in each block to leave `keep`: over images like those of the calibration that is the mean. How
far τ differs between batches is stored beside it.

With `expand` the language model sees all tokens again, merged ones as copies: the authors' virtual unmerging, which
they too carry out as copies since that is faster. Its prefill and cache are as long as before; only the tower saves.
Without it the language model goes on with what is left.

Where we differ: batches of `batch` images, of as many as are given; the authors' code takes batches of 128 from a large
set. Tokens keep the order of the image, and there is no limit to how many of one image are merged in a block but that
half of them are. Calibration: images.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from tcw.methods import option
from tcw.tokens import Shape, Stage, TokenMethod, block
from tcw.tokens._frames import frames_of
from tcw.tokens._matching import edges, merged, shares
from tcw.tokens._similarity import tower_keys
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan
from tcw.tokens.scores import last
from tcw.tokens.selects import ranked
from tcw.tokens.tower import TowerRun, batches
from tcw.tokens.watch import blocks_of


class _Finder:
    """Merges the strongest edges of a whole batch in one block, and notes how strong the next one is.

    Args:
        share: of the batch's tokens, as they were before any merge, that are merged in this block.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.found: list[float] = []

    def __call__(self, context: Context, k: int | None) -> Plan:
        keys, images = tower_keys(context), frames_of(context)
        of = [edges(keys[tokens]) for tokens in images]
        alike = torch.cat([strength for strength, _, _ in of])
        a = torch.cat([tokens[one] for tokens, (_, one, _) in zip(images, of, strict=True)])
        b = torch.cat([tokens[one] for tokens, (_, _, one) in zip(images, of, strict=True)])
        order = ranked(alike)
        r = min(round(self.share * context.original), len(order))
        self.found.append(max(0.0, float(alike[order[min(r, len(order) - 1)]])) if len(order) else 0.0)
        return merged(a[order[:r]], b[order[:r]], context.size)


@dataclass(frozen=True)
class Dymu(TokenMethod):
    """Merge tokens that are more alike than a threshold found on images: plain images get fewer tokens."""

    paper: ClassVar[str] = "arXiv 2504.17040"
    needs_calibration: ClassVar[bool] = True

    keep: float = option(0.25, "share of the visual tokens that is left, on the mean over images like those learned on")
    expand: bool = option(True, "the language model sees all tokens again, merged ones as copies")
    batch: int = option(16, "images that a threshold is found on at a time")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1:
            raise ValueError(f"`batch` is 1 or more, got {self.batch}")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """A rule for each block."""
        thresholds = learned["thresholds"][: shape.blocks].tolist()
        return tuple(Stage(block(n), partial(_above, threshold), layers=last) for n, threshold in enumerate(thresholds))

    def calibrate(self, model: Any, images: list[Tensor]) -> dict[str, Tensor]:
        """Find the thresholds.

        Returns:
            `thresholds`: float32 [blocks], cosines; `spread`: float32 [blocks], their standard deviation over batches.
        """
        count = len(blocks_of(model))
        left = [1.0, *shares(self.keep, [1.0] * count)]
        finders = [_Finder(left[n] - left[n + 1]) for n in range(count)]
        stages = [(n, Stage(block(n), finder, layers=last, whole=True)) for n, finder in enumerate(finders)]
        weight = next(model.parameters())
        with torch.no_grad(), TowerRun(model, stages):
            for batch in batches(images, self.batch):
                model(pixel_values=batch.to(weight))
        found = torch.tensor([finder.found for finder in finders])
        return {"thresholds": found.mean(1), "spread": found.std(1, correction=0)}


def _above(threshold: float, context: Context, k: int | None) -> Plan:
    """Merge along every edge that is stronger than the threshold."""
    alike, a, b = edges(tower_keys(context))
    strong = alike > threshold
    return merged(a[strong], b[strong], context.size)
