"""Token policies in artifacts: what stands there, what a loaded model does with it, and what is refused."""

import json

import pytest
import torch
import transformers

import tcw
from tcw import pipeline, recipe
from tcw.calibration import Settings
from tcw.errors import FormatError, UsageError
from tcw.source import open_source
from tcw.tokens.engine import TokenPolicy
from tcw.tokens.inputs import Sample, vlm_inputs
from tests.tokens.models import SIDE, VLMS


def picture(seed=0):
    return torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def asked(model, seed=0):
    return vlm_inputs(model, [Sample([[5, 6], picture(seed), [7, 8, 9, 10]])])


def generated(model, **more):
    return model.generate(**asked(model), max_new_tokens=6, do_sample=False, **more)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm") / "source"
    VLMS["llava"]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures to calibrate on, as PNG files."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for n in range(4):
        pixels = np.random.default_rng(n).integers(0, 255, (60, 80, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return folder


def compressed(source, out, *specs, **settings):
    pipeline.compress(open_source(str(source)), recipe.from_specs(list(specs)), out, calibration=Settings(**settings))
    return out


def manifest_of(out):
    return json.loads((out / "tcw.json").read_text())


@pytest.fixture(scope="module")
def dymu(saved, pictures, tmp_path_factory):
    return compressed(saved, tmp_path_factory.mktemp("dymu") / "a", "dymu:keep=0.5", images=pictures)


@pytest.fixture
def fresh(dymu, tmp_path):
    """A copy of an artifact with something learned, to be damaged."""
    import shutil

    return shutil.copytree(dymu, tmp_path / "copy")


@pytest.mark.parametrize("spec", ["visionzip:keep=0.3", "fastv:keep=0.3", "tome:keep=0.5", "tokens.random:seed=3"])
def test_a_loaded_model_works_under_its_policy(saved, tmp_path, spec):
    out = compressed(saved, tmp_path / "a", spec)
    plain = tcw.load(str(saved))
    expected_whole = generated(plain)
    with TokenPolicy.make(spec, plain).attach(plain):
        expected, logits = generated(plain), plain(**asked(plain)).logits
    for load in (tcw.load, transformers.LlavaForConditionalGeneration.from_pretrained):
        model = load(str(out))
        assert torch.equal(generated(model), expected)
        assert torch.equal(model(**asked(model)).logits, logits)
        assert logits.shape[1] < asked(model)["input_ids"].shape[1]
        assert model.token_policy.methods.keys() == {spec.partition(":")[0].removeprefix("tokens.")}
        model.token_attached.detach()
        assert torch.equal(generated(model), expected_whole)


def test_the_artifact_says_what_it_does(saved, tmp_path):
    out = compressed(saved, tmp_path / "a", "dfloat11", "tokens.random:keep=0.5")
    manifest = manifest_of(out)
    (entry,) = manifest["policies"]
    assert (entry["family"], entry["method"], entry["tensors"]) == ("tokens", "random", [])
    assert entry["params"] == {"keep": 0.5, "positions": "keep", "at": "input", "depth": 0.5, "seed": 0}
    assert manifest["format"] == "1.3"
    assert manifest["recipe"]["method"][1]["use"] == "tokens.random"
    assert not (out / "policies").exists()
    again = compressed(out, tmp_path / "b", "dfloat11")
    assert manifest_of(again)["policies"] == []


def test_what_was_learned_is_stored_and_found_again(saved, dymu, pictures):
    from safetensors.torch import load_file

    from tcw.calibration import images
    from tcw.tokens.shape import tower_of

    (entry,) = manifest_of(dymu)["policies"]
    stored = load_file(dymu / "policies" / "tokens.safetensors")
    assert sorted(stored) == [f"dymu.{name}" for name in entry["tensors"]]
    assert len(entry["fingerprint"]) == 64
    model = tcw.load(str(saved))
    ready = images.prepared(images.read_images(pictures), saved, tower_of(model).config)
    made = TokenPolicy.make("dymu:keep=0.5", model, images=ready)
    for name, tensor in made.learned["dymu"].items():
        assert torch.equal(stored[f"dymu.{name}"], tensor)
    with made.attach(model):
        expected = model(**asked(model)).logits
    assert torch.equal(tcw.load(str(dymu))(**asked(model)).logits, expected)


def test_several_policies_and_families(saved, tmp_path):
    out = compressed(saved, tmp_path / "a", "divprune:keep=0.5", "fastv:keep=0.2", "streaming-llm:tokens=40")
    assert [(e["family"], e["method"]) for e in manifest_of(out)["policies"]] == [
        ("kv", "streaming-llm"), ("tokens", "divprune"), ("tokens", "fastv"),
    ]  # fmt: skip
    model = tcw.load(str(out))
    made = model.generate(**asked(model), max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
    assert made.sequences.shape[1] == asked(model)["input_ids"].shape[1] + 40
    held = [len(layer.groups[0]) for layer in made.past_key_values.policy_layers]
    left = model.token_attached.left
    assert [len(rows[0]) for rows in left.values()] == [42 - 18, 42 - 36 + 7]
    assert max(held) < 24 + 40, "the KV policy forgets as well"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entry: entry.update(fingerprint="0" * 64), "another model"),
        (lambda entry: entry.update(method="knorm", params={}, tensors=[]), "not a token policy"),
        (lambda entry: entry.update(method=7), "no valid"),
        (lambda entry: entry.update(tensors=[]), "lacks its tensors"),
        (lambda entry: entry.update(tensors=["a"]), "does not hold"),
        (lambda entry: entry.update(tensors="centre"), "no valid"),
        (lambda entry: entry["params"].update(keep=7.0), "between 0 and 1"),
        (lambda entry: entry.update(family="prompt", method="truncate", params={}, tensors=[]), "cuts no tokens"),
    ],
)
def test_a_policy_that_was_tampered_with_is_refused(fresh, change, message):
    manifest = manifest_of(fresh)
    change(manifest["policies"][0])
    (fresh / "tcw.json").write_text(json.dumps(manifest))
    with pytest.raises((UsageError, FormatError), match=message):
        tcw.load(str(fresh))


def test_an_entry_that_stands_twice_is_refused(fresh):
    manifest = manifest_of(fresh)
    manifest["policies"] *= 2
    (fresh / "tcw.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="stands there twice"):
        tcw.load(str(fresh))


def test_a_damaged_file_is_refused(fresh):
    path = fresh / "policies" / "tokens.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(FormatError, match="cannot be read"):
        tcw.load(str(fresh))


def test_what_is_no_number_is_refused(fresh):
    from safetensors.torch import load_file, save_file

    path = fresh / "policies" / "tokens.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path)
    manifest = manifest_of(fresh)
    manifest["files"]["policies/tokens.safetensors"]["bytes"] = path.stat().st_size
    (fresh / "tcw.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="not finite"):
        tcw.load(str(fresh))


def test_the_manifest_is_as_the_schema_says(dymu):
    from pathlib import Path

    import jsonschema

    schema = json.loads((Path(__file__).resolve().parents[2] / "docs" / "format.schema.json").read_text())
    manifest = manifest_of(dymu)
    jsonschema.validate(manifest, schema)
    manifest["policies"][0]["family"] = "weights"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schema)


def test_export_leaves_it_behind(saved, tmp_path):
    from tcw.export import export

    out = compressed(saved, tmp_path / "a", "dfloat11", "divprune", "snapkv")
    notes = export(open_source(str(out)), "hf", tmp_path / "b").notes
    assert [note.partition(" stays")[0] for note in notes] == ["the KV policy", "the token policy"]
