"""Rotated models compute what they did, in every architecture; what cannot be rotated is refused with the reason."""

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tcw import pipeline, recipe
from tcw.artifact import Artifact
from tcw.calibration._hadamard import Rotation, _order, _spans
from tcw.calibration._residual import EMBEDDING, HEAD
from tcw.calibration.rotation import CannotRotate, RotatedSource, verify_rotation
from tcw.errors import FormatError, SourceError, UsageError
from tcw.source import Source, open_source
from tcw.tensor import TensorData, TensorInfo

WIDTHS = (
    64,
    80,
    96,
    128,
    256,
    320,
    576,
    768,
    896,
    960,
    1024,
    1152,
    1536,
    1600,
    2048,
    2304,
    2560,
    3072,
    3584,
    4096,
    5120,
)
SIZES = {
    "vocab_size": 130, "hidden_size": 96, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"moe_intermediate_size": 40, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("Llama", {"head_dim": 40, "hidden_size": 80, "num_key_value_heads": 1}),
    "llama, odd width": ("Llama", {"hidden_size": 84, "head_dim": 10, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "ministral": ("Ministral", {"head_dim": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "attention_bias": True}),
    "phi3": ("Phi3", {}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0}),
    "mixtral": ("Mixtral", MOE),
    "qwen2_moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 56}),
    "qwen3_moe": ("Qwen3Moe", MOE | {"head_dim": 24, "mlp_only_layers": [1]}),
}
IDS = torch.arange(20)[None] * 37 % 128


def randomise(model: Any, seed: int = 0) -> None:
    """Give weights a size at which all parts matter, norms of their own and biases that are not zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if "norm" in name:
                parameter.add_(0.4 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def built(folder: Path, family: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    randomise(model)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each architecture that is rotated, tiny."""
    return built(tmp_path_factory.mktemp("model") / "m", *MODELS[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A tied BF16 Llama with grouped queries."""
    folder = tmp_path_factory.mktemp("llama") / "m"
    return open_source(built(folder, "Llama", {"tie_word_embeddings": True}, torch.bfloat16))


def loaded(source: Source) -> Any:
    """The model of a source, float32, by transformers' own loader."""
    table = copy.deepcopy(source.config)
    config = transformers.AutoConfig.for_model(table.pop("model_type"), **table)
    state = {n: torch.from_numpy(source.read(n).floats()) for n in source.tensors()}
    cls = getattr(transformers, source.config["architectures"][0])
    return cls.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()


def logits(source: Source, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return loaded(source)(input_ids=ids).logits[0]


def matrix(size: int) -> np.ndarray:
    return Rotation(size, "0 residual").turn(np.eye(size))


@pytest.mark.parametrize(
    "size", [n for n in WIDTHS if n <= 1024] + [1, 2, 3, 6, 10, 12, 28, 36, 44, 60, 76, 84, 92, 100]
)
def test_rotations_are_orthogonal(size: int) -> None:
    R = matrix(size)
    np.testing.assert_allclose(R @ R.T, np.eye(size), atol=1e-13)
    if _order(size):
        np.testing.assert_allclose(np.abs(R), size**-0.5, rtol=1e-12)


@pytest.mark.parametrize("size", [*WIDTHS, 6144, 6656, 7168, 8192, 14336])
def test_widths_of_real_models_have_a_hadamard_matrix(size: int) -> None:
    """Entries ±1/√n and rows that keep their products make it one."""
    assert _spans(size) == ((0, size),)
    rows = np.random.default_rng(0).standard_normal((8, size))
    rows[0] = np.arange(size) == size // 3
    turned = Rotation(size, "7 residual").turn(rows)
    np.testing.assert_allclose(turned @ turned.T, rows @ rows.T, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(np.abs(turned[0]), size**-0.5, rtol=1e-12)


def test_rotations_follow_from_size_and_key_for_ever() -> None:
    """Artifacts store the seed only: these signs must never change."""
    assert (Rotation(12, "0 residual").turn(np.eye(12))[:, 0] > 0).astype(int).tolist() == [
        0,
        1,
        0,
        0,
        1,
        1,
        1,
        1,
        1,
        0,
        0,
        0,
    ]
    assert np.array_equal(matrix(36), matrix(36))
    assert not np.array_equal(matrix(36), Rotation(36, "1 residual").turn(np.eye(36)))


def test_logits_stay_as_they_were(model: Path) -> None:
    source = open_source(model)
    rotated = RotatedSource(source, seed=3)
    before, after = logits(source), logits(rotated)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    changed = [n for n in source.tensors() if n.endswith("proj.weight") or "experts" in n]
    assert all(not np.array_equal(source.read(n).floats(), rotated.read(n).floats()) for n in changed)


def test_every_norm_becomes_one(model: Path) -> None:
    rotated = RotatedSource(open_source(model))
    one = 0.0 if rotated.config["model_type"] == "gemma" else 1.0
    norms = [n for n in rotated.tensors() if n.endswith("norm.weight") and "_norm" not in n]
    assert len(norms) == 5
    assert all((rotated.read(n).floats() == one).all() for n in norms)


def test_verify_rotation_measures_the_change(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(model)
    rotated = RotatedSource(source)
    assert 0 < verify_rotation(source, rotated) < 1e-4
    assert 0 < verify_rotation(source, rotated, max_bytes=1) < 1e-4
    right = RotatedSource._in_heads
    monkeypatch.setattr(RotatedSource, "_in_heads", lambda self, values: right(self, values)[:, ::-1])
    with pytest.raises(CannotRotate, match="the logits of `m` change by"):
        verify_rotation(source, rotated)


def test_verify_rotation_is_not_misled_by_rounding(llama: Source) -> None:
    assert verify_rotation(llama, RotatedSource(llama)) < 1e-4


def dense(source: Source, rotated: RotatedSource, name: str) -> np.ndarray:
    """The slow way: float64 matrices as the papers write them."""
    R1, R2 = (Rotation(n, f"{rotated.seed} {key}").turn(np.eye(n)) for n, key in ((96, "residual"), (24, "head")))
    layer = name.rpartition(".self_attn.")[0]
    gamma = source.read(f"{layer}.input_layernorm.weight").floats().astype(np.float64)
    W = source.read(name).floats().astype(np.float64)
    if name.endswith("o_proj.weight"):
        return R1.T @ W @ np.kron(np.eye(4), R2)
    if name.endswith("v_proj.weight"):
        return np.kron(np.eye(2), R2).T @ W @ np.diag(gamma) @ R1
    return W @ np.diag(gamma) @ R1


@pytest.mark.parametrize("chunk", [1, 1000, 2**20])
@pytest.mark.parametrize("which", ["q", "v", "o"])
def test_tensors_are_the_papers_products_rounded_once(
    llama: Source, which: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tcw.calibration.rotation._CHUNK", chunk)
    rotated, name = RotatedSource(llama, seed=5), f"model.layers.1.self_attn.{which}_proj.weight"
    data = rotated.read(name)
    assert data.info == llama.tensors()[name]
    expected = TensorData.of_floats(data.info, dense(llama, rotated, name))
    assert np.array_equal(data.words, expected.words)


def test_it_is_a_source_like_any_other(llama: Source) -> None:
    rotated = RotatedSource(llama)
    assert list(rotated.tensors()) == [*llama.tensors(), HEAD]
    assert rotated.tensors()[HEAD] == TensorInfo(HEAD, "BF16", (130, 96))
    assert rotated.config == llama.config | {"tie_word_embeddings": False}
    assert llama.config["tie_word_embeddings"] is True
    assert (rotated.id, rotated.kind, rotated.path, rotated.revision) == (llama.id, "folder", llama.path, None)
    assert rotated.weight_files() == llama.weight_files()
    assert rotated.side_files() == llama.side_files()
    assert rotated.rewritten == set(rotated.tensors())
    assert (llama.transforms, rotated.transforms) == ((), (rotated.describe(),))
    twice = RotatedSource(rotated, seed=1)
    assert twice.transforms == (rotated.describe(), twice.describe())
    rotated.check_unchanged()
    with pytest.raises(SourceError, match=r"no tensor `model\.norm\.weigth`"):
        rotated.read("model.norm.weigth")


def test_what_does_not_change_is_passed_on(tmp_path: Path) -> None:
    source = open_source(built(tmp_path / "m", *MODELS["qwen3"]))
    rotated = RotatedSource(source)
    same = set(source.tensors()) - rotated.rewritten
    assert {n.split(".", 3)[3] for n in same} == {
        f"self_attn.{n}" for n in ("q_proj.bias", "k_proj.bias", "q_norm.weight", "k_norm.weight")
    }
    assert all(rotated.read(n).sha256() == source.read(n).sha256() for n in same)
    assert all(rotated.sample(n, 8).sha256() == source.sample(n, 8).sha256() for n in same)


def test_a_norm_that_is_one_and_a_bias_that_is_zero_are_not_rewritten(tmp_path: Path) -> None:
    norm, bias = "model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.o_proj.bias"
    source = edited(tmp_path / "m", **{norm: np.ones(96, np.float32), bias: np.zeros(96, np.float32)})
    rotated = RotatedSource(source)
    same = {n for n in source.tensors() if source.read(n).sha256() == rotated.read(n).sha256()}
    assert same == {norm, bias}
    assert rotated.rewritten == set(source.tensors()) - same


def test_samples_are_rows_of_the_rotated_tensor(llama: Source) -> None:
    rotated = RotatedSource(llama)
    words = rotated.read(EMBEDDING).words
    whole, some = rotated.sample(EMBEDDING, 1 << 20), rotated.sample(EMBEDDING, 2000)
    assert np.array_equal(whole.words, words)
    assert whole.info.shape == (130 * 96,)
    assert some.info.nbytes <= 2000
    assert np.array_equal(some.words, words.reshape(130, 96)[::13].reshape(-1)[:1000])


def test_it_pickles_and_threads_share_it(llama: Source) -> None:
    rotated = RotatedSource(llama, seed=9)
    names = list(rotated.tensors())
    hashes = [rotated.read(n).sha256() for n in names]
    again = pickle.loads(pickle.dumps(rotated))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda n: again.read(n).sha256(), names)) == hashes


def test_the_description_is_enough_to_do_it_again(llama: Source) -> None:
    rotated = RotatedSource(llama, seed=4)
    description = json.loads(json.dumps(rotated.describe()))
    assert description == {"kind": "hadamard", "seed": 4, "residual": 96, "head": 24}
    again = RotatedSource.from_description(llama, description)
    assert again.read(HEAD).sha256() == rotated.read(HEAD).sha256()


@pytest.mark.parametrize("change", [
    {"kind": "qr"}, {"kind": None}, {"seed": -1}, {"seed": "4"}, {"seed": True}, {"seed": 2**63}, {"seed": 0.0},
    {"residual": 64}, {"residual": 96.0}, {"head": 12}, {"head": None}, {"more": 1},
])  # fmt: skip
def test_other_descriptions_are_refused(llama: Source, change: dict) -> None:
    with pytest.raises(FormatError, match="rotation"):
        RotatedSource.from_description(llama, RotatedSource(llama).describe() | change)
    for wrong in (None, [], "hadamard", {}, {"kind": "hadamard"}, {"kind": "hadamard", "seed": 0}):
        with pytest.raises(FormatError, match="rotation"):
            RotatedSource.from_description(llama, wrong)


@pytest.mark.parametrize("seed", [-1, 2**63, True, "0", 1.0])
def test_impossible_seeds_are_refused(llama: Source, seed: Any) -> None:
    with pytest.raises(UsageError, match="a seed is"):
        RotatedSource(llama, seed)


def test_an_artifact_of_a_rotated_model(llama: Source, tmp_path: Path) -> None:
    """The pipeline takes it as it is; the artifact, itself a source, is the rotated model and can be rotated again."""
    rotated = RotatedSource(llama)
    out = pipeline.compress(rotated, recipe.load("lossless"), tmp_path / "out").artifact
    artifact = Artifact.open(out)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    for name in rotated.tensors():
        assert artifact.read(name).sha256() == rotated.read(name).sha256()
    twice = RotatedSource(artifact, seed=1)
    assert twice.kind == "artifact"
    assert verify_rotation(artifact, twice) < 1e-4
    before, after = logits(artifact), logits(RotatedSource(artifact, seed=1, single=True))
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_a_converted_gguf_model(smollm2: Path) -> None:
    rotated = RotatedSource(open_source("demo:smollm2"))
    name = "model.layers.7.self_attn.o_proj.weight"
    before, after = (np.linalg.norm(s.read(name).floats()) for s in (rotated.source, rotated))
    assert rotated.kind == "gguf"
    assert rotated.describe() == {"kind": "hadamard", "seed": 0, "residual": 576, "head": 64}
    assert after == pytest.approx(before, rel=1e-4)


REFUSED = {
    "Gemma2": ("norms what a block adds to the residual stream", {"head_dim": 24}),
    "Gemma3Text": ("norms what a block adds to the residual stream", {"head_dim": 24}),
    "Olmo2": ("norms what a block adds to the residual stream", {}),
    "GPT2": ("adds position embeddings", {"n_embd": 96, "n_head": 4, "n_layer": 1}),
    "OPT": ("adds position embeddings", {"ffn_dim": 64, "word_embed_proj_dim": 96}),
    "GPTNeoX": ("takes? the mean away", {}),
    "Phi": ("takes? the mean away", {}),
    "StableLm": ("takes? the mean away", {}),
    "Cohere": ("is not known to tcw", {}),
    "Mamba": ("is not known to tcw", {"hidden_size": 32, "state_size": 4}),
}


@pytest.mark.parametrize("family", REFUSED)
def test_other_architectures_are_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    reason, options = REFUSED[family]
    name = family.removesuffix("Text")
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    cls = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    getattr(transformers, cls)(config).save_pretrained(tmp_path)
    with pytest.raises(CannotRotate, match=reason):
        RotatedSource(open_source(tmp_path))


def edited(folder: Path, config: dict | None = None, **tensors: np.ndarray | None) -> Source:
    """A tiny Llama with entries of its config, or tensors, replaced, added or (None) left out."""
    from safetensors.numpy import load_file, save_file

    built(folder, "Llama", {})
    table = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(table))
    state = load_file(folder / "model.safetensors") | tensors
    save_file({n: v for n, v in state.items() if v is not None}, folder / "model.safetensors")
    return open_source(folder)


@pytest.mark.parametrize(("config", "tensors", "reason"), [
    ({"architectures": ["LlamaModel"]}, {}, "no output head"),
    ({"architectures": ["LlamaForSequenceClassification"]}, {"score.weight": np.ones((2, 96))}, "no output head"),
    ({}, {"score.weight": np.ones((2, 96), np.float32)}, r"what tensor `score\.weight` does"),
    ({}, {"model.layers.0.self_attn.x_proj.weight": np.ones((2, 96))}, "what tensor .*x_proj"),
    ({}, {HEAD: None}, r"no tensor `lm_head\.weight`"),
    ({}, {EMBEDDING: None}, r"no tensor `model\.embed_tokens\.weight`"),
    ({}, {"model.norm.weight": None}, r"no tensor `model\.norm\.weight`"),
    ({}, {"model.layers.1.input_layernorm.weight": None}, r"no tensor `model\.layers\.1\.input_layernorm\.weight`"),
    ({}, {HEAD: np.ones((130, 95), np.float32)}, r"`lm_head\.weight` is \[130, 95\]"),
    ({}, {"model.norm.weight": np.ones(1, np.float32)}, "which does not fit"),
    ({}, {"model.layers.0.self_attn.v_proj.weight": np.ones((30, 96), np.float32)}, "which does not fit"),
    ({}, {"model.layers.0.self_attn.o_proj.weight": np.ones(96, np.float32)}, "which does not fit"),
    ({}, {HEAD: np.ones((130, 96))}, "is F64; only BF16, F16 and F32"),
    ({"num_attention_heads": 7}, {}, "no valid `num_attention_heads`"),
    ({"num_attention_heads": None}, {}, "no valid `num_attention_heads`"),
    ({"model_type": None}, {}, "`None` model uses its residual stream is not known"),
    ({"quantization_config": {"quant_method": "gptq"}}, {}, "already quantised by gptq"),
])  # fmt: skip
def test_models_that_do_not_fit_are_refused(tmp_path: Path, config: dict, tensors: dict, reason: str) -> None:
    with pytest.raises(CannotRotate, match=reason) as caught:
        RotatedSource(edited(tmp_path / "m", config, **tensors))
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (type(copied), copied.message) == (CannotRotate, caught.value.message)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    source = edited(tmp_path / "m", **{name: np.full((72, 96), value, np.float32)})
    with pytest.raises(SourceError, match=r"`model\.layers\.0\.mlp\.up_proj\.weight` holds NaN or Inf"):
        RotatedSource(source).read(name)


def test_what_leaves_the_range_of_f16_is_named(tmp_path: Path) -> None:
    large = {HEAD: np.full((130, 96), 6e4, np.float16), "model.norm.weight": np.full(96, 6e4, np.float16)}
    with pytest.raises(SourceError, match="or does not fit into F16"):
        RotatedSource(edited(tmp_path / "m", **large)).read(HEAD)


@pytest.mark.slow
def test_a_real_model_in_bf16_hardly_changes(smollm2: Path) -> None:
    """KL(original || rotated and rounded to BF16), nats a token, over 128 tokens of prose."""
    from tcw.data import calibration_text

    source = open_source(smollm2)
    rotated = RotatedSource(source)
    text = transformers.AutoTokenizer.from_pretrained(smollm2)(calibration_text()[:2000])["input_ids"]
    ids = torch.tensor(text[:128])[None]
    p, q = (torch.log_softmax(logits(s, ids).double(), -1) for s in (source, rotated))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert 0 < kl < 0.002
    assert verify_rotation(source, rotated) < 1e-4
