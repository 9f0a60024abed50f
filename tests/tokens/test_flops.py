"""FLOPs against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

from tcw.tokens.engine import TokenPolicy
from tcw.tokens.flops import Blocks, Costs, costs_of, counts, cuts_of, outlook
from tcw.tokens.inputs import Sample, tower_inputs, vlm_inputs
from tcw.tokens.shape import shape_of, text_model_of, tower_of
from tcw.tokens.watch import blocks_of
from tests.tokens.models import LAYERS, SIDE, TOWERS, VLMS


def counted(model, inputs, *stacks):
    """FLOPs that torch counts inside the blocks of some stacks."""
    names = {
        f"{type(model).__name__}.{name}"
        for stack in stacks
        for block in blocks_of(stack)
        for name, module in model.named_modules()
        if module is block
    }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return sum(sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name in names)


def picture(seed=0):
    return torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llava():
    model = VLMS["llava"]()
    model.set_attn_implementation("eager")  # whose products the counter sees
    return model


@pytest.fixture(scope="module")
def asked(llava):
    return vlm_inputs(llava, [Sample([[5, 6], picture(), [7, 8, 9, 10]])])


def test_a_vision_language_model_as_it_is(llava, asked):
    costs, shape = costs_of(llava), shape_of(llava)
    found = counts(shape, (), visual=36, text=6, patches=37)
    tower, text = tower_of(llava), text_model_of(llava)
    assert costs.decoder.flops(found.decoder) == counted(llava, asked, text)
    assert costs.tower.flops(found.tower, found.merged) == counted(llava, asked, tower)
    assert found.flops(costs) == counted(llava, asked, tower, text)


@pytest.mark.parametrize("spec", ["divprune:keep=0.25", "grid:keep=0.5", "tome:keep=0.5"])
def test_under_a_policy(llava, asked, spec):
    policy = TokenPolicy.make(spec, llava)
    cuts, bounded = cuts_of(policy)
    found = counts(policy.shape, cuts, visual=36, text=6, patches=37)
    with policy.attach(llava):
        flops = counted(llava, asked, tower_of(llava), text_model_of(llava))
    assert not bounded
    assert found.flops(costs_of(llava)) == pytest.approx(flops, rel=0.03)  # shares are not whole numbers of tokens
    assert found.flops(costs_of(llava)) < 0.95 * counts(policy.shape, (), visual=36, text=6, patches=37).flops(
        costs_of(llava)
    )


def test_cuts_at_layers(llava, asked):
    """By the MLPs: a policy that looks at a layer computes some of its attention twice, which is not counted."""
    policy, costs = TokenPolicy.make("adsc:keep=0.25", llava), costs_of(llava).decoder
    found = counts(policy.shape, cuts_of(policy)[0], visual=36, text=6).decoder
    with policy.attach(llava), FlopCounterMode(display=False) as counter, torch.no_grad():
        llava(**asked)
    flops = [
        sum(by.values())
        for name, by in counter.get_flop_counts().items()
        if "language_model" in name and name.endswith(".mlp")
    ]
    assert flops == pytest.approx([c * n for c, n in zip(costs.rest, found, strict=True)], rel=0.04)
    assert flops == sorted(flops, reverse=True)
    assert flops[-1] < 0.4 * flops[0]


@pytest.mark.parametrize("kind", sorted(TOWERS))
def test_plain_towers(kind):
    model = TOWERS[kind]()
    model.set_attn_implementation("eager")
    inputs, shape = {"pixel_values": tower_inputs(model, [picture()])}, shape_of(model)
    found = counts(shape, (), visual=36, patches=36 + shape.has_cls)
    assert found.flops(costs_of(model)) == counted(model, inputs, model)
    policy = TokenPolicy.make("tome:keep=0.5", model)
    found = counts(shape, cuts_of(policy)[0], visual=36, patches=36 + shape.has_cls)
    with policy.attach(model):
        flops = counted(model, inputs, model)
    assert found.flops(costs_of(model)) == pytest.approx(flops, rel=0.03)


def test_experts_count_as_often_as_a_token_goes_to_them():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, vocab_size=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    costs = Blocks.of(model.model)
    attention = 32 * 32 * 2 + 32 * 16 * 2
    assert costs.attention == (2 * attention,) * 2
    assert costs.rest == (2 * (32 * 4 + 2 * 3 * 32 * 48),) * 2
    assert costs.pair == (2 * 4 * 16,) * 2


def test_weights_are_not_needed(llava):
    with torch.device("meta"):
        bare = type(llava)(llava.config)
    assert costs_of(bare) == costs_of(llava)


def test_an_outlook(llava):
    costs = costs_of(llava)
    half = outlook(TokenPolicy.make("divprune:keep=0.5", llava), costs, text=6)
    assert (half.visual, half.kept, half.known, half.bounded, half.what) == (36, 18, True, False, "visual tokens")
    assert half.kv_ratio == (18 + 6) / (36 + 6)
    assert half.flops_ratio == half.flops / half.flops_before < 0.85
    late = outlook(TokenPolicy.make("fastv:keep=0.5,layer=2", llava), costs, text=6)
    assert late.kv_ratio == pytest.approx((2 * 42 + (LAYERS - 2) * 24) / (LAYERS * 42))
    assert half.flops < late.flops < half.flops_before
    unknown = outlook(TokenPolicy.make("dymu", llava, images=[picture(n) for n in range(3)]), costs)
    assert unknown.bounded
    assert half.to_json()["flops_ratio"] == half.flops_ratio


def test_a_policy_that_drops_caches_says_so(llava):
    late = outlook(TokenPolicy.make("mustdrop", llava), costs_of(llava), text=6)
    early = outlook(TokenPolicy.make("fastv:keep=0.11", llava), costs_of(llava), text=6)
    assert late.kv_ratio < early.kv_ratio


def test_costs_of_parts():
    blocks = Blocks((1.0,), (2.0,), (3.0,))
    assert blocks.flops([10]) == 10 + 300 + 20
    assert blocks.flops([10], [5]) == 10 + 300 + 10
    assert Costs(blocks, None).tower is blocks
