"""Policies: what goes together, what a model is refused for, plans that are what happens, and artifacts."""

import json

import pytest
import torch
import transformers

import tcw
from tcw import methods, pipeline, recipe
from tcw.errors import FormatError, UsageError
from tcw.kv.policy import Policy
from tcw.kv.shapes import shapes_of, shapes_of_config
from tcw.source import open_source
from tests.kv.conftest import WORDS, text

COMBINED = ("snapkv:ratio=0.5", "kivi:bits=4")


@pytest.mark.parametrize("spec", methods.names("kv"))
def test_a_plan_is_what_happens(llama, spec):
    policy = Policy.make(spec, llama, tokens=text(160, seed=7))
    plan = policy.plan(200)
    cache = policy.new_cache(llama)
    with torch.no_grad():
        llama(text(200), past_key_values=cache)
    held = cache.nbytes()
    assert held <= plan.bytes if plan.bounded else held == plan.bytes
    assert plan.dense_bytes == 2 * 4 * 2 * 200 * 16 * 4
    rows = [row for layer in cache.policy_layers for row in layer.groups]
    if not plan.bounded:
        assert [len(group) for group in rows] == [row.tokens for row in plan.rows]


@pytest.mark.parametrize("spec", methods.names("kv"))
def test_a_plan_needs_no_calibration(llama, spec):
    made = Policy.make(spec, llama, tokens=text(160, seed=7)).plan(300, batch=2)
    config = transformers.AutoConfig.for_model(**llama.config.to_dict())
    planned = Policy({spec: methods.build(spec, {})}, shapes_of_config(config, torch.float32)).plan(300, batch=2)
    assert planned.bytes == pytest.approx(made.bytes, rel=0.15)
    assert planned.shared_bytes >= made.shared_bytes


def test_eviction_and_quantisation_combine(llama):
    alone = {spec: Policy.make(spec, llama).plan(400).ratio for spec in COMBINED}
    both = Policy.make(COMBINED, llama)
    assert both.plan(400).ratio < 0.75 * min(alone.values())
    cache = both.new_cache(llama)
    out = llama.generate(text(400), max_new_tokens=50, do_sample=False, past_key_values=cache)
    assert out.shape[1] == 450
    assert {type(g.store).__name__ for layer in cache.policy_layers for g in layer.groups} != {"DenseStore"}


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["snapkv", "knorm"], "both decide how many tokens stay"),
        (["kivi", "zipcache"], "both decide how tokens are stored"),
        (["knorm", "knorm"], "given twice"),
        (["dfloat11"], "not a KV policy"),
        ([], "needs a method"),
        (["knorm:tokens=20"], "no room"),
        (["knorm:ratio=0.5,tokens=200"], "one budget"),
        (["knorm:ratio=1.5"], "between 0 and 1"),
        (["knorm:bytes=1kB"], "no room"),
        (["knorm:bytes=much"], "size"),
        (["knorm:window=0"], "window"),
    ],
)
def test_what_does_not_go_together_is_refused(llama, specs, message):
    with pytest.raises(UsageError, match=message):
        Policy.make(specs, llama)


def config(kind: str, **settings):
    base = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": WORDS}
    return transformers.AutoConfig.for_model(kind, **{**base, **settings})


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("deepseek_v3", {"kv_lora_rank": 16}, "MLA"),
        ("t5", {}, "encoder and a decoder"),
        ("mistral", {"sliding_window": 16}, "no layer with a full KV cache"),
        ("gemma3n_text", {"num_kv_shared_layers": 2, "num_hidden_layers": 5}, "share keys"),
    ],
)
def test_models_that_policies_would_spoil_are_refused(kind, settings, message):
    with pytest.raises(UsageError, match=message):
        shapes_of_config(config(kind, **settings))


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rope_that_changes_with_length(rope):
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    made = transformers.LlamaForCausalLM(
        config("llama", rope_parameters=parameters, intermediate_size=64, max_position_embeddings=128)
    )
    assert shapes_of(made)[0].rope is None
    Policy.make("knorm", made)
    for spec in ("streaming-llm", "triattention", "lacache"):
        with pytest.raises(UsageError, match="changes with the length"):
            Policy.make(spec, made, tokens=text(40))
        with pytest.raises(UsageError, match="changes with the length"):
            Policy({spec: methods.build(spec, {})}, shapes_of_config(made.config))


def test_another_model_is_refused(llama, architecture):
    policy = Policy.make("knorm", llama)
    with pytest.raises(UsageError, match="another model"):
        policy.new_cache(architecture("Qwen3"))


