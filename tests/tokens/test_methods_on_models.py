"""Every token policy, found by itself, on every kind of model: it runs, keeps what it says, and decodes accordingly."""

from typing import Any

import pytest
import torch

from tcw import methods
from tcw.errors import UsageError
from tcw.tokens.cuts import budget
from tcw.tokens.engine import TokenPolicy
from tcw.tokens.inputs import tower_inputs, vlm_inputs

from .dense import masked_logits
from .models import TOWERS, VLMS
from .test_engine import batch, model_of, picture, tail

NAMES = methods.names("tokens")
IMAGES = [picture(48, 48, seed) for seed in range(6)]


def policy_for(name: str, model: Any, keep: float) -> TokenPolicy:
    """The policy, or a skip with its one clear reason."""
    try:
        return TokenPolicy.make(f"{name}:keep={keep}", model, IMAGES)
    except UsageError as error:
        if not error.hint:
            raise
        pytest.skip(error.message)


@pytest.mark.parametrize("model_name", VLMS)
@pytest.mark.parametrize("name", NAMES)
def test_on_a_vision_language_model(name: str, model_name: str) -> None:
    model = model_of(model_name)
    inputs, singles = batch(model)
    policy = policy_for(name, model, 0.5)
    with policy.attach(model) as attached, torch.no_grad():
        found = model(**inputs).logits
        traces, left = attached.traces, attached.left
        tokens = model.generate(**inputs, max_new_tokens=3)[:, -3:]
        alone = [model.generate(**single, max_new_tokens=3)[0, -3:] for single in singles]
    assert bool(torch.isfinite(found).all())
    assert torch.equal(tokens, torch.stack(alone))
    assert len(traces) == 3
    stages = [stage for _, stage in policy.stages()]
    exact = all(stage.keep is not None and stage.allocate is None for stage in stages)
    expands = any(getattr(method, "expand", False) for method in policy.methods.values())
    for trace in traces:
        assert (trace.plan is None) == expands, "the language model of a tower that expands sees all of an image"
        if trace.plan is None:
            continue
        assert trace.plan.kept <= trace.original
        if exact:
            assert trace.plan.kept == budget(stages[-1].keep or 0, trace.original)
    merges = any(plan.merges for trace in traces for _, plan in trace.cuts)
    if not merges and all(stage.at.kind != "block" for stage in stages):
        wanted = masked_logits(model, inputs, left)
        for row, columns in enumerate(left[max(left)]):
            mine = tail(found[row], columns)
            torch.testing.assert_close(mine, wanted[row, columns], atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("model_name", TOWERS)
@pytest.mark.parametrize("name", NAMES)
def test_on_a_plain_tower(name: str, model_name: str) -> None:
    model = TOWERS[model_name]()
    pixels = tower_inputs(model, [picture(48, 48, seed) for seed in range(3)])
    with torch.no_grad():
        dense = model(pixel_values=pixels).last_hidden_state
    policy = policy_for(name, model, 0.5)
    with policy.attach(model) as attached, torch.no_grad():
        hidden = model(pixel_values=pixels).last_hidden_state
        read = attached.read_out(hidden)
        alone = None if any(s.whole for _, s in policy.stages()) else model(pixel_values=pixels[1:2]).last_hidden_state
    cls = int(policy.shape.has_cls)
    assert read.shape == dense[:, cls:].shape
    assert bool(torch.isfinite(read).all())
    assert hidden.shape[1] <= dense.shape[1]
    if alone is not None:
        torch.testing.assert_close(alone[0], hidden[1, : alone.shape[1]], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(model(pixel_values=pixels).last_hidden_state, dense)


@pytest.mark.parametrize("name", [n for n in NAMES if methods.get(n).video])
@pytest.mark.parametrize("model_name", ["llava_onevision", "qwen2_5_vl", "qwen3_vl"])
def test_a_video(name: str, model_name: str) -> None:
    from tcw.tokens.inputs import Sample

    model = model_of(model_name)
    frames = torch.stack([picture(48, 48, seed // 2) for seed in range(8)])
    inputs = vlm_inputs(model, [Sample([[5, 6], frames, [7, 8, 9]])])
    policy = policy_for(name, model, 0.25)
    with policy.attach(model) as attached, torch.no_grad():
        assert bool(torch.isfinite(model(**inputs).logits).all())
        plan = attached.traces[0].plan
    assert plan is not None
    assert plan.kept < attached.traces[0].original
