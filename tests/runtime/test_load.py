import gc
import json
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import tcw
from tcw.errors import FormatError, SourceError, UnknownName, UsageError
from tcw.recipe import from_specs
from tcw.runtime import residency
from tcw.runtime.load import tokenizer
from tcw.runtime.packed import Packed

from .conftest import GENERATING, MODELS

ALL = sorted(MODELS)
ROUTES = ("from_pretrained", "bf16", "huffman")


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, so that NaN payloads and -0 count."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def load(animal: Any, route: str, **kwargs: Any) -> Any:
    if route == "from_pretrained":
        return animal.cls.from_pretrained(str(animal.artifact), **kwargs)
    return tcw.load(animal.artifact, residency=route, device="cpu", **kwargs)


def assert_same_state(found: Any, expected: Any) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        return model(**inputs).logits


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ALL)
def test_weights_and_logits_are_the_originals_bit_for_bit(zoo: Any, name: str, route: str) -> None:
    animal = zoo(name)
    plain, model = animal.plain(), load(animal, route)
    assert type(model) is type(plain)
    assert not model.training
    assert_same_state(model, plain)
    expected = logits(plain, animal.inputs())
    assert expected.float().std() > 0.01
    for _ in range(2):  # the second run finds what the first one left behind
        assert torch.equal(bits(logits(model, animal.inputs())), bits(expected))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", GENERATING)
def test_generates_the_originals_tokens(zoo: Any, name: str, route: str) -> None:
    animal = zoo(name)
    plain, model = animal.plain(), load(animal, route)
    ids = animal.inputs()["input_ids"]
    # a random model may say one word for ever; forbidden to, it says the likeliest of the others
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False, "no_repeat_ngram_size": 1}
    expected = plain.generate(ids, **how)
    assert len(set(expected[0, -6:].tolist())) > 2
    assert torch.equal(model.generate(ids, **how), expected)
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()


@pytest.mark.parametrize("name", ALL)
def test_huffman_keeps_every_large_weight_compressed_also_merged_ones(zoo: Any, name: str) -> None:
    model = load(zoo(name), "huffman")
    logits(model, zoo(name).inputs())
    large = {n: p for n, p in model.named_parameters() if p.dim() > 1 and p.numel() >= 4096}
    assert len(large) > 4
    assert [n for n, p in large.items() if not isinstance(p, Packed)] == []
    if name in ("mixtral", "qwen2-moe", "qwen3-moe"):
        assert any(n.endswith("experts.gate_up_proj") for n in large)
    stored = {id(p): p.data.store.encoded.nbytes / (p.numel() * 2) for p in large.values()}
    assert max(stored.values()) < 0.95


def test_a_block_is_decoded_only_while_it_runs(zoo: Any) -> None:
    model = load(zoo("llama"), "huffman")
    layers, seen = model.model.layers, []

    def look(*_: Any) -> None:
        seen.append([isinstance(layer.mlp.up_proj.weight, Packed) for layer in layers])

    layers[1].mlp.register_forward_hook(look)
    logits(model, zoo("llama").inputs())
    assert seen == [[True, False]]


def test_decoded_weights_are_forgotten_also_after_an_error(zoo: Any) -> None:
    model = load(zoo("llama"), "huffman")
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, zoo("llama").inputs())
    hook.remove()
    gc.collect()
    assert all(isinstance(p, Packed) for p in model.parameters() if p.dim() > 1)
    expected = logits(zoo("llama").plain(), zoo("llama").inputs())
    assert torch.equal(logits(model, zoo("llama").inputs()), expected)


