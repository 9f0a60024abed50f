"""The engine on six tiny vision-language models: exactness, whatever the method.

Batches of two, padded on the left, images of two sizes, two images in one row, and a video where the model takes any.
Weights are scaled so that greedy tokens vary.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tcw.errors import UsageError
from tcw.kv.policy import Policy
from tcw.tokens.engine import TokenPolicy
from tcw.tokens.inputs import Sample, vlm_inputs
from tcw.tokens.shape import shape_of

from .dense import masked_logits
from .models import VLMS
from .test_decoder import llama, prompts

SPECS = {
    "input": "tokens.random:keep=0.4",
    "scored": "vtc-cls:keep=0.5",
    "layer": "fastv:keep=0.3",
    "layers": "pyramiddrop:keep=0.2",
}
_MODELS: dict[str, Any] = {}


def model_of(name: str) -> Any:
    """One model of each family for all tests; they leave it as it was."""
    if name not in _MODELS:
        _MODELS[name] = VLMS[name]()
    return _MODELS[name]


def picture(height: int, width: int, seed: int) -> Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed))


def batch(model: Any) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Two samples together, and each alone."""
    first = Sample([[5, 6, 7], picture(48, 96, 1), [8, 9], picture(96, 48, 2), [10, 11, 12, 13]])
    second = Sample([[14], picture(96, 96, 3), [15, 16]])
    return vlm_inputs(model, [first, second]), [vlm_inputs(model, [s]) for s in (first, second)]


def tail(logits: Tensor, columns: Tensor) -> Tensor:
    """Logits of a row's real tokens, which stand at its end."""
    return logits[len(logits) - len(columns) :]


@pytest.mark.parametrize("cut", SPECS)
@pytest.mark.parametrize("name", VLMS)
def test_pruned_equals_the_dense_model_with_dropped_keys_masked(name: str, cut: str) -> None:
    model = model_of(name)
    inputs, _ = batch(model)
    with TokenPolicy.make(SPECS[cut], model).attach(model) as attached, torch.no_grad():
        found = model(**inputs).logits
        left = attached.left
    wanted = masked_logits(model, inputs, left)
    assert len(attached.traces) == 3
    scale = float(wanted.abs().max())
    for row, columns in enumerate(left[max(left)]):
        assert len(columns) < int(inputs["attention_mask"][row].sum())
        torch.testing.assert_close(tail(found[row], columns), wanted[row, columns], atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("cut", SPECS)
@pytest.mark.parametrize("name", VLMS)
def test_keeping_all_changes_no_bit(name: str, cut: str) -> None:
    model = model_of(name)
    inputs, _ = batch(model)
    spec = SPECS[cut].partition("keep=")[0] + "keep=1"
    with torch.no_grad():
        logits, tokens = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4)
        with TokenPolicy.make(spec, model).attach(model):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(**inputs, max_new_tokens=4), tokens)
        assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("cut", SPECS)
