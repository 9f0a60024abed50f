"""Gates: whether a cache under a policy computes what it should, whatever the policy costs.

    everything   forgetting and rounding nothing, the same engine gives the bits of transformers' own cache
    forgotten    what is forgotten has no influence, and all else has what it should: logits are those of a full cache
                 under a mask that hides, for each head, the tokens it forgot
    padding      texts of unequal length in one left-padded batch come out as each by itself
    reordering   exchanging the rows of a batch, as beam search does, exchanges what comes out

They run on the model itself with short texts. Errors are max|a - b| / max|b| over logits.

Padding is the one place with some slack. Where two tokens score alike, the smallest difference in the arithmetic
decides which is forgotten: a small part of what the policy itself changes is allowed. Formats round a padded text in
other blocks than the same text alone: there the batch must be hardly farther from a full cache than the texts alone.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcw.kv import KVMethod, LayerShape
from tcw.kv.policy import Policy
from tcw.verify.compare import same_bits, worst
from tcw.verify.kv_tasks import full_cache, prefill

PREFIX = 128  # tokens that are prefilled
CHUNKS = (16, 1, 1, 8)  # tokens of the calls after it
PADDING = 32  # by which the second text of a batch is shorter
BOUNDS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}  # 16 bits tell no more
CLOSE_SCORES = 0.1  # of what the policy changes
OTHER_BLOCKS = 1.5  # times what the policy changes

Kept = list[list[tuple[tuple[int, ...], Tensor]]]


@dataclass(frozen=True)
class Gate:
    """What came of one check: `ok` is None where it does not apply, and `note` says why, or what was done."""

    name: str
    ok: bool | None
    error: float | None = None
    bound: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """All but the name."""
        return {"ok": self.ok, "error": self.error, "bound": self.bound, "note": self.note}


def check_gates(model: Any, policy: Policy, tokens: Tensor) -> list[Gate]:
    """Check a policy on a model.

    Args:
        model: in eval mode.
        policy: made for it.
        tokens: int64 [2, n], two texts; n at least PREFIX + sum(CHUNKS).
    """
    tokens = tokens.to(model.device)
    short = tokens[:, : PREFIX + sum(CHUNKS)]
    with torch.inference_mode():
        return [
            _everything(model, policy, short[:1]),
            _forgotten(model, policy, tokens[:1]),
            _padding(model, policy, short),
            _reordering(model, policy, short),
        ]


def _everything(model: Any, policy: Policy, tokens: Tensor) -> Gate:
    wanted = _calls(model, full_cache(model), tokens)
    found = _calls(model, policy.everything().new_cache(model), tokens)
    same = all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))
    return Gate("everything", same, _error(found, wanted), 0.0, "nothing forgotten or rounded: bit for bit")


def _forgotten(model: Any, policy: Policy, tokens: Tensor) -> Gate:
    """Only with methods that hold what stays as it is: of the others a mask knows nothing."""
    methods = {name: method for name, method in policy.methods.items() if type(method).store is KVMethod.store}
    if any(method.reindexes for method in methods.values()):
        return Gate("forgotten", None, note="keys move to other positions, which no mask over a full cache can show")
    if not methods:
        return Gate("forgotten", None, note="no method leaves the tokens it holds as they are")
    exact = Policy(methods, policy.layers, policy.tensors)
    longest = tokens.shape[1] - sum(CHUNKS)
    length = next((n for n in (PREFIX, longest) if _forgets(model, exact, tokens[:, :n])), 0)
    if not length:
        return Gate("forgotten", None, note=f"of {longest} tokens none is forgotten")
    cache, dense = exact.new_cache(model, track=True), full_cache(model)
    found, wanted, reached = [], [], set()
    for at, ids in _chunks(tokens[:, : length + sum(CHUNKS)]):
        kept = cache.kept() if at else []
        found.append(_logits(model, cache, ids))
        with _masked(model, exact.layers, kept, at, ids.shape[1]) as layers:
            wanted.append(_logits(model, dense, ids))
        reached |= layers
    if reached != {layer.index for layer in exact.layers}:
        return Gate("forgotten", None, note="the model gives its attention no mask that could be replaced")
    return _judged("forgotten", found, wanted, BOUNDS[model.dtype], f"of {length} tokens, against a masked full cache")


def _forgets(model: Any, policy: Policy, tokens: Tensor) -> bool:
    cache = policy.new_cache(model, track=True)
    prefill(model, tokens[0], cache)
    return any(held.shape[-1] < tokens.shape[1] for groups in cache.kept() for _, held in groups)


def _padding(model: Any, policy: Policy, tokens: Tensor) -> Gate:
    if any(type(method).count is not KVMethod.count for method in policy.methods.values()):
        return Gate("padding", None, note="the policy decides for all sequences of a batch together")
    if any(getattr(method, "counts_padding", False) for method in policy.methods.values()):
        return Gate("padding", None, note="what the policy forgets depends on the padding, as its method says")
    mask = torch.ones_like(tokens)
    mask[1, :PADDING] = 0
    batch = _calls(model, policy.new_cache(model), tokens, mask)
    found, wanted, full = [], [], []
    for row, pad in enumerate((0, PADDING)):
        alone = _calls(model, policy.new_cache(model), tokens[row : row + 1, pad:])
        wanted += alone
        full += _calls(model, full_cache(model), tokens[row : row + 1, pad:])
        found += [b[row : row + 1, -a.shape[1] :] for a, b in zip(alone, batch, strict=True)]
    tight, own = BOUNDS[model.dtype], _error(wanted, full)
    if _error(found, wanted) > tight and any(type(m).store is not KVMethod.store for m in policy.methods.values()):
        return _judged(
            "padding", found, full, OTHER_BLOCKS * own, f"of a full cache; each text by itself is {own:.2g} off"
        )
    note = f"{PADDING} tokens of padding, against each text by itself"
    return _judged("padding", found, wanted, max(tight, CLOSE_SCORES * own), note)


def _reordering(model: Any, policy: Policy, tokens: Tensor) -> Gate:
    (_, prefix), *chunks = _chunks(tokens)
    cache, turned = policy.new_cache(model), policy.new_cache(model)
    for each in (cache, turned):
        _logits(model, each, prefix)
    turned.reorder_cache(torch.tensor([1, 0], device=tokens.device))
    wanted = [_logits(model, cache, ids) for _, ids in chunks]
    found = [_logits(model, turned, ids.flip(0)).flip(0) for _, ids in chunks]
    return _judged("reordering", found, wanted, BOUNDS[model.dtype], "two rows exchanged")


def _judged(name: str, found: list[Tensor], wanted: list[Tensor], bound: float, note: str) -> Gate:
    error = _error(found, wanted)
    return Gate(name, error <= bound, error, bound, note)


def _error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest of the calls' errors; NaN if there is one, and then no bound holds."""
    return worst([float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)])


