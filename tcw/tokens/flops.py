"""What a prefill costs, from how many tokens each block gets, and what a policy makes of that.

    a block     2 FLOPs a weight and token in its linear layers, and 2 x heads x (key + value size) a pair of tokens in
                attention; of experts, as many as a token is routed to
    a model     the blocks of its vision tower and of its language model

Attention is counted in full, as torch's FlopCounterMode does, also where half of it is masked. Embeddings, projector
and head are left out: of a language model they are a few hundredths. So is what a policy itself computes: scores, and
at a layer the queries and keys that it looks at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from tcw.tokens import Shape
from tcw.tokens.watch import attention_of, blocks_of

if TYPE_CHECKING:
    from tcw.tokens.engine import TokenPolicy

TEXT = 64  # tokens of text in the prompt that an outlook is for
VISUAL = 1024  # visual tokens, where the model decides by the picture how many there are
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ROUTED = ("num_experts_per_tok", "top_k_experts", "moe_k")


@dataclass(frozen=True)
class Blocks:
    """What each block costs: FLOPs a token in attention's linear layers and in all others, and a pair of tokens."""

    attention: tuple[float, ...]
    rest: tuple[float, ...]
    pair: tuple[float, ...]

    @classmethod
    def of(cls, stack: nn.Module) -> "Blocks":
        """Count the blocks of a tower or decoder; its weights may be on the device "meta"."""
        blocks = list(blocks_of(stack))
        inside = [_linear(attention_of(block), block) for block in blocks]
        outside = [_linear(block, block) - part for block, part in zip(blocks, inside, strict=True)]
        return cls(tuple(inside), tuple(outside), tuple(map(_pair, blocks)))

    def flops(self, tokens: Sequence[float], after: Sequence[float] | None = None) -> float:
        """FLOPs when block i gets `tokens[i]` tokens, of which `after[i]` (None: all) are left after its attention.

        Blocks beyond those named (a language model may read an earlier layer of its tower than the last) get what the
        last of them leaves.
        """
        rest = tokens if after is None else after
        beyond = [rest[-1]] * (len(self.pair) - len(tokens))
        inside, outside = [*tokens, *beyond], [*rest, *beyond]
        both = sum(a * n + b * n * n for a, b, n in zip(self.attention, self.pair, inside, strict=True))
        return both + sum(c * n for c, n in zip(self.rest, outside, strict=True))


def _linear(part: nn.Module, block: nn.Module) -> float:
    """Weights of a part of a block that a token is multiplied with, twice."""
    config = getattr(attention_of(block), "config", None)
    experts, routed = _first(config, _EXPERTS), _first(config, _ROUTED)
    share = routed / experts if experts and routed else 1.0
    return sum(2 * p.numel() * (share if p.dim() == 3 else 1.0) for p in part.parameters() if p.dim() in (2, 3))


def _pair(block: nn.Module) -> float:
    whole = attention_of(block)  # in some releases a module inside it does the work
    attention = next((part for part in whole.modules() if _first(part, _HEADS)), whole)
    config = getattr(attention, "config", None)
    heads = _first(attention, _HEADS) or _first(config, _HEADS)
    head = _first(attention, ("qk_head_dim", "head_dim", "attention_head_size")) or _first(config, ("head_dim",))
    keys = head or _first(config, ("hidden_size",)) // max(1, heads)
    values = _first(attention, ("v_head_dim",)) or keys
    return 2.0 * heads * (keys + values)


def _first(owner: Any, names: Sequence[str]) -> int:
    return next((value for name in names if isinstance(value := getattr(owner, name, None), int)), 0)


@dataclass(frozen=True)
class Costs:
    """The blocks of a model's vision tower and of its language model; None for what it has not."""

    tower: Blocks | None
    decoder: Blocks | None


@dataclass(frozen=True)
class Counts:
    """Tokens that each block gets: patches in the tower (a class token included), and all tokens in the decoder.

    A block of the tower cuts after its attention: `merged` are those that are left then. `cached` are those that each
    layer's cache holds when generation begins.
    """

    tower: tuple[float, ...]
    merged: tuple[float, ...]
    decoder: tuple[float, ...]
    cached: tuple[float, ...]

    def flops(self, costs: Costs) -> float:
        """FLOPs of the prefill."""
        tower = costs.tower.flops(self.tower, self.merged) if costs.tower and self.tower else 0.0
        return tower + (costs.decoder.flops(self.decoder) if costs.decoder and self.decoder else 0.0)


