"""PyramidKV: lower layers keep more tokens, upper ones fewer.

    top    = b / β                    b: tokens that a layer keeps beside sinks and window on average
    bottom = 2·b - top                layers between them on a straight line; all add up to layers · b

Cai et al., PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, 2024,
https://arxiv.org/abs/2406.02069, section 4, with its β = 20: in lower layers attention is spread over the text, in
upper ones it rests on a few tokens. If the text is shorter than `bottom`, the bottom layer keeps all and the line
turns about its middle, as in the paper's code. Which tokens a layer keeps is `snapkv`'s choice, as in the paper, or
that of any other method named by `score`, with its defaults.

Where we differ: parts are rounded such that no token of the budget is lost; the line is over what sinks and window
leave; it follows the text as it grows. Calibration: what the scoring method needs, `snapkv` nothing.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from tcw.kv._layer_budgets import Division, LayerBudgets, whole
from tcw.methods import option


@dataclass(frozen=True)
class Pyramidkv(LayerBudgets):
    """Keep more tokens in lower layers than in upper ones, along a straight line."""

    paper: ClassVar[str] = "arXiv 2406.02069"

    beta: int = option(20, "the top layer keeps the average, divided by this")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"`beta` is 1 or more, not {self.beta}")

    def divide(self, layers: int, tensors: dict[str, Tensor]) -> Division:
        """A straight line from the bottom layer to the top one."""
        return lambda mean, most: _line(layers, self.beta, mean, most)


@lru_cache(maxsize=256)
def _line(layers: int, beta: int, mean: int, most: int) -> list[int]:
    if layers == 1:
        return [mean]
    bottom = min(Fraction(most), 2 * mean - Fraction(mean, beta))
    step = 2 * (bottom - mean) / (layers - 1)
    return whole(bottom - depth * step for depth in range(layers))
