"""VisionZip: keep the tokens that the class token looks at, and a few means of all others.

    dominant      the highest attention of the class token, 54 of 64
    contextual    of the others every so-and-so-many-th, 10 of 64; each remaining token goes to the one whose key is
                  most similar (mean over heads), which becomes the mean

Yang et al., VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025,
https://arxiv.org/abs/2412.04467. A tower without a class token is scored by the attention that tokens receive.

Where we differ. A contextual token is the mean of itself and what it takes in; the authors add the mean of the others
to it, which about doubles its length. They stand evenly among all the others; the authors' whole-number step leaves the
end of the image without one. Merging is done on the projector's output, not its input. Calibration: none.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tcw.methods import option
from tcw.tokens import INPUT, Shape, Stage, TokenMethod
from tcw.tokens._similarity import tower_keys
from tcw.tokens.context import Context
from tcw.tokens.merges import into_nearest
from tcw.tokens.plan import Plan
from tcw.tokens.scores import cls_attention, last
from tcw.tokens.selects import ranked


@dataclass(frozen=True)
class Visionzip(TokenMethod):
    """Keep the tokens that the class token looks at, and a few means of all others."""

    paper: ClassVar[str] = "arXiv 2412.04467"

    contextual: float = option(0.156, "share of the tokens left that are means of the others, 0..1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.contextual < 1:
            raise ValueError(f"`contextual` is 0 or more and below 1, got {self.contextual:g}")

    def stages(self, shape: Shape, learned: dict[str, Tensor]) -> tuple[Stage, ...]:
        """One cut."""
        return (Stage(INPUT, self._plan, self.keep, layers=last),)

    def _plan(self, context: Context, k: int | None) -> Plan:
        assert k is not None, "a share is given"
        means = min(int(self.contextual * k + 0.5), k - 1)
        order = ranked(cls_attention(last)(context))
        others = order[k - means :].sort().values
        evenly = (2 * torch.arange(means, device=order.device) + 1) * len(others) // max(1, 2 * means)
        anchors = others[evenly]
        keep = torch.cat([order[: k - means], anchors]).sort().values
        return into_nearest(context, keep, torch.isin(keep, anchors), features=tower_keys)