Cut = tuple[str, int, float]
"""Where ("block", "layer" or "decode"; the input is layer 0), its number, and the share of visual tokens left then."""


def counts(shape: Shape, cuts: Sequence[Cut], *, visual: float, text: float = 0, patches: float = 0) -> Counts:
    """Tokens of each block after cuts.

    Args:
        shape: of the model.
        cuts: in any order; a cut in the tower that the language model sees as well stands here twice.
        visual: visual tokens that the language model would get.
        text: its other tokens.
        patches: what the tower gets, class tokens included.
    """

    def left(kind: str, index: int) -> float:
        return min((share for k, at, share in cuts if k == kind and at <= index), default=1.0)

    merged = tuple(patches * left("block", n) for n in range(shape.blocks)) if patches else ()
    layers = tuple(text + visual * left("layer", n) for n in range(shape.layers))
    return Counts(
        (patches, *merged)[: len(merged)],
        merged,
        layers,
        tuple(min(n, text + visual * left("decode", shape.layers)) for n in layers),
    )


def cuts_of(policy: "TokenPolicy") -> tuple[list[Cut], bool]:
    """The cuts that a policy's shares say, and whether it decides more by what it sees (or has yet to learn it)."""
    shown = policy.shape.layers and not any(getattr(m, "expand", False) for m in policy.methods.values())
    cuts: list[Cut] = []
    stages = policy.stages()
    for number, stage in stages:
        if stage.keep is None:
            continue
        kind = {"input": "layer"}.get(stage.at.kind, stage.at.kind)
        cuts.append((kind, number, stage.keep))
        if kind == "block" and shown:
            cuts.append(("layer", 0, stage.keep))
    learns = any(m.needs_calibration and name not in policy.learned for name, m in policy.methods.items())
    return cuts, learns or any(stage.keep is None for _, stage in stages)


@dataclass(frozen=True)
class Outlook:
    """What a token policy leaves of an image, and of the work and the cache, before anything was run.

    Attributes:
        what: "visual tokens"; "patches" of a model that is only a tower; "tokens of text" of a text policy.
        visual: how many of those there are.
        known: the model has that many whatever the picture; else it is an assumption.
        kept: how many are left at the end.
        text: tokens of text in the prompt.
        flops, flops_before: of the prefill, vision tower included.
        kv_ratio: what the caches hold after it, as a share of what they would.
        bounded: a stage decides by what it sees, and `kept` and `flops` are upper bounds.
    """

    what: str
    visual: int
    known: bool
    kept: int
    text: int
    flops: float
    flops_before: float
    kv_ratio: float
    bounded: bool

    @property
    def flops_ratio(self) -> float:
        """FLOPs with the policy, as a share of those without."""
        return self.flops / self.flops_before if self.flops_before else 1.0

    def to_json(self) -> dict[str, Any]:
        """The outlook, with its ratio."""
        return {**vars(self), "flops_ratio": self.flops_ratio}


def outlook(policy: "TokenPolicy", costs: Costs, *, text: int = TEXT) -> Outlook:
    """Plan a policy for one image, or for a text policy for a prompt of VISUAL tokens."""
    shape = policy.shape
    cuts, bounded = cuts_of(policy)
    visual = VISUAL if policy.over_text else shape.tokens or VISUAL
    patches = visual + int(shape.has_cls) if shape.blocks else 0
    text = 0 if shape.layers == 0 or policy.over_text else text
    after = counts(shape, cuts, visual=visual, text=text, patches=patches)
    before = counts(shape, (), visual=visual, text=text, patches=patches)
    final = min((share for kind, _, share in cuts if kind != "block" or shape.layers == 0), default=1.0)
    return Outlook(
        what="tokens of text" if policy.over_text else "visual tokens" if shape.layers else "patches",
        visual=visual,
        known=bool(shape.tokens) and not policy.over_text,
        kept=max(1, int(visual * final + 0.5)),
        text=text,
        flops=after.flops(costs),
        flops_before=before.flops(costs),
        kv_ratio=sum(after.cached) / sum(before.cached) if before.cached else 1.0,
        bounded=bounded,
    )


def costs_of(model: Any) -> Costs:
    """The costs of a model that token policies know; its weights may be on the device "meta"."""
    from tcw.tokens.shape import TEXT as TEXT_MODEL
    from tcw.tokens.shape import TOWER, kind_of, text_model_of, tower_of

    kind = kind_of(model)
    return Costs(
        None if kind == TEXT_MODEL else Blocks.of(tower_of(model)),
        None if kind == TOWER else Blocks.of(text_model_of(model)),
    )
