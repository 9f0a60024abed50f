"""What a cache must be for tokens to be cut, and taking tokens out of one."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from tcw.errors import UsageError
from tcw.tokens.positions import gathered


def refuse_cache(cache: Any, expected: int) -> None:
    """Raise UsageError for a cache that cannot hold different numbers of tokens in its layers, or was cut back.

    `expected`: how many tokens its first layer must hold.
    """
    if cache is None:
        return
    if getattr(cache, "is_compileable", False):
        raise UsageError(
            f"a token policy cannot cut tokens in a `{type(cache).__name__}`, whose size is fixed",
            "leave `cache_implementation` out, or use a `DynamicCache`",
        )
    if cache.get_seq_length() != expected:
        raise UsageError(
            "the cache was cut back after a token policy had cut tokens", "generate without an assistant model"
        )


def refuse_windows(text_model: nn.Module, layers: Iterable[int]) -> None:
    """Raise UsageError where tokens would be cut at layers of a model with sliding windows: theirs count all tokens."""
    kinds = set(getattr(text_model.config, "layer_types", None) or ())
    if list(layers) and kinds - {"full_attention"}:
        raise UsageError(
            f"`{type(text_model).__name__}` has layers without full attention: no tokens can be cut at its layers",
            "use a policy that cuts at the input, such as `divprune` or `visionzip`",
        )


def keep_only(cache: Any, layer: int, index: Tensor) -> None:
    """Leave the tokens `index` (int64 [B, n], -1: padding) in one layer of a cache. Raises UsageError."""
    if type(cache) is not DynamicCache:
        raise UsageError(
            f"tokens cannot be taken out of a `{type(cache).__name__}`",
            "leave out the KV policy, or use a `DynamicCache`",
        )
    held = cache.layers[layer]
    held.keys = gathered(held.keys.transpose(1, 2), index).transpose(1, 2)
    held.values = gathered(held.values.transpose(1, 2), index).transpose(1, 2)
