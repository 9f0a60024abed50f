"""A stored token policy: whether it computes what it should, and what dropping and merging cost.

Exactness (tcw/verify/token_gates.py) is not a matter of degree: nothing makes up for a gate that fails. What the policy
changes (tcw/verify/token_damage.py) is measured on the artifact alone, with and without the policy: its weights are
judged elsewhere. `flops_ratio` and `kept` are those of these samples.
"""

from typing import Any

import torch

from tcw.artifact import Artifact
from tcw.calibration.images import reads_files
from tcw.events import Progress
from tcw.tokens import stored
from tcw.tokens.engine import TokenPolicy
from tcw.tokens.flops import costs_of
from tcw.tokens.pictures import fragment
from tcw.tokens.shape import TOWER, kind_of
from tcw.verify.kv_gates import Gate
from tcw.verify.running import loaded, tokenizer_of
from tcw.verify.suites import Job, Measured
from tcw.verify.token_damage import Damage, measure
from tcw.verify.token_gates import check_gates
from tcw.verify.token_inputs import Alone, Inputs, Pictures, Questions, Texts


def run(job: Job) -> Measured:
    """Check and measure the policy.

    Raises:
        UsageError: the policy does not fit the model.
        FormatError, SourceError: the stored policy is damaged; the pictures cannot be read.
    """
    from tcw.runtime.load import skeleton

    assert isinstance(job.artifact, Artifact), "who asks for this suite has looked"
    costs = costs_of(skeleton(job.artifact))
    with loaded(job.artifact, job.device) as model:
        policy = stored.of_artifact(job.artifact, model)
        assert policy is not None, "who asks for this suite has looked"
        inputs, pictures = _inputs(job, model, text=policy.over_text)
        gates = check_gates(model, policy, inputs)
        job.progress(Progress("token gates", len(gates), len(gates), "gates"))
        with torch.inference_mode():
            found = measure(
                model, policy, inputs, costs,
                lambda done, all: job.progress(Progress("token policy", done, all, "samples")),
            )  # fmt: skip
            drawn, notes = _drawn(model, policy, inputs, pictures)
        options = {name: method.options() for name, method in policy.methods.items()}
        kind = "text" if policy.over_text else "tower" if kind_of(model) == TOWER else "images"
    origin = pictures.origin if pictures else None
    measured = _measured(
        kind, gates, found, {"methods": options, "inputs": inputs.how, "pictures": origin, "notes": notes}
    )
    measured.drawn = {"tokens": drawn}
    return measured


def _drawn(model: Any, policy: TokenPolicy, inputs: Inputs, pictures: Pictures | None) -> tuple[str, list[str]]:
    """The pictures with what was kept, merged and dropped of each, as HTML; and what had to be substituted.

    The HTML is "" without Pillow, and for a text.
    """
    traces, images = [], []
    with policy.attach(model) as attached:
        for n in range(inputs.count):
            model(**inputs.batch([n]))
            traces += attached.traces[:1] if pictures is not None else []
            images += [pictures.images[n]] * len(attached.traces[:1]) if pictures is not None else []
        notes = attached.notes
    names = [f"Picture {n + 1}" for n in range(len(traces))]
    return fragment(images, traces, names=names) if images and reads_files() else "", notes


def _inputs(job: Job, model: Any, *, text: bool) -> tuple[Inputs, Pictures | None]:
    """The samples, and their pictures."""
    if text:
        return Texts(model, tokenizer_of(job.artifact), job.text), None
    pictures = Pictures.read(job.images)
    if kind_of(model) == TOWER:
        return Alone(job.artifact, model, pictures), pictures
    return Questions(job.artifact, model, pictures, tokenizer_of(job.artifact)), pictures


def _measured(
    kind: str, gates: list[Gate], found: tuple[Damage, Damage, dict[str, Damage]], facts: dict[str, Any]
) -> Measured:
    nothing, own, controls = found
    section: dict[str, Any] = {
        "kind": kind,
        **_numbers(nothing, own),
        "visual": own.mean("visual"),
        "controls": {name: _numbers(nothing, control) for name, control in controls.items()},
        "gates": {gate.name: gate.to_json() for gate in gates},
        "samples": len(own.kept),
        **facts,
    }
    same = all(value == 0 for value in own.kl) and all(value == 1 for value in (*own.kept, *own.cosine))
    failed = {f"tokens {g.name}": _failure(g) for g in gates if g.ok is False}
    return Measured({"tokens": section}, identical=same, lossy=set() if same else {"tokens"}, failed=failed)


def _numbers(nothing: Damage, found: Damage) -> dict[str, Any]:
    """Means over the samples; of an answer also what it was without a policy."""
    before, after = nothing.mean("nll"), found.mean("nll")
    rise = None if before is None or after is None else after - before
    return {
        "kept": found.mean("kept"),
        "flops_ratio": found.mean("flops"),
        "kv_ratio": found.mean("kv"),
        "kl": found.mean("kl"),
        "top1": found.mean("top1"),
        "answer_nll": {"reference": before, "artifact": after, "rise": rise},
        "patch_cosine": found.mean("cosine"),
    }


def _failure(gate: Gate) -> str:
    return f"an error of {gate.error:.2g}, at most {gate.bound:.2g} are allowed ({gate.note})"