def test_a_tied_head_is_stored_once(zoo: Any) -> None:
    model = load(zoo("llama-tied"), "huffman")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_threads_may_share_a_compressed_model(zoo: Any) -> None:
    animal = zoo("llama")
    model, expected = load(animal, "huffman"), logits(animal.plain(), animal.inputs())
    results: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda: results.extend(torch.equal(logits(model, animal.inputs()), expected) for _ in range(5))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20
    assert all(isinstance(p, Packed) for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("route", ROUTES)
def test_every_bit_pattern_survives(zoo: Any, tmp_path: Path, route: str) -> None:
    tensors = load_file(zoo("llama").folder / "model.safetensors")
    odd = torch.tensor([0x7FC1, 0xFF81, 0x7F80, 0xFF80, 0x8000, 0x0001, 0x807F], dtype=torch.int32).to(torch.int16)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        tensors[name].view(torch.int16).reshape(-1)[: odd.numel()] = odd
    tmp_path.joinpath("m").mkdir()
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    for side in ("config.json", "generation_config.json"):
        (tmp_path / "m" / side).write_bytes((zoo("llama").folder / side).read_bytes())
    tcw.compress(tcw.open_model(tmp_path / "m"), from_specs(["dfloat11"]), tmp_path / "a")
    state = load(SimpleNamespace(artifact=tmp_path / "a", cls=hf.LlamaForCausalLM), route).state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(bits(state[name]), bits(tensor)), name


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("route", ROUTES)
def test_dtype_is_honoured(zoo: Any, route: str, name: str) -> None:
    animal = zoo(name)
    plain, model = animal.plain(dtype=torch.float32), load(animal, route, dtype=torch.float32)
    assert model.dtype == torch.float32
    assert_same_state(model, plain)
    assert torch.equal(logits(model, animal.inputs()), logits(plain, animal.inputs()))


@pytest.mark.parametrize("route", ["from_pretrained", "bf16"])
@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_saving_gives_a_plain_model(zoo: Any, tmp_path: Path, name: str, route: str) -> None:
    load(zoo(name), route).save_pretrained(tmp_path / "saved")
    zoo(name).plain().save_pretrained(tmp_path / "expected")
    assert (tmp_path / "saved/model.safetensors").read_bytes() == (tmp_path / "expected/model.safetensors").read_bytes()
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_a_compressed_model_refuses_what_it_cannot_do(zoo: Any, tmp_path: Path) -> None:
    model = load(zoo("llama"), "huffman")
    with pytest.raises(UsageError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(UsageError, match="stay compressed on the CPU"):
        model.to(torch.float32)
    with pytest.raises(UsageError, match="stay compressed on the CPU"):
        model.to("meta")
    assert model.to("cpu") is model
    with torch.no_grad(), pytest.raises(UsageError, match="cannot be changed"):
        model.lm_head.weight.mul_(2)
    assert torch.equal(logits(model, zoo("llama").inputs()), logits(zoo("llama").plain(), zoo("llama").inputs()))


def test_a_compressed_weight_can_be_read_anywhere(zoo: Any) -> None:
    packed = load(zoo("llama"), "huffman").lm_head.weight
    weight = zoo("llama").plain().lm_head.weight.detach()
    assert (packed.shape, packed.dtype, packed.device) == (weight.shape, weight.dtype, weight.device)
    for read in (lambda w: w[3], lambda w: w.t() @ w, lambda w: torch.stack([w, w]), lambda w: w.float().sum(), hash):
        found = read(packed)
        assert found == hash(packed) if read is hash else torch.equal(found, read(weight))


def test_auto_chooses_by_free_memory_and_says_so(zoo: Any, monkeypatch: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="tcw")
    source = tcw.open_model(zoo("llama").artifact)
    need = residency.loaded_bytes(source, None)
    assert need == sum(p.numel() * 2 for p in zoo("llama").plain().parameters())
    for free, name in ((need, "huffman"), (10 * need, "bf16")):
        monkeypatch.setattr(residency, "pick", lambda text, free=free: SimpleNamespace(free_bytes=free))
        for model in (tcw.load(source, device="cpu"), hf.LlamaForCausalLM.from_pretrained(str(source.path))):
            assert isinstance(model.lm_head.weight, Packed) is (name == "huffman")
        assert f"residency {name}" in caplog.text
        caplog.clear()


def test_residencies_that_make_no_sense_are_refused(zoo: Any) -> None:
    source = tcw.open_model(zoo("llama").artifact)
    with pytest.raises(UnknownName, match="no residency named `hufman`") as error:
        tcw.load(source, residency="hufman")
    assert "did you mean `huffman`?" in error.value.hint
    for devices, message in (
        (["cpu", 1], "`huffman` wants the whole model on GPUs, or all of it on the CPU"),
        (["mps"], "on the CPU and on NVIDIA GPUs, not on `mps`"),
        (["disk"], "on the CPU and on NVIDIA GPUs, not on `meta`"),
    ):
        with pytest.raises(UsageError, match=message):
            residency.settle("huffman", source, None, devices)
    for devices in (["cpu"], ["cuda:0", "cpu"], ["mps"]):
        with pytest.raises(UsageError, match="`offload` wants the model on NVIDIA GPUs"):
            residency.settle("offload", source, None, devices)
    assert residency.settle("huffman", source, None, [0, "cuda:1"]).residency == "huffman"
    assert residency.settle("auto", source, None, ["mps"]).residency == "bf16"
    for wrong in ({"head": "hole"}, {"form": "p5"}):
        with pytest.raises(UsageError, match=r"hole|p5"):
            tcw.load(source, residency="huffman", device="cpu", **wrong)


def test_a_plain_folder_can_stay_compressed_too(zoo: Any) -> None:
    animal = zoo("mixtral")
    model = tcw.load(animal.folder, residency="huffman", device="cpu")
    assert all(isinstance(p, Packed) for p in model.parameters() if p.dim() > 1 and p.numel() >= 4096)
    assert torch.equal(logits(model, animal.inputs()), logits(animal.plain(), animal.inputs()))


@pytest.mark.parametrize("auto", ["AutoModel", hf.AutoModelForCausalLM, hf.LlamaModel])
def test_the_class_may_be_chosen_and_its_prefix_may_differ(zoo: Any, auto: Any) -> None:
    cls = getattr(hf, auto) if isinstance(auto, str) else auto
    for animal in (zoo("llama"), zoo("llama-tied")):
        plain = cls.from_pretrained(str(animal.folder))
        assert_same_state(tcw.load(animal.artifact, auto_class=auto, device="cpu"), plain)
        assert_same_state(cls.from_pretrained(str(animal.artifact)), plain)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "disk"])
