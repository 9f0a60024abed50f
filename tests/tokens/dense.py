"""The slow, obvious reference: the whole sequence in every layer, with the tokens that are not left masked."""

from typing import Any

import torch
from torch import Tensor

from tcw.tokens.shape import text_model_of
from tcw.tokens.watch import blocks_of


def masked_logits(model: Any, inputs: dict[str, Any], left: dict[int, list[Tensor]]) -> Tensor:
    """Logits [B, S, V] of a model that does not see, from each layer in `left` on, the columns that are not there.

    `left`: layer -> columns for each row, as `Attached.left`. Only logits of tokens that are left mean anything.
    """
    text_model = text_model_of(model)
    layers = blocks_of(text_model)
    length = inputs["attention_mask"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()

    def hook(number: int) -> Any:
        start = max(layer for layer in left if layer <= number)

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            seen = torch.zeros(len(left[start]), length, dtype=torch.bool)
            for row, columns in enumerate(left[start]):
                seen[row, columns] = True
            mask = (causal[None] & seen[:, None, :]) | torch.eye(length, dtype=torch.bool)[None]
            bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            return args, {**kwargs, "attention_mask": bias[:, None]}

        return before

    handles = [layers[n].register_forward_pre_hook(hook(n), with_kwargs=True) for n in range(len(layers))]
    try:
        with torch.no_grad():
            return model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()