def test_a_method_without_its_text_is_refused(llama):
    with pytest.raises(UsageError, match="calibrated on a text"):
        Policy.make("triattention", llama)
    Policy.make("razorattention", llama)  # which draws its own tokens
    with pytest.raises(UsageError, match="calibrated on a text"):
        Policy.make("razorattention:score=triattention", llama)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, word_tokenizer):
    from tests.kv.conftest import make

    folder = tmp_path_factory.mktemp("source")
    make("Llama").save_pretrained(folder)
    word_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def word_tokenizer():
    def write(folder):
        from tokenizers import Tokenizer, models, pre_tokenizers

        vocabulary = {chr(32 + i): i for i in range(WORDS - 1)} | {"[UNK]": WORDS - 1}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)

    return write


def compressed(source, out, *specs: str):
    pipeline.compress(open_source(str(source)), recipe.from_specs(list(specs)), out)
    return out


def test_an_artifact_generates_under_its_policy(saved, tmp_path):
    from tcw.calibration import Settings

    out = tmp_path / "both"
    chosen = recipe.from_specs(["dfloat11", "triattention:tokens=60", "kivi:bits=4"])
    pipeline.compress(open_source(str(saved)), chosen, out, calibration=Settings(samples=2, length=64))
    prompt = text(150)
    expected = None
    for load in (tcw.load, transformers.AutoModelForCausalLM.from_pretrained):
        model = load(str(out))
        made = model.generate(prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        cache = made.past_key_values
        assert all(len(layer.groups[0]) < 60 + 32 for layer in cache.policy_layers)
        assert list(model.kv_policy.methods) == ["triattention", "kivi"]
        expected = made.sequences if expected is None else expected
        assert torch.equal(made.sequences, expected)
        explicit = model.kv_policy.new_cache(model)
        assert torch.equal(
            model.generate(prompt, max_new_tokens=8, do_sample=False, past_key_values=explicit), expected
        )
    with pytest.raises(UsageError, match="cut back"):
        model.generate(prompt, max_new_tokens=4, assistant_model=model)


def test_the_artifact_says_what_it_does(saved, tmp_path):
    out = compressed(saved, tmp_path / "a", "dfloat11", "knorm:ratio=0.25")
    manifest = json.loads((out / "tcw.json").read_text())
    (entry,) = manifest["policies"]
    assert (entry["family"], entry["method"], entry["params"]["ratio"], entry["tensors"]) == ("kv", "knorm", 0.25, [])
    again = compressed(out, tmp_path / "b", "dfloat11")
    assert json.loads((again / "tcw.json").read_text())["policies"] == []
    assert not (again / "policies").exists()


def calibrated(saved, out):
    from tcw.calibration import Settings

    chosen = recipe.from_specs(["triattention:ratio=0.5"])
    pipeline.compress(open_source(str(saved)), chosen, out, calibration=Settings(samples=2, length=64))
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(fingerprint="0" * 64), "another model"),
        (lambda entry: entry.update(method="dfloat11", params={}), "not a KV policy"),
        (lambda entry: entry.update(method=7), "no valid"),
        (lambda entry: entry.update(tensors=[]), "lacks its tensors"),
        (lambda entry: entry.update(tensors=["a"]), "does not hold"),
        (lambda entry: entry.update(tensors="centre"), "no valid"),
        (lambda entry: entry["params"].update(ratio=7.0), "between 0 and 1"),
    ],
)
def test_a_policy_that_was_tampered_with_is_refused(saved, tmp_path, change, message):
    out = calibrated(saved, tmp_path / "a")
    manifest = json.loads((out / "tcw.json").read_text())
    change(manifest["policies"][0])
    (out / "tcw.json").write_text(json.dumps(manifest))
    with pytest.raises((UsageError, FormatError), match=message):
        tcw.load(str(out))


def test_a_damaged_file_of_measurements_is_refused(saved, tmp_path):
    out = calibrated(saved, tmp_path / "a")
    path = out / "policies" / "kv.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(FormatError, match="cannot be read"):
        tcw.load(str(out))


@pytest.mark.parametrize("specs", [["snapkv", "knorm"], ["knorm:tokens=3"]])
def test_nothing_is_written_for_a_policy_that_cannot_be(saved, tmp_path, specs):
    with pytest.raises(UsageError):
        compressed(saved, tmp_path / "a", "dfloat11", *specs)
    assert not list(tmp_path.iterdir())


def test_a_kv_policy_takes_no_tensors(saved, tmp_path):
    table = {"method": [{"use": "knorm", "only": ["*.k_proj"]}]}
    with pytest.raises(UsageError, match="no tensors"):
        pipeline.compress(open_source(str(saved)), recipe.from_table("x", table), tmp_path / "a")
