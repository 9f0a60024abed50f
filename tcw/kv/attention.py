"""The attention function that transformers calls, and the mask that goes with it.

A policy's layer hands out the keys of a call with a mark on them (`mark`); attention that gets marked keys asks that
layer to compute it over what it holds. All other attention (sliding layers, vision towers, no cache) is what it was
before. A mask is the one transformers would build over every token seen; a layer takes from it the columns that it
still has.
"""

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

if TYPE_CHECKING:
    from tcw.kv.layer import PolicyLayer

_log = logging.getLogger("tcw")
SDPA, EAGER = "tcw", "tcw_eager"
_MARK = "_tcw_layer"
Attention = Callable[..., tuple[Tensor, Tensor | None]]


def mark(keys: Tensor, layer: "PolicyLayer") -> Tensor:
    """Let `attend` know to which layer of a cache these keys belong."""
    setattr(keys, _MARK, layer)
    return keys


def eager_of(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The attention that the model's own file calls eager: it knows of soft caps and learned sinks."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _over(base: Attention) -> Attention:
    """The attention function over `base`, which computes what is to be computed."""

    def attend(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer: PolicyLayer | None = getattr(key, _MARK, None)
        if layer is None:
            return base(module, query, key, value, attention_mask, **kwargs)
        return layer.attend(base, module, query, attention_mask, **kwargs), None

    return attend


AttentionInterface.register(SDPA, _over(sdpa_attention_forward))
AttentionMaskInterface.register(SDPA, sdpa_mask)  # without it transformers would make no mask, not even for padding
AttentionInterface.register(EAGER, _over(eager_of))
AttentionMaskInterface.register(EAGER, eager_mask)


def decoder_of(model: Any) -> Any:
    """The part of a model that has the text decoder's configuration: the model itself, if it is nothing else."""
    text = model.config.get_text_config(decoder=True)
    found = (m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is text)
    return next(found, model)


def body_of(model: Any) -> Any:
    """The text decoder without its head: for passes whose logits nobody reads."""
    decoder = decoder_of(model)
    return getattr(decoder, decoder.base_model_prefix, decoder)


def install(model: Any) -> None:
    """Have a model's text decoder call our attention. Changes nothing for other caches."""
    decoder = decoder_of(model)
    before = decoder.config._attn_implementation
    if before in (SDPA, EAGER):
        return
    if before not in ("sdpa", "eager"):
        _log.info("attention `%s` becomes `sdpa` under a KV policy", before)
    decoder.set_attn_implementation(EAGER if before == "eager" else SDPA)
