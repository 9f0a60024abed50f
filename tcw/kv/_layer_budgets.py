"""What methods share that give layers unequal parts of a budget, and leave it to another method which tokens stay."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from tcw import methods
from tcw.kv import Group, KVMethod, LayerShape, Scorer
from tcw.kv._evict import Evicting
from tcw.methods import option

if TYPE_CHECKING:
    from tcw.kv.calibrate import Session

Division = Callable[[int, int], Sequence[int]]


@dataclass(frozen=True)
class LayerBudgets(Evicting):
    """Base of methods that divide what a budget leaves beside sinks and window; `divide` says how."""

    score: str = option("snapkv", "method that scores the tokens, as it is by default")

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.scoring).scorer is KVMethod.scorer:
            raise ValueError(f"`{self.score}` does not score tokens")
        # a class attribute, as the catalogue reads it of classes; what it says of this object depends on `score`
        object.__setattr__(self, "needs_calibration", self.needs_calibration or self.scoring.needs_calibration)

    @cached_property
    def scoring(self) -> KVMethod:
        """The method that scores."""
        method = methods.build(self.score, {})
        if not isinstance(method, KVMethod):
            raise ValueError(f"`{self.score}` is no KV policy")
        return method

    @property
    def needs_rope(self) -> bool:  # type: ignore[override]
        """Whether the scoring method does."""
        return self.scoring.needs_rope

    def check(self, layers: tuple[LayerShape, ...]) -> None:
        """Refuse what this method or the scoring one cannot serve."""
        super().check(layers)
        self.scoring.check(layers)

    def calibrate(self, session: "Session") -> dict[str, Tensor]:
        """What the scoring method measures."""
        return self.scoring.calibrate(session)

    def outline(self, layers: tuple[LayerShape, ...]) -> dict[str, Tensor]:
        """What `calibrate` would return, zeros."""
        return self.scoring.outline(layers)

    def scorer(self, layer: LayerShape, group: Group, tensors: dict[str, Tensor]) -> Scorer | None:
        """The scoring method's."""
        return self.scoring.scorer(layer, group, tensors)

    def groups(self, layer: LayerShape, tensors: dict[str, Tensor]) -> tuple[Group, ...] | None:
        """All heads in one group, with the layer's part."""
        division, least = self.divide(layer.count, tensors), self.sinks + self.window

        def limit(seen: int) -> int:
            mean = self.mean_tokens(seen, layer)
            if mean <= least or mean >= seen:
                return mean
            return least + division(mean - least, seen - least)[layer.depth]

        return (Group(tuple(range(layer.kv_heads)), limit),)

    def divide(self, layers: int, tensors: dict[str, Tensor]) -> Division:
        """Make what divides a budget among so many layers.

        Returns:
            (tokens that a layer may keep beside sinks and window on average, the most that one can) -> tokens of
            each layer, from 0 to that most; their mean is that average.
        """
        raise NotImplementedError


def whole(parts: Iterable[Fraction]) -> list[int]:
    """Round each part up or down, so that the first few add up to the rounded sum of what they were, however many."""
    total, given, rounded = Fraction(0), 0, []
    for part in parts:
        total += part
        rounded.append(math.floor(total + Fraction(1, 2)) - given)
        given += rounded[-1]
    return rounded
