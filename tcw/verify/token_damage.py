"""What a token policy changes, beside what choosing at random and an even grid change at the same work.

    answers   the model's own greedy answer without a policy is given to it token by token under the policy: KL of the
              logits, top-1 agreement, and the answer's negative log-likelihood
    patches   a plain tower's vectors, one for every original patch, against those without a policy: cosine

"The same work" are equal FLOPs of the prefill (tcw/tokens/flops.py): the controls cut at the language model's input, or
for a tower at a quarter of its depth, as much as makes them equal. For a text policy the control is truncation: the end
of the text, as many tokens as the policy leaves at its last cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tcw.tokens.engine import TokenPolicy
from tcw.tokens.flops import Costs, Cut, counts
from tcw.tokens.shape import TOWER, kind_of, tower_of
from tcw.tokens.trace import Trace
from tcw.tokens.watch import blocks_of
from tcw.verify.kv_tasks import full_cache
from tcw.verify.token_inputs import Inputs

ANSWER = 16  # tokens of an answer
RANDOM, GRID, TRUNCATE = "random", "grid", "truncate"
_ROUNDS = 24  # of halving, to find a control's share


@dataclass
class Damage:
    """What one way of cutting comes to, a value for each sample; empty where it has no meaning.

    `kept` and `flops`, `kv`: shares of the visual tokens, of the prefill's FLOPs and of the caches.
    """

    kept: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    kv: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    visual: list[int] = field(default_factory=list)

    def add(self, other: "Damage") -> None:
        """Take in another sample."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values)

    def mean(self, name: str) -> float | None:
        """The mean over samples; None where nothing was measured."""
        values = getattr(self, name)
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Work:
    """How many tokens go where in one sample without a policy: crops, patches of each, visual and other tokens."""

    crops: int
    patches: int
    visual: int
    text: int

    def flops(self, policy: TokenPolicy, costs: Costs, cuts: Sequence[Cut]) -> float:
        """FLOPs of the prefill under cuts; [] for none."""
        found = counts(policy.shape, cuts, visual=self.visual, text=self.text, patches=self.patches)
        tower = costs.tower.flops(found.tower, found.merged) if costs.tower and found.tower else 0.0
        return self.crops * tower + (costs.decoder.flops(found.decoder) if costs.decoder else 0.0)

    def cached(self, policy: TokenPolicy, cuts: Sequence[Cut]) -> float:
        """Tokens that the caches of all layers hold."""
        return sum(counts(policy.shape, cuts, visual=self.visual, text=self.text).cached)


class _Force(LogitsProcessor):  # type: ignore[misc]
    """Makes `generate` say given tokens."""

    def __init__(self, tokens: Sequence[int], start: int) -> None:
        self._tokens, self._start = tokens, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -float("inf"))
        forced[:, self._tokens[input_ids.shape[1] - self._start]] = 0.0
        return forced


