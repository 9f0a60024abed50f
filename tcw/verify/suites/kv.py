"""A stored KV-cache policy: whether it computes what it should, and what forgetting and rounding cost.

Exactness (tcw/verify/kv_gates.py) is not a matter of degree: nothing makes up for a gate that fails. The tasks of
tcw/verify/kv_tasks.py are done by the reference (the artifact itself without one) under a full cache, and by the
artifact under its policy. Bytes are those of the caches' storages after the context. They are judged in bfloat16,
whatever the models ran in here: quantised tokens would look smaller than they are beside a cache in float32.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcw.artifact import Artifact
from tcw.errors import SourceError
from tcw.events import Progress
from tcw.kv.plan import Plan
from tcw.kv.policy import Policy
from tcw.verify import kv_tasks
from tcw.verify.kv_gates import CHUNKS, PREFIX, Gate, check_gates
from tcw.verify.kv_tasks import NewCache, Noise, Prose, Scores, Script, Task
from tcw.verify.running import loaded, tokenizer_of
from tcw.verify.suites import Job, Measured


@dataclass(frozen=True)
class _Side:
    """What one cache came to: a score for each task, and tokens a second."""

    scores: list[Scores]
    rate: float

    @classmethod
    def of(cls, job: Job, who: str, model: Any, tasks: list[Task], new_cache: NewCache) -> "_Side":
        scores = []
        for i, task in enumerate(tasks):
            scores.append(kv_tasks.run_task(model, task, new_cache))
            job.progress(Progress(f"tasks with {who}", i + 1, len(tasks), "tasks", task.label))
        return cls(scores, kv_tasks.decode_rate(model, tasks[0].context, new_cache))

    @property
    def cache_bytes(self) -> int:
        """The most that any task left in the cache."""
        return max(score.cache_bytes for score in self.scores)


@dataclass(frozen=True)
class _Judged:
    """The artifact under its policy; `plans` are for the dtype it ran in, and for bfloat16."""

    side: _Side
    gates: list[Gate]
    plans: tuple[Plan, Plan]
    methods: dict[str, dict[str, Any]]
    dtype: torch.dtype


def run(job: Job) -> Measured:
    """Check and measure the policy.

    Raises:
        UsageError: the policy does not fit the model.
        FormatError, SourceError: the stored policy is damaged; the text is too short.
    """
    tokenizer = tokenizer_of(job.reference or job.artifact)
    with loaded(job.reference or job.artifact, job.device) as model:
        script = _script(tokenizer, job.text, int(model.config.get_text_config().vocab_size))
        tasks = _tasks(model, script)
        if not tasks:
            reason = "the model's context is too short for its tasks"
            return Measured({}, identical=False, skipped={"kv": reason}, lossy={"kv"})
        wanted = _Side.of(job, "a full cache", model, tasks, lambda: kv_tasks.full_cache(model))
        found = None if job.reference else _judge(job, model, script, tasks)
    if found is None:
        with loaded(job.artifact, job.device) as model:
            found = _judge(job, model, script, tasks)
    return _measured(wanted, found, tasks, "prose" if isinstance(script, Prose) else "random tokens")


def _script(tokenizer: Any | None, text: str | None, vocabulary: int) -> Script:
    """Prose where the tokenizer is the model's own, else noise."""
    prose = Prose(tokenizer, text) if tokenizer is not None else None
    return prose if prose is not None and prose.fits(vocabulary) else Noise(vocabulary)


