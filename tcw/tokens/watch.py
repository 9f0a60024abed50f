"""Queries and keys of attention layers, for methods that ask what a token attends to.

No attention map is ever asked of a model: a few rows are computed from queries and keys (tcw/tokens/context.py), so
SDPA and FlashAttention stay on. transformers hands every layer's queries and keys to a registered attention function,
after RoPE and whatever else the architecture does to them; ours passes them on to the function that was there before,
and lets who asked look at them.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tcw.errors import UsageError
from tcw.kv.attention import eager_of

_PREFIX = "tcw_watch_"
_PROBE = "tcw_probe"
_CALLS = "_tcw_calls"
_NAMES = ("self_attn", "attention", "attn")
Call = tuple[Tensor, Tensor, float]  # queries and keys [B, H, S, head_dim], heads of keys repeated; scaling


def blocks_of(tower: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a tower or decoder. Raises UsageError where there are none."""
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(_attention(child) is not None for child in module):
            return module
    raise UsageError(f"`{type(tower).__name__}` has no transformer blocks", "token policies need a transformer")


def attention_of(block: nn.Module) -> nn.Module:
    """The self-attention of a block."""
    found = _attention(block)
    assert found is not None, "blocks_of has looked"
    return found


def _attention(block: nn.Module) -> nn.Module | None:
    return next((found for name in _NAMES if isinstance(found := getattr(block, name, None), nn.Module)), None)


class Recording:
    """What the attention of some layers of a tower is called with, from now until `detach`.

    `calls[n]` lists the calls of layer n since `clear`: one for each forward pass, or, in a tower that divides its
    tokens by itself (Qwen-VL), one for each image or window.
    """

    def __init__(self, tower: PreTrainedModel, layers: Iterable[int]) -> None:
        """Watch the layers of `tower` with these numbers. Its attention function becomes ours, over the old one."""
        blocks = blocks_of(tower)
        self.calls: dict[int, list[Call]] = {n: [] for n in layers}
        self._modules = {n: attention_of(blocks[n]) for n in self.calls}
        for n, part in self._parts():
            setattr(part, _CALLS, self.calls[n])
        self._tower, self._before = tower, tower.config._attn_implementation
        if self.calls and not self._before.startswith(_PREFIX):
            tower.config._attn_implementation = _watching(self._before)

    def _parts(self) -> Iterator[tuple[int, nn.Module]]:
        """Layers' attention and what is in it: in some releases an inner module does the work."""
        return ((n, part) for n, module in self._modules.items() for part in module.modules())

    def clear(self) -> None:
        """Forget what was recorded."""
        for calls in self.calls.values():
            calls.clear()

    def detach(self) -> None:
        """Stop watching; the model is as it was."""
        self.clear()
        for _, part in self._parts():
            delattr(part, _CALLS)
        self._tower.config._attn_implementation = self._before


def queries_keys(block: nn.Module, hidden: Tensor, position_embeddings: Any) -> Call:
    """What the attention of a decoder layer would be called with for the layer's input `hidden` [B, S, D].

    Nothing is written to a cache, and attention itself is not computed.
    """
    config = attention_of(block).config
    before = config._attn_implementation
    config._attn_implementation = _PROBE
    try:  # the layer itself knows what it does to its input first, and how its attention is called
        block(hidden, position_embeddings=position_embeddings, attention_mask=None, past_key_values=None)
    except _Enough as enough:
        return enough.call
    except (TypeError, AttributeError):
        pass  # it wants other arguments
    finally:
        config._attn_implementation = before
    raise UsageError(
        f"`{type(block).__name__}` does not call its attention as transformers' models do",
        "use a policy that needs no attention of the language model, such as `divprune`",
    )


class _Enough(Exception):
    """Queries and keys are known: attention need not be computed."""

    def __init__(self, call: Call) -> None:
        self.call = call


def _call(module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> Call:
    scaling = kwargs.get("scaling")
    groups = query.shape[1] // key.shape[1]
    keys = key.repeat_interleave(groups, 1) if groups > 1 else key
    return query.detach(), keys.detach(), float(query.shape[-1] ** -0.5 if scaling is None else scaling)


def _probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    raise _Enough(_call(module, query, key, kwargs))


def _watching(before: str) -> str:
    """The name of the attention function that records and then does what `before` does; registered when first asked."""
    name = _PREFIX + before
    base: Callable[..., Any] = eager_of if before == "eager" else ALL_ATTENTION_FUNCTIONS[before]

    def attend(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls = getattr(module, _CALLS, None)
        if calls is not None:
            calls.append(_call(module, query, key, kwargs))
        return base(module, query, key, *args, **kwargs)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    return name


AttentionInterface.register(_PROBE, _probe)
