"""A block of a vision tower taken apart, so that tokens can be cut between its attention and its MLP.

The blocks of ViT, DINOv2, CLIP and SigLIP are one block under different names, with or without layer scales:

    x ← x + drop(scale1(attention(norm1(x))))        first half
    x ← x + drop(scale2(mlp(norm2(x))))              second half

Attention is called through transformers' attention interface with a function of ours over the one that is set: it adds
a bias per key (padding, proportional attention) and remembers queries and keys. Not every version of every family hands
a mask down to its attention (DINOv2 before transformers 5.20 has no such argument), but all of them call that function.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tcw.errors import UsageError
from tcw.kv.attention import eager_of
from tcw.tokens.context import Looked
from tcw.tokens.watch import Call, attention_of

_FIRST_NORMS = ("layernorm_before", "norm1", "layer_norm1")
_SECOND_NORMS = ("layernorm_after", "norm2", "layer_norm2")
_DROPS = ("dropout", "drop_path")
_SPECIAL = ("cls_token", "class_embedding", "register_tokens", "distillation_token")
_PREFIX = "tcw_tower_"
_CHUNK = 256  # queries whose attention is held at a time


@dataclass(frozen=True)
class Parts:
    """The modules of one block."""

    norm1: nn.Module
    attention: nn.Module
    scale1: nn.Module
    drop: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    scale2: nn.Module

    @classmethod
    def of(cls, block: nn.Module) -> "Parts":
        """Find them. Raises UsageError for a block that is built otherwise."""
        children = dict(block.named_children())

        def take(*names: str) -> nn.Module:
            return next((children.pop(name) for name in names if name in children), nn.Identity())

        attention = attention_of(block)
        children = {name: child for name, child in children.items() if child is not attention}
        parts = cls(
            norm1=take(*_FIRST_NORMS), attention=attention, scale1=take("layer_scale1"), drop=take(*_DROPS),
            norm2=take(*_SECOND_NORMS), mlp=take("mlp"), scale2=take("layer_scale2"),
        )  # fmt: skip
        if children or any(isinstance(part, nn.Identity) for part in (parts.norm1, parts.norm2, parts.mlp)):
            raise UsageError(
                f"tokens cannot be cut inside the blocks of this tower (`{type(block).__name__}`)",
                "use a policy that cuts at the language model's input or in its layers, such as `divprune`",
            )
        return parts

    def first(self, x: Tensor, bias: Tensor | None, **kwargs: Any) -> tuple[Tensor, Call]:
        """The half up to where tokens are cut: hidden states [B, S, D], and what attention was called with.

        Args:
            x: [B, S, D].
            bias: added to the attention logits of each key, [B, 1, 1, S]; None: nothing is.
            kwargs: what the block was called with.
        """
        mixed, call = _attend(self.attention, self.norm1(x), bias, kwargs)
        return self.drop(self.scale1(mixed)) + x, call

    def second(self, x: Tensor) -> Tensor:
        """The other half."""
        return self.drop(self.scale2(self.mlp(self.norm2(x)))) + x


@dataclass
class _Attention:
    """An attention call that is going on: what to add, and what was seen."""

    bias: Tensor | None
    call: Call | None = None


_going_on: list[_Attention] = []


def _attend(attention: nn.Module, normed: Tensor, bias: Tensor | None, kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    config = next(module.config for module in attention.modules() if hasattr(module, "config"))
    before = config._attn_implementation
    if bias is not None and "flash" in before:
        raise UsageError(f"`{before}` takes no mask per key, which merged tokens need", "load the model with `sdpa`")
    config._attn_implementation = _over(before)
    _going_on.append(here := _Attention(bias))
    try:
        out = attention(normed, **kwargs)
    finally:
        _going_on.pop()
        config._attn_implementation = before
    assert here.call is not None, "the tower's attention does not go through transformers' interface"
    return out[0] if isinstance(out, tuple) else out, here.call


@cache
def _over(before: str) -> str:
    """The name of our attention function over the one called `before`; registered when first asked for."""

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        here, base = _going_on[-1], eager_of if before == "eager" else ALL_ATTENTION_FUNCTIONS[before]
        scaling = kwargs.get("scaling")
        here.call = query.detach(), key.detach(), float(query.shape[-1] ** -0.5 if scaling is None else scaling)
        return base(module, query, key, value, mask if here.bias is None else here.bias, **kwargs)

    AttentionInterface.register(_PREFIX + before, attend)
    return _PREFIX + before


def leading(tower: nn.Module) -> int:
    """How many tokens of a sequence are no patches and stand before them: a class token, registers."""
    found = {name.rpartition(".")[2]: parameter for name, parameter in tower.named_parameters()}
    return sum(found[name].shape[1] if found[name].dim() == 3 else 1 for name in _SPECIAL if name in found)


@dataclass(frozen=True)
class Together(Looked):
    """Frames with different numbers of tokens as one sequence: what is asked for is put end to end.

    `queries` and `keys` are those of the first frame: a row of attention stays within a frame.
    """

    frames: tuple[Looked, ...] = ()

    @classmethod
    def of(cls, frames: list[Looked]) -> "Together":
        """Put frames together."""
        first = frames[0]
        return cls(first.queries, first.keys, first.scaling, first.cls, tuple(frames))

    def cls_row(self) -> Tensor:
        """Of each frame, what its class token attends to: float32 [N]."""
        return torch.cat([frame.cls_row() for frame in self.frames])

    def received(self) -> Tensor:
        """Attention received within the frame: float32 [N]."""
        return torch.cat([frame.received() for frame in self.frames])

    def mean_keys(self) -> Tensor:
        """Keys, mean over heads: float32 [N, head_dim]."""
        return torch.cat([frame.mean_keys() for frame in self.frames])


def attention_rows(call: Call, row: int, special: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """What the class token of a sequence attends to as the block computes it, and the logits: float32 [H, 1, n].

    Without a class token: what its patches receive from all of them on the mean, and the logarithm of that.

    Args:
        call: queries and keys of the batch, and the scaling.
        row: which sequence.
        special: tokens before the patches.
        size: float32 [n], how much each of its patches counts in proportional attention.
    """
    real = special + len(size)
    queries, keys = (one[row, :, :real].float() for one in call[:2])
    bias = torch.cat([size.new_zeros(special), size.log()])
    if special:
        logits = queries[:, :1] @ keys.mT * call[2] + bias
        return logits.softmax(-1)[..., special:], logits[..., special:]
    attention = keys.new_zeros(len(keys), 1, real)
    for part in queries.split(_CHUNK, 1):
        attention += (part @ keys.mT * call[2] + bias).softmax(-1).sum(1, keepdim=True) / max(real, 1)
    return attention, attention.log()
