"""What both models put out for the same inputs: logits bit for bit, greedy tokens, perplexity.

One model is in memory at a time: the reference's outputs are kept (at most WINDOWS x WINDOW rows of logits), it is
freed, and each output of the artifact is compared as it comes.
"""

import math
from typing import Any

import torch

from tcw.data import evaluation_text
from tcw.device import pick
from tcw.errors import UsageError
from tcw.events import Progress
from tcw.verify.compare import compare, nll, worst
from tcw.verify.inputs import Feed, Plan, plan_inputs
from tcw.verify.running import greedy, loaded, output, residency_of, tokenizer_of
from tcw.verify.suites import Job, Measured
from tcw.verify.verdict import Sequence


def run(job: Job) -> Measured:
    """Run the reference, then the artifact, on the same inputs. Raises UsageError without a reference."""
    if job.reference is None:
        raise UsageError("the suite `outputs` needs a reference to compare with", "`--reference MODEL`")
    tokenizer = tokenizer_of(job.reference)
    with loaded(job.reference, job.device) as model:
        plan = plan_inputs(model, tokenizer, evaluation_text() if job.text is None else job.text)
        expected = [_run_one(job, "reference", model, plan, i) for i in range(len(plan.feeds))]
        wanted = _generate(job, "reference", model, plan)
    with loaded(job.artifact, job.device) as model:
        sequences, sums = [], (0.0, 0.0)
        for i, feed in enumerate(plan.feeds):
            sequence, losses = _judge(feed, expected[i], _run_one(job, "artifact", model, plan, i))
            sequences.append(sequence)
            sums = (sums[0] + losses[0], sums[1] + losses[1])
        tokens = _generate(job, "artifact", model, plan)
    sections: dict[str, dict[str, Any]] = {"runtime": {"residency": residency_of(job.artifact, pick(job.device))}}
    if sequences:
        sections["logits"] = summary(sequences)
    if predicted := sum(len(f.targets) for f in plan.feeds if f.targets is not None):
        before, after = (_perplexity(s, predicted) for s in sums)
        sections["perplexity"] = {"reference": before, "artifact": after, "rise": after / before - 1}
    if plan.new_tokens:
        same = _agreed(wanted, tokens)
        sections["generation"] = {"tokens": len(wanted), "identical_tokens": same, "agreement": same / len(wanted)}
    return Measured(sections, wanted == tokens and all(s.bit_identical for s in sequences), sequences, plan.skipped)


def _run_one(job: Job, who: str, model: Any, plan: Plan, index: int) -> tuple[torch.Tensor, bool]:
    result = output(model, plan.feeds[index])
    job.progress(Progress(f"outputs of the {who}", index + 1, len(plan.feeds), "prompts", plan.feeds[index].label))
    return result


def _generate(job: Job, who: str, model: Any, plan: Plan) -> list[int]:
    if not plan.new_tokens:
        return []
    tokens = greedy(model, plan.feeds[0], plan.new_tokens)
    job.progress(Progress(f"greedy tokens of the {who}", len(tokens), plan.new_tokens, "tokens"))
    return tokens


def _judge(
    feed: Feed, expected: tuple[torch.Tensor, bool], found: tuple[torch.Tensor, bool]
) -> tuple[Sequence, tuple[float, float]]:
    """Compare two outputs; with targets, also each model's sum of negative log-likelihoods."""
    losses, perplexity = (0.0, 0.0), None
    if feed.targets is not None:
        losses = nll(expected[0][:-1], feed.targets), nll(found[0][:-1], feed.targets)
        perplexity = _perplexity(losses[0], len(feed.targets)), _perplexity(losses[1], len(feed.targets))
    return compare(feed.label, expected[0], found[0], logits=expected[1], perplexity=perplexity), losses


def summary(sequences: list[Sequence]) -> dict[str, Any]:
    """All sequences together; means are over positions."""
    weights = [s.positions for s in sequences]
    means: list[float | None] = []
    for values in ([s.kl for s in sequences], [s.top1 for s in sequences]):
        known = [(v, w) for v, w in zip(values, weights, strict=True) if v is not None]
        means.append(sum(v * w for v, w in known) / max(1, sum(w for _, w in known)) if known else None)
    return {
        "bit_identical": all(s.bit_identical for s in sequences),
        "max_abs_diff": worst([s.max_abs_diff for s in sequences]),
        "mean_kl": means[0],
        "top1_agreement": means[1],
    }


def _perplexity(loss: float, count: int) -> float:
    """Exp of the mean loss; infinite where that is too large to say."""
    try:
        return math.exp(loss / count)
    except OverflowError:
        return math.inf


def _agreed(wanted: list[int], tokens: list[int]) -> int:
    """Tokens up to the first that differs: what follows it answers another prompt."""
    pairs = enumerate(zip(wanted, tokens, strict=True))
    return next((i for i, (a, b) in pairs if a != b), len(wanted))
