"""Run a model over inputs: its outputs, one at a time, and its greedy tokens."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tcw.artifact import Artifact
from tcw.device import Device, pick
from tcw.errors import SourceError, TcwError
from tcw.source import Source
from tcw.verify.inputs import Feed
from tcw.verify.kv_tasks import full_cache

_COMFORT = 0.8  # of a GPU's free memory


def residency_of(source: Source, place: Device) -> str:
    """How to load a model for comparison: "packed" where its layers are to quantise their inputs as well, else decoded.

    What FP8 does to inputs is part of what an artifact says; everything else is judged by its decoded weights: "bf16",
    or where that does not fit "huffman", which multiplies with the same bits.
    """
    entries = source.entries.values() if isinstance(source, Artifact) else ()
    if any(e.params.get("activation") in ("dynamic", "static") for e in entries):
        return "packed"
    if place.kind != "cuda" or source.quantized_by:
        return "auto"
    plain = sum(info.nbytes for info in source.tensors().values())
    return "bf16" if plain < _COMFORT * place.free_bytes else "huffman"


@contextmanager
def loaded(source: Source, device: str, residency: str | None = None) -> Iterator[Any]:
    """Load a model for comparison, and free its memory when done.

    On a CPU it computes in float32 when that fits in half of the free memory, so that a small difference in a weight
    is not rounded away on the way to the output. Both models are loaded in the same way: their bits can be compared.
    Where a `residency` is given it is that which is judged: the model computes in its own dtype.
    A stored token policy is taken off: the suite `tokens` judges it.
    """
    from tcw.runtime.load import load

    place = pick(device)
    single = sum(4 * info.numel for info in source.tensors().values())
    wide = residency is None and place.kind == "cpu" and single < place.free_bytes // 2
    dtype = torch.float32 if wide else None
    model = load(source, residency=residency or residency_of(source, place), device=device, dtype=dtype)
    model.eval()
    if (attached := getattr(model, "token_attached", None)) is not None:
        attached.detach()
    try:
        yield model
    finally:
        del model
        gc.collect()
        if place.kind == "cuda":
            torch.cuda.empty_cache()


def output(model: Any, feed: Feed) -> tuple[torch.Tensor, bool]:
    """The model's main output for one input, on the CPU without the batch axis, and whether it is logits."""
    with torch.inference_mode():
        result = model(**_placed(model, feed))
    for name in ("logits", "last_hidden_state", "logits_per_image"):
        if isinstance(result.get(name), torch.Tensor):
            return result[name][0].cpu(), name == "logits"
    tensors = [v for v in result.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    if not tensors:
        raise SourceError(f"`{type(model).__name__}` gives no output that could be compared", "`--tensors-only`")
    return tensors[0].cpu(), False


def greedy(model: Any, feed: Feed, count: int) -> list[int]:
    """The `count` most likely next tokens, one after another; an end-of-text token is passed over."""
    inputs: dict[str, Any] = {**_placed(model, feed)}
    inputs.pop("decoder_input_ids", None)
    ids = inputs.pop("input_ids")
    if getattr(model, "kv_policy", None) is not None:
        inputs["past_key_values"] = full_cache(model)  # the weights are judged here; the suite `kv` judges the policy
    pad = model.generation_config.pad_token_id
    with torch.inference_mode():
        tokens = model.generate(
            ids, **inputs, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, pad_token_id=pad or 0,
        )  # fmt: skip
    return tokens[0, -count:].tolist()


def tokenizer_of(source: Source) -> Any | None:
    """A model's tokenizer, or None when it has none that can be used: a vision model, or a folder of bare weights."""
    from tcw.runtime.load import tokenizer

    try:
        return tokenizer(source)
    except (TcwError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _placed(model: Any, feed: Feed) -> dict[str, torch.Tensor]:
    """The inputs on the model's device, noise in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in feed.inputs.items()
    }
