"""What `--to dfloat11` writes, read by the rules of the official loader, and by its own code where the package is."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tcw import export
from tcw.errors import SourceError, UsageError
from tcw.export.patterns import Unit, find_units, pattern_dict
from tcw.safetensors_file import read_header, read_slot
from tcw.source import open_source
from tcw.sources.skeleton import of_folder

PARTS = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps", "split_positions")
DATA = Path(__file__).parents[1] / "data"


def by_path(name: str):
    spec = importlib.util.spec_from_file_location(name, DATA / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = by_path("df11_reference")

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MODELS = {
    "llama": {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": False, "rope_theta": 123.0},
    "llama tied": {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt_neox": SMALL,
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 8},
    "phi": SMALL,
    "opt": {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64, "tie_word_embeddings": False},
    "bloom": {"vocab_size": 96, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "mixtral": {**SMALL, "num_key_value_heads": 2, "num_local_experts": 11, "tie_word_embeddings": False},
    "qwen3_moe": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 40, "num_experts": 4,
                  "mlp_only_layers": [1], "tie_word_embeddings": False},
    "qwen3_next": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 40, "num_experts": 4,
                   "shared_expert_intermediate_size": 24, "num_hidden_layers": 4, "linear_num_value_heads": 4,
                   "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "bert": {**SMALL, "max_position_embeddings": 64},
    "t5": {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
AUTO = {"bert": transformers.AutoModelForMaskedLM, "t5": transformers.AutoModelForSeq2SeqLM}


def enlarge(model):
    """Weights that tell positions and tokens apart, with infinitely many bits of everything."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            kind = name.split()[0]
            config = transformers.AutoConfig.for_model(kind, **SPECIAL, **MODELS[name])
            model = AUTO.get(kind, transformers.AutoModelForCausalLM).from_config(config, dtype=torch.bfloat16)
            made[name] = tmp_path_factory.mktemp("df11") / kind
            enlarge(model).save_pretrained(made[name])
        return made[name]

    return make


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor in every safetensors file, as the official loader looks for them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, slot in read_header(file).tensors.items():
            assert name not in found
            found[name] = read_slot(file, slot)
    return found


def load_by_the_rules(folder: Path) -> dict[str, bytes]:
    """The weights that the official loader sees: tensor name -> bytes."""
    tensors = stored(folder)
    patterns = json.loads((folder / "config.json").read_text())["dfloat11_config"]["pattern_dict"]
    groups = [name.removesuffix(".encoded_exponent") for name in tensors if name.endswith(".encoded_exponent")]
    seen: dict[str, bytes] = {}
    for group in groups:
        part = {p: tensors.pop(f"{group}.{p}") for p in PARTS}
        (paths,) = [paths for pattern, paths in patterns.items() if re.fullmatch(pattern, group)]
        positions = part["output_positions"].view("<u4")
        words = reference.decode(
            part["luts"].reshape(-1, 256), part["encoded_exponent"], part["sign_mantissa"], positions, part["gaps"]
        )
        pieces = np.split(words, part["split_positions"].view("<i8"))
        names = [f"{group}.{path}.weight" for path in paths] or [f"{group}.weight"]
        assert len(names) == len(pieces)
        for name, piece in zip(names, pieces, strict=True):
            assert name not in seen
            seen[name] = piece.tobytes()
    assert groups
    return seen | {name: data.tobytes() for name, data in tensors.items()}


