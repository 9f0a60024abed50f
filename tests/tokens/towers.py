"""What tests of cuts inside towers share: stages, planners, and the slow way to cut a tower."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tcw.tokens import Stage, block
from tcw.tokens.context import Context
from tcw.tokens.plan import Plan
from tcw.tokens.watch import blocks_of

PATCHES = 36
Planner = Callable[[Context, int | None], Plan]


def cut(at: int, plan: Planner, keep: float | None = None, **more: Any) -> tuple[int, Stage]:
    return at, Stage(block(at), plan, keep, **more)


def by_score(context: Context, k: int | None) -> Plan:
    """The k that the class token looks at; without k as many as have more than their share."""
    assert context.rows is not None
    score = context.rows.last()
    k = max(1, int((score > score.mean()).sum())) if k is None else k
    return Plan.dropping(score.sort(stable=True, descending=True).indices[:k], context.size)


def into_first(context: Context, k: int | None) -> Plan:
    """Token i goes into token i modulo k."""
    assert k is not None
    return Plan.merging(torch.arange(k), torch.arange(context.tokens) % k, context.size)


def special(tower: PreTrainedModel) -> int:
    return 0 if "Siglip" in type(tower).__name__ else 1


def dense(tower: PreTrainedModel, pixels: Tensor) -> list[Tensor]:
    """Hidden states before each block and after the last."""
    return list(tower(pixels, output_hidden_states=True).hidden_states)


def final(tower: PreTrainedModel, hidden: Tensor) -> Tensor:
    """What the tower does after its last block."""
    norm = {"Siglip": "post_layernorm", "Clip": ""}.get(type(tower).__name__.removesuffix("VisionModel").title())
    name = "layernorm" if norm is None else norm
    return getattr(tower, name)(hidden) if name else hidden


def through(layer: Any, hidden: Tensor) -> Tensor:
    """One block. DINOv2's took no mask before transformers 5.20; CLIP's and SigLIP's have to be given one."""
    return layer(hidden, None) if hasattr(layer, "self_attn") else layer(hidden)


def sliced(tower: PreTrainedModel, pixels: Tensor, cuts: Sequence[tuple[int, Tensor]]) -> Tensor:
    """One image with tokens sliced off after blocks: what cutting before the MLP comes to where nothing is merged."""
    hidden = dense(tower, pixels[None])[cuts[0][0]]
    for n, layer in list(enumerate(blocks_of(tower)))[cuts[0][0] :]:
        hidden = through(layer, hidden)
        for at, keep in cuts:
            if at == n:
                hidden = torch.cat([hidden[:, : special(tower)], hidden[:, special(tower) :][:, keep]], 1)
    return final(tower, hidden)[0]


def after_attention(tower: PreTrainedModel, pixels: Tensor, number: int) -> Tensor:
    """What the second norm of a block is given, without cuts."""
    found: list[Tensor] = []
    names = ("layernorm_after", "norm2", "layer_norm2")
    norm = next(getattr(blocks_of(tower)[number], name) for name in names if hasattr(blocks_of(tower)[number], name))
    hook = norm.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    tower(pixels)
    hook.remove()
    return found[0]
