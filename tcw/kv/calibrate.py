"""Calibrate a policy: run the model on a text and let methods look at every layer's attention."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tcw.kv import AttentionCall, LayerShape

Look = Callable[[LayerShape, AttentionCall], None]


@dataclass(frozen=True)
class Session:
    """What a method may ask of the model that it is calibrated for.

    Attributes:
        model: in eval mode, weights as they will be used.
        layers: its full-attention layers.
        tokens: int64 [sequences, length], a text.
        seed: for what a method draws.
    """

    model: Any
    layers: tuple[LayerShape, ...]
    tokens: Tensor
    seed: int = 0

    def watch(self, look: Look, tokens: Tensor | None = None) -> None:
        """Run the model on `tokens` (by default the text), a sequence at a time; `look` is told of each layer's call.

        A call has all heads of the layer, and `seen` = 0.
        """
        raise NotImplementedError