@pytest.mark.parametrize("files", ["one", "group"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loader_finds_every_weight_again(models, tmp_path, name, files):
    source = open_source(models(name))
    export.export(source, f"dfloat11:files={files}", tmp_path / "out")
    loaded = load_by_the_rules(tmp_path / "out")
    assert loaded == {key: source.read(key).data.tobytes() for key in source.tensors()}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1 or files == "group"


PATTERNS = {
    "llama": {
        r"model\.embed_tokens": [],
        r"model\.layers\.\d+": [
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        ],
        "lm_head": [],
    },
    "qwen3_moe": {
        r"model\.embed_tokens": [],
        r"model\.layers\.(?:0|2)": [
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            *(f"mlp.experts.{e}.{m}_proj" for e in range(4) for m in ("down", "gate", "up")),
        ],
        r"model\.layers\.1": [
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        ],
        "lm_head": [],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_are_found(models, tmp_path, name):
    export.export(open_source(models(name)), "dfloat11", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["dfloat11_config"]
    assert config["pattern_dict"] == PATTERNS[name]
    assert (config["version"], config["threads_per_block"], config["bytes_per_thread"]) == ("0.5.0", [512], 8)


def test_experts_are_in_their_numbers_order(models):
    source = open_source(models("mixtral"))
    units, raw = find_units(source.tensors().values(), of_folder(source.path, source.id))
    (block,) = [u for u in units if u.module == "model.layers.1"]
    experts = [int(p.split(".")[2]) for p in block.paths if ".experts." in p]
    assert experts == sorted(experts)
    assert max(experts) == 10
    assert all("block_sparse_moe.gate" in name for name in raw)  # a router is no Linear module


def test_tied_weights_stay_where_the_loader_shares_them(models, tmp_path):
    kept = export.export(open_source(models("llama tied")), "dfloat11", tmp_path / "out").kept
    assert list(kept) == ["model.embed_tokens.weight"]
    assert kept["model.embed_tokens.weight"].startswith("tied weights")
    assert "model.embed_tokens.weight" in stored(tmp_path / "out")


def test_matrices_of_another_shape_than_the_config_says_stay_raw(models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 95}))
    (tmp_path / "out").mkdir()
    report = export.get("dfloat11").write(open_source(folder), tmp_path / "out")
    assert report["lm_head.weight"] == "the config gives it another shape"


def test_uncodable_groups_stay_raw_and_are_reported(models, tmp_path):
    folder = tmp_path / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.inf
        model.lm_head.weight.zero_()
        model.lm_head.weight[0, 0] = 1
    model.save_pretrained(folder)
    notes: list[str] = []
    (tmp_path / "out").mkdir()
    report = export.get("dfloat11").write(open_source(folder), tmp_path / "out", lambda p: notes.append(p.note))
    assert len(report) == 7
    assert report["model.layers.1.self_attn.q_proj.weight"] == "1 weights have an exponent of 240 or more"
    assert "`model.layers.1` stays as it is: 1 weights have an exponent of 240 or more" in notes
    patterns = json.loads((tmp_path / "out" / "config.json").read_text())["dfloat11_config"]["pattern_dict"]
    assert r"model\.layers\.(?:0|2)" in patterns
    source = open_source(folder)
    assert load_by_the_rules(tmp_path / "out") == {k: source.read(k).data.tobytes() for k in source.tensors()}


def test_a_name_that_needs_escaping_is_matched_exactly():
    units = [Unit(f"a-b.blocks.{k}.0", ("x",), ("t",)) for k in range(2)] + [Unit("aXb", (), ("t",))]
    patterns = pattern_dict(units, units)
    assert [p for p in patterns if re.fullmatch(p, "a-b.blocks.0.0")] == [r"a\-b\.blocks\.0\.\d+"]
    assert not [p for p in patterns if re.fullmatch(p, "a-bXblocksX0X0")]


def test_other_dtypes_are_refused(models, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float16)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SourceError, match=r"holds BF16 only, and `model.embed_tokens.weight` of `model` is F16") as e:
        export.export(open_source(tmp_path / "model"), "dfloat11", tmp_path / "out")
    assert "bfloat16" in e.value.hint
    assert not (tmp_path / "out").exists()


def gpt2(folder: Path, positions: int) -> Path:
    """Its matrices are not in Linear modules, which the loader cannot decode into; its positions are an Embedding."""
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=positions, **SPECIAL)
    transformers.GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_other_kinds_of_modules_stay_raw(tmp_path):
    export.export(open_source(gpt2(tmp_path / "gpt2", 512)), "dfloat11", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dfloat11_config"]["pattern_dict"] == {r"transformer\.wpe": []}


def test_a_model_of_which_nothing_can_be_coded_is_refused(tmp_path):
    with pytest.raises(SourceError, match="nothing in `gpt2` can be coded in the DFloat11 layout: tied weights"):
        export.export(open_source(gpt2(tmp_path / "gpt2", 16)), "dfloat11", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_architecture_is_refused(models, tmp_path):
    source = open_source(models("llama"))
    folder = tmp_path / "odd"
    shutil.copytree(source.path, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-thing"}))
    with pytest.raises(SourceError, match="transformers cannot make the model of `odd`"):
        export.export(open_source(folder), "dfloat11", tmp_path / "out")


def test_unknown_file_layout_is_refused(models, tmp_path):
    with pytest.raises(UsageError, match="`files` cannot be `many`"):
        export.export(open_source(models("llama")), "dfloat11:files=many", tmp_path / "out")


def test_names_without_the_base_models_prefix_get_it(models, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(models("bloom"), dtype=torch.bfloat16)
    model.transformer.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"architectures": ["BloomForCausalLM"]}))
    source = open_source(tmp_path / "model")
    assert "h.0.mlp.dense_h_to_4h.weight" in source.tensors()
    export.export(source, "dfloat11", tmp_path / "out")
    assert all(name.startswith("transformer.") for name in stored(tmp_path / "out"))


def test_rotary_parameters_are_said_for_both_generations(models, tmp_path):
    export.export(open_source(models("llama")), "dfloat11", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 123.0
    before, after = (transformers.AutoConfig.from_pretrained(p) for p in (models("llama"), tmp_path / "out"))
    assert after.rope_parameters == before.rope_parameters


# ---- the official loader's own code


@pytest.fixture(scope="module")
def official():
    if importlib.util.find_spec("dfloat11") is None or importlib.util.find_spec("dahuffman") is None:
        pytest.skip("the packages dfloat11 and dahuffman are not installed")
    return by_path("df11_official").import_official(reference)


@pytest.mark.parametrize("files", ["one", "group"])
@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt_neox", "gemma2", "phi", "opt", "bloom", "bert"])
def test_the_official_loader_runs_the_model(official, models, tmp_path, name, files):
    auto = AUTO.get(name, transformers.AutoModelForCausalLM)
    export.export(open_source(models(name)), f"dfloat11:files={files}", tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    model = auto.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    if name == "gpt_neox":
        model.embed_out = model.lm_head  # its name in transformers 4, on which dfloat11 0.5.0 runs, and in checkpoints
    model = official.load_and_replace_tensors(model.eval(), str(tmp_path / "out"), config.dfloat11_config)
    original = auto.from_pretrained(models(name), dtype=torch.bfloat16).eval()
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, original(tokens).logits)
