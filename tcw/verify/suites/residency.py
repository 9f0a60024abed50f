"""Does a model say the same where its weights stay compressed as where they are decoded? And which "same" was proved?

The artifact runs twice in its own dtype: in the residency that is asked for, and decoded once ("bf16"); on a GPU that
cannot hold it so, decoded as it runs ("huffman"), which multiplies with the same bits.

    huffman, offload    decode to the bits that were stored and multiply as ever: logits must be bit-identical
    packed, lossless    kernels that sum products in an order of their own. So it runs a third time, the same kernels on
                        plain BF16 weights: that must be bit-identical, and how far it is from torch's own products is
                        measured: noise of the order of sums, not of the weights
    packed, quantised   multiplies with rounded inputs or codes: only measured

Kernels for few tokens differ from those for many: each input is run whole, and its first tokens by themselves, and some
tokens are generated. What must be bit-identical and is not fails, whatever the limits are.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.functional import linear

from tcw.data import evaluation_text
from tcw.device import pick
from tcw.events import Progress
from tcw.verify.compare import compare
from tcw.verify.inputs import Feed, Plan, plan_inputs
from tcw.verify.running import greedy, loaded, output, residency_of, tokenizer_of
from tcw.verify.suites import Job, Measured
from tcw.verify.suites.outputs import summary
from tcw.verify.verdict import Sequence

FEW = 16  # tokens that the fused kernels take at most
FEEDS = 4
PLAIN, KERNEL = "decoded weights", "the same kernels on plain weights"

Outputs = tuple[list[tuple[torch.Tensor, bool]], list[int]]


def run(job: Job) -> Measured:
    """Compare a residency with decoded weights. Raises UsageError where the model cannot live so on the device."""
    tokenizer = tokenizer_of(job.artifact)
    same: Outputs | None = None
    with loaded(job.artifact, job.device, residency=job.residency) as model:
        name = model.tcw_residency
        plan = _short(plan_inputs(model, tokenizer, evaluation_text() if job.text is None else job.text))
        found = _run(job, f"weights {name}", model, plan)
        if kernels := _lossless(model):
            with _on_plain_weights(kernels):
                same = _run(job, KERNEL, model, plan)
    decoded = residency_of(job.artifact, pick(job.device))
    with loaded(job.artifact, job.device, residency="huffman" if decoded == "huffman" else "bf16") as model:
        expected = _run(job, PLAIN, model, plan)
    section: dict[str, Any] = {"name": name, "plain": _compared(plan, expected, found), "same_kernel": None}
    if same is not None:
        section["same_kernel"] = _compared(plan, same, found)
    exact = section["same_kernel"] or (None if name == "packed" else section["plain"])
    section["proved"] = None if exact is None or not exact["bit_identical"] else (KERNEL if same else PLAIN)
    failed = {}
    if exact is not None and not exact["bit_identical"]:
        failed["residency"] = f"`{name}` does not give the bits of {KERNEL if same else PLAIN}"
    return Measured({"residency": section}, failed=failed)


def _short(plan: Plan) -> Plan:
    """Some of the inputs, each whole and its first tokens."""
    feeds = []
    for feed in plan.feeds[:FEEDS]:
        feeds.append(Feed(feed.label, feed.inputs))
        if set(feed.inputs) == {"input_ids"} and feed.inputs["input_ids"].shape[1] > FEW:
            feeds.append(Feed(f"{feed.label}, {FEW} tokens", {"input_ids": feed.inputs["input_ids"][:, :FEW]}))
    return Plan(feeds, min(plan.new_tokens, FEW), plan.skipped)


def _run(job: Job, who: str, model: Any, plan: Plan) -> Outputs:
    outputs = []
    for i, feed in enumerate(plan.feeds):
        outputs.append(output(model, feed))
        job.progress(Progress(f"outputs of {who}", i + 1, len(plan.feeds), "prompts", feed.label))
    return outputs, greedy(model, plan.feeds[0], plan.new_tokens) if plan.new_tokens else []


def _compared(plan: Plan, expected: Outputs, found: Outputs) -> dict[str, Any]:
    """How far apart two runs are, over all inputs; the generated tokens count as well."""
    sequences: list[Sequence] = [
        compare(feed.label, a, b, logits=logits)
        for feed, (a, logits), (b, _) in zip(plan.feeds, expected[0], found[0], strict=True)
    ]
    far = summary(sequences)
    same = sum(a == b for a, b in zip(expected[1], found[1], strict=True))
    far["bit_identical"] = far["bit_identical"] and same == len(found[1])
    return {**far, "tokens": len(found[1]), "identical_tokens": same}


def _lossless(model: Any) -> list[Any]:
    """The weights of a model that are packed without loss."""
    from tcw.runtime.lossless import LosslessWeight

    return [module for module in model.modules() if isinstance(module, LosslessWeight)]


@contextmanager
def _on_plain_weights(weights: list[Any]) -> Iterator[None]:
    """Let the kernels read each weight from plain BF16, which is unpacked for every product."""
    with ExitStack() as stack:
        for weight in weights:
            stack.enter_context(patch.object(weight, "linear", _plain_linear(weight)))
        yield


def _plain_linear(weight: Any) -> Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]:
    from tcw.kernels.packed_matmul import raw_matmul

    def product(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.dtype == torch.bfloat16 and x.shape[:-1].numel() <= weight.fused_rows:
            return raw_matmul(x, weight.dense(), bias)
        return linear(x, weight.dense().to(x.dtype), bias)

    return product