@pytest.mark.parametrize("name", VLMS)
def test_a_batch_equals_its_samples_and_cached_equals_uncached(name: str, cut: str, positions: str) -> None:
    model = model_of(name)
    inputs, singles = batch(model)
    with TokenPolicy.make(f"{SPECS[cut]},positions={positions}", model).attach(model) as attached, torch.no_grad():
        logits = model.generate(**inputs, max_new_tokens=5, output_logits=True, return_dict_in_generate=True)
        together = [trace.plan.keep for trace in attached.traces]
        apart = []
        for row, single in enumerate(singles):
            alone = model.generate(**single, max_new_tokens=5, output_logits=True, return_dict_in_generate=True)
            apart += [trace.plan.keep for trace in attached.traces]
            assert torch.equal(logits.sequences[row, -5:], alone.sequences[0, -5:])
            for both, one in zip(logits.logits, alone.logits, strict=True):
                torch.testing.assert_close(both[row], one[0], atol=2e-5 * float(one.abs().max()), rtol=0)
        again = model.generate(**inputs, max_new_tokens=5, use_cache=False) if cut in ("input", "scored") else None
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))
    assert again is None or torch.equal(again, logits.sequences)
    assert len(set(logits.sequences[:, -5:].flatten().tolist())) > 2, "a constant continuation would show nothing"


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_video(name: str) -> None:
    model = model_of(name)
    frames = torch.stack([picture(48, 48, seed) for seed in range(4)])
    inputs = vlm_inputs(model, [Sample([[5, 6], frames, [7, 8, 9]])])
    with TokenPolicy.make("grid:keep=0.5", model).attach(model) as attached, torch.no_grad():
        found = model(**inputs).logits
        left = attached.left
    wanted = masked_logits(model, inputs, left)
    assert attached.traces[0].grid[0] > 1
    torch.testing.assert_close(found[0], wanted[0, left[0][0]], atol=1e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("name", VLMS)
def test_merged_features_are_the_means(name: str) -> None:
    """Constant pictures have constant means; a merging method's plan sums to the tokens, and logits follow the plan."""
    model = model_of(name)
    inputs, _ = batch(model)
    with TokenPolicy.make("visionzip:keep=0.4", model).attach(model) as attached, torch.no_grad():
        found = model(**inputs).logits
    assert bool(torch.isfinite(found).all())
    for trace in attached.traces:
        assert trace.plan is not None
        assert trace.plan.merges
        assert float(trace.plan.size.sum()) <= trace.original


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_together_with_a_kv_policy(name: str) -> None:
    """A cache that forgets and rounds nothing changes nothing under a token policy."""
    model = model_of(name)
    inputs, _ = batch(model)
    try:
        policy = Policy.make("knorm:ratio=0.5", model).everything()
    except UsageError:
        pytest.skip("this text model has no KV policies")
    before = model.model.language_model.config._attn_implementation
    with torch.no_grad(), TokenPolicy.make("fastv:keep=0.4", model).attach(model):
        wanted = model.generate(**inputs, max_new_tokens=5)
        found = model.generate(**inputs, max_new_tokens=5, past_key_values=policy.new_cache(model))
    model.model.language_model.set_attn_implementation(before)
    assert torch.equal(found, wanted)


def test_several_methods_and_their_order() -> None:
    model = model_of("llava")
    policy = TokenPolicy.make(["fastv:keep=0.2", "divprune:keep=0.5"], model)
    assert [stage.at.kind for _, stage in policy.stages()] == ["input", "layer"]
    inputs, _ = batch(model)
    with policy.attach(model) as attached, torch.no_grad():
        model(**inputs)
    assert [len(plan.keep) for _, plan in attached.traces[0].cuts] == [18, 7]


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["divprune", "visionzip"], "cut at the same place"),
        (["divprune", "divprune:keep=0.5"], "given twice"),
        (["divprune", "fastv:positions=compact"], "disagree about `positions`"),
        ("snapkv", "cuts no tokens"),
        ("divprune:keep=2", "between 0 and 1"),
        ([], "needs a method"),
    ],
)
def test_what_makes_no_policy(specs: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        TokenPolicy.make(specs, model_of("llava"))


def test_a_share_that_leaves_nothing() -> None:
    model = model_of("llava")
    inputs, _ = batch(model)
    with TokenPolicy.make("divprune:keep=0.001", model).attach(model), torch.no_grad():
        with pytest.raises(UsageError, match="leaves none of an image's 36 tokens") as caught:
            model(**inputs)
        assert "keep at least 0.0139" in caught.value.hint


def test_one_policy_at_a_time_and_no_labels() -> None:
    model = model_of("llava")
    inputs, _ = batch(model)
    with TokenPolicy.make("divprune", model).attach(model):
        with pytest.raises(UsageError, match="already"):
            TokenPolicy.make("grid", model).attach(model)
        with pytest.raises(UsageError, match="`labels` do not fit"):
            model(**inputs, labels=inputs["input_ids"])
    assert model.token_policy is None
    assert shape_of(model).layers == 5


@pytest.mark.parametrize("padding", [False, True])
def test_a_policy_over_the_text_of_a_prompt(padding: bool) -> None:
    model, inputs = llama(), prompts(padding)
    with TokenPolicy.make("promptdistill:keep=0.5,layer=2", model).attach(model) as attached, torch.no_grad():
        found = model(**inputs).logits[:, -1]
        left = attached.left
    wanted = masked_logits(model, inputs, left)[:, -1]
    assert [len(row) for row in left[0]] == [24, 19 if padding else 24]
    assert [len(row) for row in left[3]] == [13, 10 if padding else 13]
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


def test_policies_for_images_and_for_text_are_told_apart() -> None:
    with pytest.raises(UsageError, match="takes no images"):
        TokenPolicy.make("divprune", llama())
    with pytest.raises(UsageError, match="reads only text"):
        TokenPolicy.make("promptdistill", model_of("llava"))
