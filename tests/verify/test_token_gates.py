"""The gates of token policies: they hold for policies that work, and notice engines that do not."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tcw.tokens import decoder, positions
from tcw.tokens.engine import TokenPolicy
from tcw.tokens.plan import Plan
from tcw.verify.token_gates import Rerouted, Tape, check_gates, extended, rerouted
from tcw.verify.token_inputs import Alone, Pictures, Questions, drawn
from tests.tokens.models import TOWERS, VLMS


def small(count=2):
    """Pictures of two sizes."""
    return Pictures([drawn(n)[::6, ::6].copy() for n in range(count)], "a test")


@pytest.fixture(scope="module")
def nowhere(tmp_path_factory):
    return SimpleNamespace(path=tmp_path_factory.mktemp("nowhere"))


@pytest.fixture(scope="module")
def llava(nowhere):
    model = VLMS["llava"]()
    return model, Questions(nowhere, model, small(), None)


@pytest.fixture(scope="module")
def dinov2(nowhere):
    model = TOWERS["dinov2"]()
    return model, Alone(nowhere, model, small())


def gates_of(pair, spec):
    model, inputs = pair
    return {gate.name: gate for gate in check_gates(model, TokenPolicy.make(spec, model), inputs)}


@pytest.mark.parametrize(
    "spec", ["divprune", "visionzip", "fastv", "mustdrop", ("divprune:keep=0.5", "fastv:keep=0.2")]
)
def test_they_hold_for_a_vision_language_model(llava, spec):
    gates = gates_of(llava, spec)
    assert {name: gate.ok for name, gate in gates.items()} == dict.fromkeys(
        ("everything", "dropped", "cached", "batch", "sizes"), True
    )
    assert gates["everything"].error == 0
    assert "against a mask" in gates["dropped"].note


@pytest.mark.parametrize("kind", ["llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_they_hold_for_other_families(nowhere, kind):
    model = VLMS[kind]()
    gates = gates_of((model, Questions(nowhere, model, small(), None)), "divprune:keep=0.4")
    assert all(gate.ok for gate in gates.values()), gates


@pytest.mark.parametrize("spec", ["tome", "divprune", "fastv", "diffrate"])
def test_they_hold_for_a_tower(dinov2, spec):
    gates = gates_of(dinov2, spec)
    assert {name: gate.ok for name, gate in gates.items()} == dict.fromkeys(
        ("everything", "dropped", "batch", "sizes"), True
    )


def test_gaps_that_are_closed_have_no_mask(llava):
    gate = gates_of(llava, "divprune:positions=compact")["dropped"]
    assert gate.ok is None
    assert "gaps are closed" in gate.note


def test_nothing_dropped_proves_nothing(llava):
    assert gates_of(llava, "divprune:keep=1.0")["dropped"].ok is None


def test_wrong_positions_are_noticed(llava, monkeypatch):
    monkeypatch.setattr(decoder, "at_rows", lambda x, index: positions.at_rows(x, index).flip(-2))
    gates = gates_of(llava, "divprune")
    assert gates["dropped"].ok is False
    assert gates["everything"].ok, "where nothing is cut, nothing is touched"


def test_a_token_that_stays_visible_is_noticed(llava, monkeypatch):
    """One more token than the plan says."""
    separators = decoder.Image.separators
    monkeypatch.setattr(
        decoder.Image, "separators", lambda self: torch.cat([separators(self), self.picture.columns[-1:]])
    )
    model, inputs = llava
    policy = TokenPolicy.make("divprune", model)
    dropping = rerouted(
        policy, lambda stage, _: replace(stage, plan=lambda c, k: Plan.dropping(torch.arange(k), c.size))
    )
    gates = {gate.name: gate for gate in check_gates(model, dropping, inputs)}
    assert gates["everything"].ok
    with policy.attach(model) as attached:
        model(**inputs.batch([0]))
        assert len(attached.left[0][0]) > len(inputs.batch([0])["input_ids"][0]) - 36 + 9


def test_sizes_that_lose_tokens_are_noticed(llava):
    model, inputs = llava

    def losing(stage, _):
        def plan(context, k):
            made = stage.plan(context, k)
            return replace(made, size=torch.ones_like(made.size))

        return replace(stage, plan=plan)

    policy = rerouted(TokenPolicy.make("visionzip", model), losing)
    gate = next(gate for gate in check_gates(model, policy, inputs) if gate.name == "sizes")
    assert gate.ok is False


def test_what_depends_on_the_batch_is_noticed(llava):
    """A policy that keeps other tokens each time it is asked."""
    model, inputs = llava
    calls = []

    def restless(stage, _):
        def plan(context, k):
            calls.append(k)
            return Plan.dropping((torch.arange(k) + 7 * len(calls)) % context.tokens, context.size)

        return replace(stage, plan=plan)

    policy = rerouted(TokenPolicy.make("divprune", model), restless)
    gate = next(gate for gate in check_gates(model, policy, inputs) if gate.name == "batch")
    assert gate.ok is False


def test_wrong_positions_after_prefill_are_noticed(llava, monkeypatch):
    monkeypatch.setattr(decoder, "after", lambda *given: positions.after(*given) + 3)
    gates = gates_of(llava, "divprune:positions=compact")
    assert gates["cached"].ok is False
    assert gates["batch"].ok


def test_the_model_is_left_as_it_was(llava, dinov2):
    for model, inputs in (llava, dinov2):
        before = model(**inputs.batch([0]))[0]
        hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
        gates_of((model, inputs), "tome")
        assert torch.equal(model(**inputs.batch([0]))[0], before)
        assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()) == hooks
        assert getattr(model, "token_policy", None) is None


def test_rerouted_methods_are_otherwise_the_same(llava):
    base = TokenPolicy.make("divprune:keep=0.5", llava[0]).methods
    (method,) = base.values()
    wrapped = Rerouted(method, lambda stage, _: stage, expand=True)
    assert (wrapped.keep, wrapped.positions, wrapped.expand, wrapped.family) == (0.5, "keep", True, "tokens")


def test_a_tape_replays_what_it_recorded(llava):
    model, inputs = llava
    one, tape = inputs.batch([0]), Tape(text=False)
    with rerouted(TokenPolicy.make("tokens.random:seed=5", model), tape.recording).attach(model):
        expected = model(**one).logits
    with rerouted(TokenPolicy.make("tokens.random:seed=6", model), tape.recording).attach(model):
        assert not torch.equal(model(**one).logits, expected)
    longer = extended(one, [3, 4])
    assert longer["input_ids"][0, -2:].tolist() == [3, 4]
    assert longer["attention_mask"].shape == longer["input_ids"].shape