def generated(
    model: Any, inputs: dict[str, Tensor], count: int, answer: Sequence[int] | None = None
) -> tuple[list[int], Tensor]:
    """Tokens after a prompt, greedy or those of `answer`, and the logits that each was drawn from, float32 [count, V].

    Through `generate`, as a user would; under a full cache, and an end-of-text token is passed over.
    """
    count = len(answer) if answer is not None else count
    length = inputs["input_ids"].shape[1]
    forced = LogitsProcessorList([_Force(answer, length)] if answer is not None else [])
    made = model.generate(
        **inputs, past_key_values=full_cache(model), max_new_tokens=count, min_new_tokens=count, do_sample=False,
        num_beams=1, temperature=None, top_p=None, top_k=None, pad_token_id=model.generation_config.pad_token_id or 0,
        logits_processor=forced, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return made.sequences[0, -count:].tolist(), torch.stack([step[0].float() for step in made.logits])


def answered(wanted: Tensor, found: Tensor, answer: Sequence[int]) -> Damage:
    """Compare two models' logits [count, V] along an answer."""
    p, q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    targets = torch.tensor(answer, device=q.device)[:, None]
    return Damage(
        kl=[float((p.exp() * (p - q)).sum(-1).mean())],
        top1=[float((p.argmax(-1) == q.argmax(-1)).double().mean())],
        nll=[float(-q.gather(1, targets).mean())],
    )


def dense_work(model: Any, inputs: dict[str, Tensor], policy: TokenPolicy, visual: int) -> Work:
    """Count what one sample takes, by looking at what goes into the tower's first block."""
    if policy.over_text:
        return Work(0, 0, visual, inputs["input_ids"].shape[1] - visual)
    shapes: list[torch.Size] = []
    handle = blocks_of(tower_of(model))[0].register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append((args[0] if args else kwargs["hidden_states"]).shape),
        with_kwargs=True,
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    crops, patches = (shapes[0][0], shapes[0][1]) if len(shapes[0]) == 3 else (1, shapes[0][0])
    text = inputs["input_ids"].shape[1] - visual if "input_ids" in inputs else 0
    return Work(crops, patches, visual, text)


def shares(traces: Sequence[Trace], policy: TokenPolicy) -> list[Cut]:
    """The cuts of one sample, as they were, over all of its images."""
    total = sum(trace.original for trace in traces)
    cuts: list[Cut] = []
    for n, (name, _) in enumerate(traces[0].cuts if traces else ()):
        kept = sum(trace.cuts[n][1].kept for trace in traces)
        kind, _, number = name.partition(" ")
        kind = "layer" if kind in ("input", "tower") else kind
        cuts.append((kind, int(number or (policy.shape.layers if kind == "decode" else 0)), kept / total))
    if traces and any(name == "tower" for name, _ in traces[0].cuts):
        cuts += [("block", number, s.keep) for number, s in policy.stages() if s.at.kind == "block" and s.keep]
    return cuts


def damage(
    model: Any, policy: TokenPolicy, inputs: dict[str, Tensor], costs: Costs, dense: tuple[list[int], Tensor] | None
) -> tuple[Damage, Work]:
    """What a policy does to one sample. `dense`: the answer without a policy and its logits; None: a plain tower."""
    with policy.attach(model) as attached:
        if dense is None:
            hidden = model(**inputs).last_hidden_state
            read = attached.read_out(hidden)
        else:
            _, logits = generated(model, inputs, len(dense[0]), dense[0])
        traces = list(attached.traces)
    visual = sum(trace.original for trace in traces)
    work = dense_work(model, inputs, policy, visual)
    cuts = shares(traces, policy)
    if dense is None:
        whole = model(**inputs).last_hidden_state[:, int(policy.shape.has_cls) :]
        cosine = torch.nn.functional.cosine_similarity(read.double(), whole.double(), dim=-1)
        found = Damage(cosine=[float(cosine.mean())])
    else:
        found = answered(dense[1], logits, dense[0])
        found.kv = [work.cached(policy, cuts) / work.cached(policy, ())]
    kept = sum(trace.plan.kept if trace.plan is not None else trace.original for trace in traces)
    found.kept, found.visual = [kept / max(1, visual)], [visual]
    found.flops = [work.flops(policy, costs, cuts) / work.flops(policy, costs, ())]
    return found, work


def equal_share(policy: TokenPolicy, costs: Costs, work: Work, ratio: float) -> float:
    """The share of visual tokens that a cut at the input (of a tower: its quarter) must leave for this work."""
    kind, place = ("layer", 0) if policy.shape.layers else ("block", round(0.25 * policy.shape.blocks))
    whole, low, high = work.flops(policy, costs, ()), 1 / max(1, work.visual), 1.0
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        if work.flops(policy, costs, [(kind, place, middle)]) > ratio * whole:
            high = middle
        else:
            low = middle
    return low


def measure(
    model: Any, policy: TokenPolicy, inputs: Inputs, costs: Costs, progress: Any
) -> tuple[Damage, Damage, dict[str, Damage]]:
    """Every sample without a policy, under it, and under the controls."""
    nothing, own, controls = Damage(), Damage(), {name: Damage() for name in _controls(policy)}
    tower = kind_of(model) == TOWER
    for n in range(inputs.count):
        one = inputs.batch([n])
        dense = None if tower else generated(model, one, ANSWER)
        if dense is not None:
            nothing.add(answered(dense[1], dense[1], dense[0]))
        found, work = damage(model, policy, one, costs, dense)
        own.add(found)
        share = equal_share(policy, costs, work, found.flops[0])
        for name, control in controls.items():
            if dense is not None and name == TRUNCATE:
                control.add(_truncated(model, one, found, dense))
                continue
            made = TokenPolicy.make(f"tokens.{name}:keep={share:.6f}", model)
            control.add(damage(model, made, one, costs, dense)[0])
        progress(n + 1, inputs.count)
    return nothing, own, controls


def _controls(policy: TokenPolicy) -> tuple[str, ...]:
    return (TRUNCATE,) if policy.over_text else (RANDOM, GRID)


def _truncated(model: Any, inputs: dict[str, Tensor], own: Damage, dense: tuple[list[int], Tensor]) -> Damage:
    """The end of a text, as many tokens as the policy left."""
    left = max(1, round(own.kept[0] * own.visual[0])) + 1  # the last token is never cut
    short = {name: value[:, -left:] for name, value in inputs.items()}
    found = answered(dense[1], generated(model, short, 0, dense[0])[1], dense[0])
    found.kept, found.visual = list(own.kept), list(own.visual)
    return found
