"""Gates: whether a model under a token policy computes what it should, whatever the policy costs.

    everything   keeping and merging nothing but what there is, the same engine gives the model's own bits
    dropped      what was dropped has no influence, and all else has what it should: outputs are those of the whole
                 sequence under a mask that hides, from each layer on, the tokens that were dropped before it
    cached       tokens generated one by one on the shortened caches are what one call over all of them gives
    batch        pictures (or texts) of different sizes in one left-padded batch come out as each by itself
    sizes        of merged tokens none is lost and none counts twice

`dropped` is run with the policy's selection and its merges turned off: no mask says what a merged token holds. `cached`
runs with the very plans of the generation, merges included. Errors are max|a - b| / max|b| over outputs.

Where two tokens score alike, the arithmetic of a batch may decide otherwise than that of a single sample: `batch`
allows a small part of what the policy itself changes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tcw.kv.attention import eager_of
from tcw.tokens import COMPACT, Stage
from tcw.tokens.context import Context
from tcw.tokens.engine import TokenPolicy
from tcw.tokens.plan import Plan
from tcw.tokens.shape import TOWER, kind_of, text_model_of, tower_of
from tcw.tokens.trace import Trace
from tcw.tokens.watch import attention_of, blocks_of
from tcw.verify.compare import same_bits
from tcw.verify.kv_gates import BOUNDS, CLOSE_SCORES, Gate
from tcw.verify.token_damage import generated
from tcw.verify.token_inputs import Inputs

STEPS = 6  # tokens that `cached` generates
LAST = 4  # rows of logits that `batch` compares, the last ones
_HIDDEN = "_tcw_hidden"
_MASKED = "tcw_verify_"

Change = Callable[[Stage, tuple[int, int]], Stage | None]
"""A stage, and what tells it from all others of the policy -> what stands in its place; None: nothing."""


class Rerouted:
    """A method whose stages are changed; all else it is asked is the method's own."""

    def __init__(self, base: Any, change: Change, **own: Any) -> None:
        self._base, self._change = base, change
        vars(self).update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def stages(self, shape: Any, learned: Any) -> tuple[Stage, ...]:
        """The method's stages, changed; those that become None are left out."""
        stages = self._base.stages(shape, learned)
        found = (self._change(stage, (id(self._base), n)) for n, stage in enumerate(stages))
        return tuple(stage for stage in found if stage is not None)


def rerouted(policy: TokenPolicy, change: Change, **own: Any) -> TokenPolicy:
    """A policy with changed stages."""
    return replace(policy, methods={name: Rerouted(m, change, **own) for name, m in policy.methods.items()})


def check_gates(model: Any, policy: TokenPolicy, inputs: Inputs) -> list[Gate]:
    """Check a policy on a model in eval mode, which works under no policy when it comes and when it goes."""
    tower = kind_of(model) == TOWER
    one = inputs.batch([0])
    with torch.inference_mode():
        gates = [_everything(model, policy, one), _dropped(model, policy, one)]
        if not tower:
            gates.append(_cached(model, policy, one))
        gates.append(_batch(model, policy, inputs))
        return [*gates, _sizes(model, policy, inputs)]


