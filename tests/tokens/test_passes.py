"""Token policies in recipes: what is refused before the work, and what a plan says."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tcw
from tcw import pipeline, recipe
from tcw.calibration import Settings
from tcw.errors import SourceError, UsageError
from tcw.source import open_source
from tests.tokens.models import TOWERS, VLMS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    VLMS["llava"]().save_pretrained(top / "llava")
    VLMS["qwen2_vl"]().save_pretrained(top / "qwen")
    TOWERS["dinov2"]().save_pretrained(top / "dinov2")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(top / "llama")
    return {path.name: open_source(str(path)) for path in top.iterdir()}


@pytest.mark.parametrize(
    ("model", "specs", "message"),
    [
        ("llama", ["visionzip"], "takes no images"),
        ("llama", ["llmlingua"], "compresses text, not a model"),
        ("llama", ["promptdistill", "tokens.random"], "does not go together"),
        ("llava", ["promptdistill"], "reads only text"),
        ("llava", ["divprune", "divprune:keep=0.5"], "given twice"),
        ("llava", ["divprune", "cdpruner"], "cut at the same place"),
        ("llava", ["divprune", "grid:positions=compact"], "disagree about"),
        ("llava", ["fastv:layer=40"], "layer 40"),
        ("dinov2", ["promptdistill"], "reads only text"),
    ],
)
def test_refused_before_anything_is_written(folders, tmp_path, model, specs, message):
    with pytest.raises(UsageError, match=message):
        pipeline.compress(folders[model], recipe.from_specs(["dfloat11", *specs]), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_token_policy_takes_no_tensors(folders, tmp_path):
    table = {"method": [{"use": "divprune", "skip": ["*.q_proj"]}]}
    with pytest.raises(UsageError, match="a token policy: it has no tensors"):
        pipeline.compress(folders["llava"], recipe.from_table("x", table), tmp_path / "a")


def test_pictures_are_asked_for_before_the_work(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("tcw.calibration.images.shipped", list)
    with pytest.raises(SourceError, match="no pictures were given"):
        pipeline.compress(folders["dinov2"], recipe.from_specs(["dymu"]), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_plan_says_what_is_left(folders):
    plan = pipeline.plan(folders["llava"], recipe.from_specs(["dfloat11", "divprune:keep=0.25"]))
    assert plan.kv is None
    assert (plan.tokens.kept, plan.tokens.visual, plan.tokens.known) == (9, 36, True)
    assert 0.3 < plan.tokens.flops_ratio < 0.9
    unknown = pipeline.plan(folders["qwen"], recipe.from_specs(["divprune:keep=0.25"])).tokens
    assert (unknown.kept, unknown.visual, unknown.known) == (256, 1024, False)


def test_a_report_says_it_too(folders, tmp_path):
    report = pipeline.compress(folders["dinov2"], recipe.from_specs(["tome:keep=0.5"]), tmp_path / "a")
    said = report.to_json()["tokens"]
    assert (said["kept"], said["visual"], said["what"], said["kv_ratio"]) == (18, 36, "patches", 1.0)


def test_a_tower_alone(folders, tmp_path):
    np.save(tmp_path / "p.npy", np.random.default_rng(0).integers(0, 255, (4, 50, 70, 3)).astype(np.uint8))
    settings = Settings(images=tmp_path / "p.npy")
    pipeline.compress(folders["dinov2"], recipe.from_specs(["dymu:keep=0.5"]), tmp_path / "a", calibration=settings)
    model = tcw.load(str(tmp_path / "a"))
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    hidden = model(pixel_values=pixels).last_hidden_state
    assert hidden.shape[1] < 37
    assert model.token_attached.read_out(hidden).shape == (2, 36, 32)


def test_a_text_policy_of_a_text_model(folders, tmp_path):
    pipeline.compress(folders["llama"], recipe.from_specs(["dfloat11", "promptdistill:keep=0.3"]), tmp_path / "a")
    model = tcw.load(str(tmp_path / "a"))
    ids = torch.randint(3, 120, (1, 60), generator=torch.Generator().manual_seed(0))
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert made.shape == (1, 65)
    counts = [len(rows[0]) for rows in model.token_attached.left.values()]
    assert counts == [60, 19], "0.3 of the 59 tokens before the last, and that one"
