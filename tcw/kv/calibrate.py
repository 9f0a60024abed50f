"""Calibrate a policy: run the model on a text and let methods look at every layer's attention."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tcw.errors import SourceError, UsageError
from tcw.kv import AttentionCall, LayerShape
from tcw.kv.attention import Attention, body_of, install
from tcw.kv.cache import PolicyCache
from tcw.kv.layer import PolicyLayer

if TYPE_CHECKING:
    from tcw.kv.policy import Policy

Look = Callable[[LayerShape, AttentionCall], None]


@dataclass(frozen=True)
class Session:
    """What a method may ask of the model that it is calibrated for.

    Attributes:
        model: in eval mode, weights as they will be used.
        layers: its full-attention layers.
        tokens: int64 [sequences, length], a text; [0, 0] where no method needs one.
        seed: for what a method draws.
        tokenizer: the model's, if there is one.
    """

    model: Any
    layers: tuple[LayerShape, ...]
    tokens: Tensor
    seed: int = 0
    tokenizer: Any = None

    @torch.no_grad()
    def watch(self, look: Look, tokens: Tensor | None = None) -> None:
        """Run the model on `tokens` (by default the text), a sequence at a time; `look` is told of each layer's call.

        A call has all heads of the layer, and `seen` = 0.
        """
        install(self.model)
        body = body_of(self.model)
        for row in self.tokens if tokens is None else tokens:
            layers: dict[int, PolicyLayer] = {shape.index: _Watched(shape, look) for shape in self.layers}
            cache = PolicyCache(self.model.config, layers)
            body(input_ids=row[None].to(self.model.device), past_key_values=cache, use_cache=True)


class _Watched(PolicyLayer):
    """A layer that shows each call and keeps nothing."""

    def __init__(self, shape: LayerShape, look: Look) -> None:
        super().__init__(shape, lambda device: [])
        self._look = look

    def attend(
        self,
        base: Attention,
        module: torch.nn.Module,
        query: Tensor,
        mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        keys, values = self._take()
        out, _ = base(module, query, keys, values, mask, scaling=scaling, **kwargs)
        positions = self._positions(None, keys.shape[2], kwargs.get("position_ids"), keys)
        rope = self.shape.rope
        shape = self.shape if rope is None else replace(self.shape, rope=rope.to(keys.device))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        self._look(shape, AttentionCall(query, keys, values, None, positions, scale, kwargs.get("softcap"), 0))
        return out


def calibrated(policy: "Policy", model: Any, tokens: Tensor | None, seed: int = 0, tokenizer: Any = None) -> "Policy":
    """The policy with what its methods measure on the model.

    Raises:
        UsageError: a method needs a text and there is none.
        SourceError: what was measured is not finite.
    """
    found = dict(policy.tensors)
    for name, method in policy.methods.items():
        if not method.needs_calibration or name in found:
            continue
        if tokens is None and method.reads_text():
            raise UsageError(
                f"`{name}` is calibrated on a text, and none was given", "give `tokens`, int64 [rows, length]"
            )
        text = torch.empty(0, 0, dtype=torch.long) if tokens is None else tokens
        session = Session(model, policy.layers, text, seed, tokenizer)
        measured = {key: t.detach().cpu().contiguous() for key, t in method.calibrate(session).items()}
        if bad := [key for key, t in measured.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]:
            raise SourceError(
                f"`{name}` measured `{bad[0]}` as not finite", "the model's activations overflow: use float32"
            )
        found[name] = measured
    return type(policy)(policy.methods, policy.layers, found)