def _chunks(tokens: Tensor) -> list[tuple[int, Tensor]]:
    """What each call gets, and how many tokens were before it: CHUNKS at the end, all else in the first call."""
    sizes = (tokens.shape[1] - sum(CHUNKS), *CHUNKS)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(start, tokens[:, start : start + size]) for start, size in zip(starts, sizes, strict=True)]


def _calls(model: Any, cache: Any, tokens: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    return [
        _logits(model, cache, ids, None if mask is None else mask[:, : at + ids.shape[1]])
        for at, ids in _chunks(tokens)
    ]


def _logits(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits [B, q, vocabulary] of one call; with a mask, positions count real tokens, as `generate` has it."""
    more = {}
    if mask is not None:
        more["attention_mask"] = mask
        if "position_ids" in inspect.signature(model.forward).parameters:
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(input_ids=ids, past_key_values=cache, use_cache=True, **more).logits.float()


@contextmanager
def _masked(model: Any, layers: tuple[LayerShape, ...], kept: Kept, past: int, new: int) -> Iterator[set[int]]:
    """Hide from each head all tokens before `past` but those in `kept`; yields the layers whose mask was replaced.

    With nothing in `kept`, nothing is changed.
    """
    reached: set[int] = set()
    handles = []
    for shape, groups in zip(layers, kept, strict=False):
        mask = _mask(shape, groups, past, new, model.dtype, model.device)

        def replace(module: Any, args: Any, kwargs: Any, mask: Tensor = mask, index: int = shape.index) -> Any:
            if "attention_mask" not in kwargs:
                return None
            reached.add(index)
            return args, {**kwargs, "attention_mask": mask}

        here = [m for m in model.modules() if getattr(m, "layer_idx", None) == shape.index]
        handles += [m.register_forward_pre_hook(replace, with_kwargs=True) for m in here]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


def _mask(
    shape: LayerShape,
    groups: list[tuple[tuple[int, ...], Tensor]],
    past: int,
    new: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """What a layer's heads see, added to their logits: [1, H, new, past + new]."""
    visible = torch.zeros(shape.kv_heads, new, past + new, dtype=torch.bool, device=device)
    visible[:, :, past:] = torch.ones(new, new, dtype=torch.bool, device=device).tril()
    for heads, positions in groups:
        rows = positions[0].long().expand(len(heads), -1)
        for head, held in zip(heads, rows, strict=True):
            visible[head, :, held] = True
    hidden = ~visible.repeat_interleave(shape.heads // shape.kv_heads, 0)[None]
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, torch.finfo(dtype).min)