def output(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, or a tower's last hidden state, [B, S, ...] in float32."""
    more = {} if kind_of(model) == TOWER else {"use_cache": False}
    found = model(**inputs, **more)
    return (found.last_hidden_state if "logits" not in found else found.logits).float()


@dataclass(frozen=True)
class Seen:
    """What became of the tokens of one call (tcw/tokens/engine.py)."""

    traces: list[Trace]
    left: dict[int, list[Tensor]]


def under(model: Any, policy: TokenPolicy, inputs: dict[str, Tensor]) -> tuple[Tensor, Seen]:
    """The output under a policy, and what became of the tokens."""
    with policy.attach(model) as attached:
        return output(model, inputs), Seen(list(attached.traces), dict(attached.left))


def _everything(model: Any, policy: TokenPolicy, inputs: dict[str, Tensor]) -> Gate:
    whole = rerouted(policy, lambda stage, _: replace(stage, plan=_keep_all, keep=None, allocate=None))
    wanted, (found, _) = output(model, inputs), under(model, whole, inputs)
    if found.shape != wanted.shape:
        return Gate("everything", False, float("inf"), 0.0, f"{found.shape[1]} tokens instead of {wanted.shape[1]}")
    note = "nothing dropped or merged: bit for bit"
    return Gate("everything", same_bits(found, wanted), _error(found, wanted), 0.0, note)


def _keep_all(context: Context, k: int | None) -> Plan:
    return Plan.everything(context.size)


def selecting(stage: Stage, _: tuple[int, int]) -> Stage:
    """A stage that drops what it would merge."""

    def plan(context: Context, k: int | None) -> Plan:
        return Plan.dropping(stage.plan(context, k).keep, context.size)

    return replace(stage, plan=plan)


def _dropped(model: Any, policy: TokenPolicy, inputs: dict[str, Tensor]) -> Gate:
    if policy.positions == COMPACT:
        return Gate("dropped", None, note="gaps are closed: no mask over the whole sequence has those positions")
    found, seen = under(model, rerouted(policy, selecting), inputs)
    if kind_of(model) == TOWER:
        stack, left = tower_of(model), _left_in_tower(policy, seen)
        wanted = _hidden_from(model, stack, left, lambda: output(model, inputs))
        first = int(policy.shape.has_cls)
        rows = torch.cat([torch.arange(first), seen.traces[0].plan.keep + first])  # type: ignore[union-attr]
        wanted = wanted[:, rows]
    else:
        stack, left = text_model_of(model), {n: rows[0] for n, rows in seen.left.items()}
        wanted = _hidden_from(model, stack, left, lambda: _whole_text(model, policy, inputs))
        wanted = wanted[:, left[max(left)]]
    cut = sum(len(t.place) - t.plan.kept for t in seen.traces if t.plan is not None)
    if not cut:
        return Gate("dropped", None, note="the policy drops nothing here")
    return _judged("dropped", found, wanted, BOUNDS[model.dtype], f"{cut} tokens, against a mask over all of them")


def _whole_text(model: Any, policy: TokenPolicy, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of all tokens; what the policy does inside the tower it does, but the language model sees every token."""
    if not any(stage.at.kind == "block" for _, stage in policy.stages()):
        return output(model, inputs)
    inside = rerouted(policy, lambda stage, n: selecting(stage, n) if stage.at.kind == "block" else None, expand=True)
    return under(model, inside, inputs)[0]


def _left_in_tower(policy: TokenPolicy, seen: Seen) -> dict[int, Tensor]:
    """Tokens that the attention of a plain tower's blocks sees of a picture, by the first block that sees just those.

    A block cuts after its attention.
    """
    first = int(policy.shape.has_cls)
    (trace,) = seen.traces
    left = {0: torch.arange(first + trace.original)}
    for name, plan in trace.cuts:
        left[int(name.rpartition(" ")[2]) + 1] = torch.cat([torch.arange(first), plan.keep.cpu() + first])
    return left


def _hidden_from(model: Any, stack: nn.Module, left: dict[int, Tensor], run: Callable[[], Tensor]) -> Tensor:
    """What `run` gives when block n and those after it see only the tokens `left[n]`."""
    with _masked(stack, left):
        return run()


@contextmanager
def _masked(stack: Any, left: dict[int, Tensor]) -> Iterator[None]:
    """Hide from the attention of each block all tokens but those that are left there."""
    before = stack.config._attn_implementation
    # in some releases of transformers a module inside a block's attention does the work
    parts = [(n, part) for n, block in enumerate(blocks_of(stack)) for part in attention_of(block).modules()]
    for number, part in parts:
        setattr(part, _HIDDEN, left[max(n for n in left if n <= number)])
    stack.config._attn_implementation = _masking(before)
    try:
        yield
    finally:
        stack.config._attn_implementation = before
        for _, part in parts:
            delattr(part, _HIDDEN)


def _masking(before: str) -> str:
    """The name of the attention function that hides tokens and then does what `before` does."""
    name = _MASKED + before
    base: Callable[..., Any] = eager_of if before == "eager" else ALL_ATTENTION_FUNCTIONS[before]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        left = getattr(module, _HIDDEN, None)
        if left is not None:
            mask = _hiding(module, query, key, mask, left, causal=kwargs.get("is_causal"))
        return base(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    return name


def _hiding(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, left: Tensor, causal: bool | None
) -> Tensor:
    """The mask that a layer got (none: causal or all), with the keys hidden that are not left: [1, 1, q, k]."""
    queries, keys = query.shape[2], key.shape[2]
    least = torch.finfo(query.dtype).min
    out = query.new_zeros(1, 1, queries, keys)
    if mask is None and (getattr(module, "is_causal", False) if causal is None else causal):
        out = out.masked_fill(torch.ones(queries, keys, dtype=torch.bool, device=key.device).triu(1), least)
    elif mask is not None:
        out = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, least) if mask.dtype == torch.bool else mask
    hidden = torch.ones(keys, dtype=torch.bool, device=key.device)
    hidden[left.to(key.device)] = False
    return out.masked_fill(hidden, least)


def _cached(model: Any, policy: TokenPolicy, inputs: dict[str, Tensor]) -> Gate:
    tape = Tape(text=policy.over_text)
    with rerouted(policy, tape.recording).attach(model):
        tokens, wanted = generated(model, inputs, STEPS)
    longer = extended(inputs, tokens[:-1])
    found, _ = under(model, rerouted(policy, tape.replaying), longer)
    note = f"{STEPS} tokens, against one call with the same plans"
    if any(stage.at.kind == "decode" for _, stage in policy.stages()):
        note += "; tokens stay in the caches of the layers that had them"
    return _judged("cached", found[0, -STEPS:], wanted, BOUNDS[model.dtype], note)


class Tape:
    """The plans of one run, for another one of the same inputs; stages after prefill are left out."""

    def __init__(self, *, text: bool) -> None:
        self._text = text
        self._plans: dict[tuple[int, int], list[Plan]] = {}

    def recording(self, stage: Stage, key: tuple[int, int]) -> Stage | None:
        """The stage, its plans remembered in the order in which they were made."""
        if stage.at.kind == "decode":
            return None
        plans = self._plans.setdefault(key, [])

        def plan(context: Context, k: int | None) -> Plan:
            plans.append(stage.plan(context, k))
            return plans[-1]

        return replace(stage, plan=plan)

    def replaying(self, stage: Stage, key: tuple[int, int]) -> Stage | None:
        """The stage with the plans that were remembered; of a text policy, what has been written since stays."""
        if stage.at.kind == "decode":
            return None
        left = iter(self._plans[key])
        if self._text:
            return replace(stage, plan=lambda context, k: _longer(next(left, None), context), keep=None)
        return replace(stage, plan=lambda context, k: next(left))


def _longer(plan: Plan | None, context: Context) -> Plan:
    """A plan for a text that goes on."""
    if plan is None:
        return Plan.everything(context.size)
    more = torch.arange(len(plan.assign), context.tokens, device=plan.keep.device)
    return Plan.dropping(torch.cat([plan.keep, more]), context.size)


def extended(inputs: dict[str, Tensor], tokens: Sequence[int]) -> dict[str, Tensor]:
    """Inputs of one sample with text tokens after it."""
    ids = inputs["input_ids"]
    more = torch.tensor([list(tokens)], device=ids.device, dtype=ids.dtype)
    out = {**inputs, "input_ids": torch.cat([ids, more], 1)}
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in inputs:
            out[name] = torch.cat([inputs[name], torch.full_like(more, fill, dtype=inputs[name].dtype)], 1)
    return out


def _batch(model: Any, policy: TokenPolicy, inputs: Inputs) -> Gate:
    if inputs.count < 2:
        return Gate("batch", None, note="there is one sample only")
    if kind_of(model) == TOWER and any(stage.whole for _, stage in policy.stages()):
        return Gate("batch", None, note="the policy takes the pictures of a batch as the frames of one video")
    both, together = under(model, policy, inputs.batch([0, 1]))
    alone, dense = [], []
    for n in (0, 1):
        found, seen = under(model, policy, inputs.batch([n]))
        alone.append((found, seen.traces[0]))
        dense.append(output(model, inputs.batch([n])))
    same = [_same(a, b) for a, (_, b) in zip(together.traces, alone, strict=True)]
    if kind_of(model) == TOWER:
        pairs = [(both[n : n + 1, : found.shape[1]], found) for n, (found, _) in enumerate(alone)]
    else:
        pairs = [(both[n : n + 1, -LAST:], found[:, -LAST:]) for n, (found, _) in enumerate(alone)]
    error, tight = max(_error(a, b) for a, b in pairs), BOUNDS[model.dtype]
    if all(same) or kind_of(model) == TOWER:
        return Gate("batch", error <= tight, error, tight, "two samples, against each by itself: the same tokens")
    own = max(_error(found[:, -LAST:], d[:, -LAST:]) for (found, _), d in zip(alone, dense, strict=True))
    note = "two samples, against each by itself; a token or two that score alike were chosen otherwise"
    return Gate("batch", error <= CLOSE_SCORES * own, error, CLOSE_SCORES * own, note)


def _same(one: Trace, other: Trace) -> bool:
    """Whether the same tokens were kept, and stand for the same others."""
    if one.plan is None or other.plan is None:
        return one.plan is other.plan
    return torch.equal(one.plan.keep, other.plan.keep) and torch.equal(one.plan.assign, other.plan.assign)


def _sizes(model: Any, policy: TokenPolicy, inputs: Inputs) -> Gate:
    worst, merged = 0.0, False
    for n in range(inputs.count):
        for trace in under(model, policy, inputs.batch([n]))[1].traces:
            for _, plan in trace.cuts:
                merged |= plan.merges
                worst = max(worst, _unbalanced(plan))
    note = "each original token counts once, or is dropped" if merged else "every token counts as one"
    return Gate("sizes", worst <= 1e-3, worst, 1e-3, note)


def _unbalanced(plan: Plan) -> float:
    """By how much the sizes of kept tokens miss the number of tokens that went into them; of mixes, only too much."""
    into, total = float((plan.assign >= 0).sum()), float(plan.size.sum())
    if plan.mix is not None:
        rows = float((plan.mix.sum(1) - 1).abs().max())
        return max(rows, total - len(plan.assign), 0.0)
    return abs(total - into)


def _judged(name: str, found: Tensor, wanted: Tensor, bound: float, note: str) -> Gate:
    if found.shape != wanted.shape:
        return Gate(name, False, float("inf"), bound, f"{tuple(found.shape)} instead of {tuple(wanted.shape)}")
    error = _error(found, wanted)
    return Gate(name, error <= bound, error, bound, note)


def _error(found: Tensor, wanted: Tensor) -> float:
    """NaN if there is one, and then no bound holds."""
    return float((found - wanted).abs().max() / wanted.abs().max())