def _tasks(model: Any, script: Script) -> list[Task]:
    """Tasks with contexts of CONTEXT tokens, or what model and text have room for; none if the model has too little.

    Raises SourceError where the text does.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    room = limit - kv_tasks.longest_follow(script)
    words, least = len(script.words) - kv_tasks.NEXT - 1, max(PREFIX, kv_tasks.least_length(script))
    if words < least:
        raise SourceError(f"the text is too short for the suite `kv`: {len(script.words)} tokens", "`--text FILE`")
    return kv_tasks.make_tasks(script, int(min(kv_tasks.CONTEXT, room, words))) if room >= least else []


def _judge(job: Job, model: Any, script: Script, tasks: list[Task]) -> _Judged:
    assert isinstance(job.artifact, Artifact)
    policy = Policy.of_artifact(job.artifact, model)
    assert policy is not None, "who asks for this suite has looked"
    length = len(tasks[0].context)
    gates = check_gates(model, policy, _two_texts(script, length + sum(CHUNKS)))
    job.progress(Progress("gates", len(gates), len(gates), "gates"))
    side = _Side.of(job, "the KV policy", model, tasks, lambda: policy.new_cache(model))
    plans = policy.plan(length, dtype=model.dtype), policy.plan(length, dtype=torch.bfloat16)
    if len(policy.layers) == len(policy.new_cache(model).layers):
        gates.append(_bytes_gate(side.cache_bytes, plans[0]))
    return _Judged(side, gates, plans, {name: m.options() for name, m in policy.methods.items()}, model.dtype)


def _bytes_gate(held: int, plan: Plan) -> Gate:
    """What lies in memory is what the plan says, or less where the policy decides by what it sees."""
    ok = held <= plan.bytes if plan.bounded else held == plan.bytes
    return Gate("bytes", ok, abs(held - plan.bytes) / plan.bytes, 0.0, f"{held} held, {plan.bytes} planned")


def _two_texts(script: Script, length: int) -> Tensor:
    """Int64 [2, length], from the start and the end of the text."""
    return torch.stack([script.words[:length], script.words[-length:]])


def _measured(wanted: _Side, found: _Judged, tasks: list[Task], text: str) -> Measured:
    before, after = kv_tasks.summarise(wanted.scores), kv_tasks.summarise(found.side.scores)

    def both(kind: str, value: str) -> dict[str, float]:
        return {"reference": before[kind][value], "artifact": after[kind][value]}

    def risen(kind: str) -> dict[str, float]:
        return {**both(kind, "nll"), "rise": after[kind]["nll"] - before[kind]["nll"]}

    rates = {"reference": wanted.rate, "artifact": found.side.rate, "ratio": found.side.rate / wanted.rate}
    held = _bytes(wanted.cache_bytes, found)
    section = {
        "bytes_ratio": held["bfloat16"]["policy"] / held["bfloat16"]["full"],
        "key_nll": risen("passkey"),
        "exact": both("passkey", "exact"),
        "next_nll": risen("next"),
        "span_copy": both("copy", "token_accuracy"),
        "span_nll": both("copy", "nll"),
        "tokens_per_second": rates,
        "bytes": held,
        "gates": {gate.name: gate.to_json() for gate in found.gates},
        "context": len(tasks[0].context),
        "placements": sum(task.kind == "passkey" for task in tasks),
        "text": text,
        "methods": found.methods,
    }
    same = [s.nll for s in wanted.scores] == [s.nll for s in found.side.scores]
    failed = {f"kv {g.name}": _failure(g) for g in found.gates if g.ok is False}
    return Measured({"kv": section}, identical=same, lossy=set() if same else {"kv"}, failed=failed)


def _failure(gate: Gate) -> str:
    return f"an error of {gate.error:.2g}, at most {gate.bound:.2g} are allowed ({gate.note})"


def _bytes(full: int, found: _Judged) -> dict[str, Any]:
    """Bytes as they were, and as they are with a model in bfloat16: by plan, times what was found of the plan here.

    Layers that no policy serves hold floats alone: their bytes go with the dtype.
    """
    here, there = found.plans
    others, scale = full - here.dense_bytes, torch.bfloat16.itemsize / found.dtype.itemsize
    share = (found.side.cache_bytes - others) / here.bytes
    rest = others * scale
    return {
        "full": full,
        "policy": found.side.cache_bytes,
        "dtype": str(found.dtype).removeprefix("torch."),
        "bfloat16": {"full": round(there.dense_bytes + rest), "policy": round(there.bytes * share + rest)},
        "shared": here.shared_bytes,
    }