def test_device_maps_work(zoo: Any, tmp_path: Path, device_map: Any) -> None:
    animal = zoo("mixtral")
    if device_map == "disk":
        device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
                      "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    model = load(animal, "from_pretrained", device_map=device_map, offload_folder=str(tmp_path))
    assert torch.equal(logits(model, animal.inputs()), logits(animal.plain(), animal.inputs()))


def test_a_damaged_artifact_is_never_loaded(zoo: Any, tmp_path: Path) -> None:
    for file in zoo("llama").artifact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tcw.json").unlink()
    with pytest.raises(FormatError, match=r"`tcw.json` is missing"):
        hf.LlamaForCausalLM.from_pretrained(str(tmp_path))


def test_an_artifact_on_the_hub_is_fetched_whole(zoo: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from tcw.runtime import quantizer

    artifact, fetched = zoo("llama").artifact, []

    def cached_file(where: str, name: str, **kwargs: Any) -> str:
        assert (where, kwargs) == ("org/model", {"revision": "r"})
        fetched.append(name)
        (tmp_path / name).write_bytes((artifact / name).read_bytes())
        return str(tmp_path / name)

    monkeypatch.setattr(quantizer, "cached_file", cached_file)
    config = SimpleNamespace(pretrained_model_name_or_path="org/model", download_kwargs={"revision": "r"})
    assert quantizer._folder([str(tmp_path / "model-00001-of-00001.safetensors")], config) == tmp_path
    assert sorted(fetched) == sorted(p.name for p in artifact.iterdir())


def test_what_another_tool_quantised_is_left_to_transformers(zoo: Any, tmp_path: Path) -> None:
    for file in zoo("llama").folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="is quantised by awq"):
        tcw.load(tmp_path, residency="huffman", device="cpu")


def test_code_of_a_model_is_not_run_unasked(zoo: Any, tmp_path: Path) -> None:
    for file in zoo("llama").folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["Own"], "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(SourceError, match="cannot read the config"):
        tcw.load(tmp_path, device="cpu")


def test_an_option_that_does_not_exist_is_refused(zoo: Any) -> None:
    with pytest.raises(TypeError, match="'haed'"):
        tcw.load(zoo("llama").artifact, haed="plain")


def test_a_class_that_does_not_fit_is_refused(zoo: Any) -> None:
    with pytest.raises(SourceError, match="AutoModelForImageClassification has no class for `llama`"):
        tcw.load(zoo("llama").artifact, auto_class="AutoModelForImageClassification")
    with pytest.raises(UnknownName, match="no class in transformers named `AutoModelForCausalML`"):
        tcw.load(zoo("llama").artifact, auto_class="AutoModelForCausalML")
    with pytest.raises(UsageError, match="no dtype `float17`"):
        tcw.load(zoo("llama").artifact, dtype="float17")


def test_a_model_without_a_tokenizer_says_so(zoo: Any) -> None:
    with pytest.raises(SourceError, match=r"`llama\.tcw` has no tokenizer"):
        tokenizer(tcw.open_model(zoo("llama").artifact))
