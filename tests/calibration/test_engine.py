"""The walk against a slow one that holds the whole model and quantises it layer by layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tcw import methods
from tcw.calibration.blocks import BlockModel
from tcw.calibration.coder import Coder
from tcw.calibration.engine import Walk, batches
from tcw.calibration.store import Store
from tcw.calibration.survey import group_of, survey
from tcw.errors import SourceError, UsageError
from tcw.events import Progress, silent
from tcw.recipe import Step, make_step
from tcw.source import Source, open_source
from tcw.weights import Statistics

from .conftest import Coarse

IDS = torch.randint(3, 250, (6, 24), generator=torch.Generator().manual_seed(2))
ORDER = ("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)


def walk(source: Source, folder: Path, *, ids: torch.Tensor = IDS, states: Path | None = None, **options: Any) -> Walk:
    store = Store(folder)
    store.begin({}, resume=True)
    coder = Coder(source, (make_step("coarse", options),))
    made = Walk(BlockModel(source), coder, store, ids, states, silent)
    made.facts = made.run()  # type: ignore[attr-defined]
    return made


def slow(folder: Path, ids: torch.Tensor, step: float = 0.02) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Hessians and drifts of a Llama, float64, with sequential rounding; the whole model runs for each layer group."""
    model, original = (transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    hessians, drifts = {}, {}

    def inputs(of: Any, name: str) -> np.ndarray:
        kept: list[torch.Tensor] = []
        hook = of.get_submodule(name).register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        with torch.no_grad():
            of(ids)
        hook.remove()
        return kept[0].reshape(-1, kept[0].shape[-1]).double().numpy()

    for k in range(model.config.num_hidden_layers):
        for group in ORDER:
            names = [n for n, _ in model.named_modules() if f"layers.{k}." in n and n.endswith(group)]
            for name in names:
                x, x0 = inputs(model, name), inputs(original, name)
                hessians[f"{name}.weight"] = x.T @ x / len(x)
                drifts[f"{name}.weight"] = (x0 - x).T @ x / len(x)
            for name in names:
                weight = model.get_submodule(name).weight
                weight.data = step * torch.round(weight.data / step)
    return hessians, drifts


def test_statistics_are_those_of_a_model_quantised_layer_by_layer(
    coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = model("llama")
    walk(open_source(folder), tmp_path / "store", drift=True)
    hessians, drifts = slow(folder, IDS)
    assert coarse.seen.keys() == hessians.keys()
    for name, seen in coarse.seen.items():
        assert seen.tokens == IDS.numel()
        np.testing.assert_allclose(seen.hessian, hessians[name], rtol=1e-3, atol=1e-4 * np.abs(hessians[name]).max())
        if "layers.0.self_attn.q" not in name:
            assert seen.drift is not None
            scale = np.abs(drifts[name]).max()
            np.testing.assert_allclose(seen.drift, drifts[name], rtol=1e-2, atol=max(1e-2 * scale, 1e-5))


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2", "qwen3_moe", "bert", "falcon"])
def test_other_architectures_are_walked(
    kind: str, coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(model(kind))
    made = walk(source, tmp_path / "store")
    wanted = {n for n, info in source.tensors().items() if Coarse().wants(info)}
    assert wanted
    assert set(made.store.index) <= wanted
    assert {n for n, s in coarse.seen.items() if s.hessian is not None} | set(_few(made)) >= set(coarse.seen)
    assert set(coarse.seen) == wanted - {n for n in wanted if "pooler" in n}


def _few(made: Walk) -> list[str]:
    return made.coder._reasons.get("saw too few tokens and are coded from their weights alone", [])


def test_experts_count_their_tokens(coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path) -> None:
    source = open_source(model("qwen3_moe"))
    made = walk(source, tmp_path / "store")
    gates = [s for n, s in coarse.seen.items() if ".experts." in n and "gate_proj" in n and "layers.1." in n]
    assert len(gates) == 8
    assert sum(s.tokens for s in gates) == 2 * IDS.numel()  # every token goes to two experts
    few = walk(source, tmp_path / "few", ids=IDS[:1, :8])
    assert any(".experts." in name for name in _few(few))
    assert all(coarse.seen[name].hessian is None for name in _few(few))
    assert any("too few tokens" in note for note in few.coder.notes)
    assert len(_few(made)) < len(_few(few))


def test_activations_on_the_disk_change_nothing(
    coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(model("llama"))
    walk(source, tmp_path / "a")
    in_memory = {name: s.hessian for name, s in coarse.seen.items()}
    (tmp_path / "states").mkdir()
    walk(source, tmp_path / "b", states=tmp_path / "states")
    assert all(np.array_equal(s.hessian, in_memory[name]) for name, s in coarse.seen.items())
    assert not list((tmp_path / "states").iterdir())


def test_an_interrupted_walk_goes_on(
    coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(model("llama"))
    walk(source, tmp_path / "whole", allocate_bits=True, drift=True)
    whole = {name: (s.hessian, s.bits, s.drift) for name, s in coarse.seen.items()}
    encode = Coarse.encode

    def dies(self: Coarse, tensor: Any, statistics: Any = None) -> Any:
        if "layers.1.mlp.down" in tensor.info.name:
            raise KeyboardInterrupt
        return encode(self, tensor, statistics)

    monkeypatch.setattr(Coarse, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        walk(source, tmp_path / "cut", allocate_bits=True, drift=True)
    monkeypatch.setattr(Coarse, "encode", encode)
    coarse.seen.clear()
    again = walk(source, tmp_path / "cut", allocate_bits=True, drift=True)
    assert all("layers.0." not in name for name in coarse.seen)
    for name, seen in coarse.seen.items():
        assert np.array_equal(seen.hessian, whole[name][0])
        assert np.array_equal(seen.drift, whole[name][2])
        assert seen.bits == pytest.approx(whole[name][1])
    assert again.store.index.keys() == whole.keys()


def test_a_damaged_block_is_coded_again(coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path) -> None:
    source = open_source(model("llama"))
    walk(source, tmp_path / "store")
    path = tmp_path / "store" / "block-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    coarse.seen.clear()
    walk(source, tmp_path / "store")
    assert coarse.seen
    assert all("layers.1." in name for name in coarse.seen)


def test_resume_with_other_data_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.begin({"tokens": "a"}, resume=False)
    with pytest.raises(UsageError, match="another text"):
        store.begin({"tokens": "b"}, resume=True)
    store.begin({"tokens": "b"}, resume=False)
    store.begin({"tokens": "b"}, resume=True)


def test_squared_gradients_are_those_of_the_whole_model(
    coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path
) -> None:
    """The walk back, block by block, gives what one backward pass through the whole model gives."""
    folder = model("llama")
    blocks, ids = BlockModel(open_source(folder)), batches(IDS)
    coder = Coder(open_source(folder), (make_step("coarse", {"allocate_bits": True}),))
    from tcw.calibration.activations import Activations

    def room(count: int, like: torch.Tensor) -> list[Activations]:
        return [Activations(len(ids), tuple(like.shape), None, "s", torch.device("cpu")) for _ in range(count)]

    found = survey(blocks, ids, coder.method, room, silent)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sums: dict[str, Any] = {}

    def follow(name: str) -> Any:
        def add(gradient: torch.Tensor) -> None:
            sums[name] = sums.get(name, 0) + gradient.double().square().sum((0, 1)).numpy()

        def hook(module: Any, args: Any, y: torch.Tensor) -> None:
            y.register_hook(add)

        return hook

    for name, module in whole.named_modules():
        if f"{name}.weight" in found.errors:
            module.register_forward_hook(follow(f"{name}.weight"))
    generator = torch.Generator().manual_seed(0)
    for batch in ids:
        embedded = whole.get_input_embeddings()(batch).detach().requires_grad_()
        logits = whole(inputs_embeds=embedded).logits.flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    for name, total in sums.items():
        np.testing.assert_allclose(found.gradients[name], total / IDS.numel(), rtol=1e-3)
    curve = next(c for c in found.curves() if c.name == "model.layers.1.mlp.up_proj.weight")
    error = found.errors[curve.name][16.0]
    assert curve.damage[16.0] == pytest.approx(0.5 * float((error * found.gradients[curve.name]).sum()))


def test_an_embedding_gets_bits_as_well(coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path) -> None:
    """One that is not the head: its rows count by their tokens, its columns by the gradient where blocks begin."""
    source, name = open_source(model("llama", tie_word_embeddings=False)), "model.embed_tokens.weight"
    made = walk(source, tmp_path / "store", allocate_bits=True, embeddings=True)
    assert coarse.seen[name].bits is not None
    assert coarse.seen[name].hessian is None
    gradient = coarse.seen[name].gradient
    assert gradient is not None
    often, never = int(IDS[0, 0]), int(np.setdiff1d(np.arange(256), IDS.flatten().numpy())[0])
    assert gradient[often] > gradient[never] > 0
    assert made.store.get(name) is not None
    assert made.store.get("lm_head.weight") is not None
    assert not made.coder.notes
    coarse.seen.clear()
    walk(source, tmp_path / "store", allocate_bits=True, embeddings=True)
    assert not coarse.seen


def test_a_tied_embedding_is_coded_once(coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path) -> None:
    source = open_source(model("llama", tie_word_embeddings=True))
    made = walk(source, tmp_path / "store", allocate_bits=True, embeddings=True)
    assert "lm_head.weight" not in source.tensors()
    seen = coarse.seen["model.embed_tokens.weight"]
    assert seen.tokens == IDS.numel()
    assert made.store.index["model.embed_tokens.weight"][0] == "head"


def test_damage_estimates_the_kl(coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path) -> None:
    """A small error in one layer costs about the KL that the survey says."""
    folder, name = model("llama"), "model.layers.1.mlp.up_proj.weight"
    blocks, ids = BlockModel(open_source(folder)), batches(IDS)
    coder = Coder(open_source(folder), (make_step("coarse", {"allocate_bits": True, "step": 0.02}),))
    from tcw.calibration.activations import Activations

    found = survey(
        blocks, ids, coder.method,
        lambda n, like: [Activations(len(ids), tuple(like.shape), None, "s", torch.device("cpu")) for _ in range(n)],
        silent,
    )  # fmt: skip
    predicted = next(c for c in found.curves() if c.name == name).damage[16.0]
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        before = whole(IDS).logits.double().log_softmax(-1)
        weight = whole.get_parameter(name)
        weight.copy_(0.02 * torch.round(weight / 0.02))
        after = whole(IDS).logits.double().log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert predicted == pytest.approx(kl, rel=0.5)


def test_the_budget_makes_up_for_what_was_over(
    coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path
) -> None:
    """Every tensor takes a little more than 16 bits (its step); later tensors are given that much less."""
    walk(open_source(model("llama")), tmp_path / "store", allocate_bits=True)
    bits = {name: seen.bits for name, seen in coarse.seen.items()}
    first = [bits.pop(f"model.layers.0.self_attn.{p}_proj.weight") for p in "qkv"]
    assert first == [16.0, 16.0, 16.0]  # coded side by side, before anything was over
    assert all(b is not None and b < 16.0 for b in bits.values())


def test_inputs_can_be_scaled_where_a_norm_takes_the_scale(
    coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_source(model("llama"))
    made = walk(source, tmp_path / "store", smooth=True, step=1e-4)
    assert any("could not be scaled" in note for note in made.coder.notes)  # before o and down is no norm
    norm = made.store.get("model.layers.0.input_layernorm.weight")
    assert norm is not None
    assert norm.values is not None
    scale = np.linspace(0.5, 2.0, 64, dtype=np.float32)
    original = source.read("model.layers.0.input_layernorm.weight").floats()
    np.testing.assert_allclose(norm.values.floats(), original / scale, rtol=1e-6)
    up = made.store.get("model.layers.2.mlp.up_proj.weight")
    assert up is not None
    assert up.rewritten
    decoded = made.coder.decode(up)
    np.testing.assert_allclose(decoded, source.read(up.info.name).floats() * scale, atol=1e-4)
    assert not made.store.get("model.layers.0.self_attn.o_proj.weight").rewritten  # type: ignore[union-attr]


def test_gemma_norms_take_a_scale_too(coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path) -> None:
    source = open_source(model("gemma"))
    made = walk(source, tmp_path / "store", smooth=True, step=1e-4)
    name = "model.layers.1.post_attention_layernorm.weight"
    norm = made.store.get(name)
    assert norm is not None
    assert norm.values is not None
    scale = np.linspace(0.5, 2.0, 64, dtype=np.float32)
    np.testing.assert_allclose(norm.values.floats(), (1 + source.read(name).floats()) / scale - 1, atol=1e-6)


def test_scales_of_the_cache(coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path) -> None:
    made = walk(open_source(model("llama")), tmp_path / "store", kv="fp8")
    scales = made.facts["kv_scales"]  # type: ignore[attr-defined]
    assert scales["dtype"] == "fp8"
    assert set(scales["layers"]) == {"0", "1", "2"}
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "_proj" in name:
                parameter.copy_(0.02 * torch.round(parameter / 0.02))
        cache = whole(IDS, use_cache=True).past_key_values
    for k, layer in enumerate(cache.layers):
        assert scales["layers"][str(k)]["k"] == pytest.approx(float(layer.keys.abs().max()) / 448, rel=1e-3)
        assert scales["layers"][str(k)]["v"] == pytest.approx(float(layer.values.abs().max()) / 448, rel=1e-3)


def test_inputs_that_are_not_finite_are_an_error(
    coarse: type[Coarse], model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = model("llama")
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        whole.model.embed_tokens.weight[IDS[0, 0]] = float("inf")
    whole.save_pretrained(folder)
    with pytest.raises(SourceError, match=r"not finite"):
        walk(open_source(folder), tmp_path / "store")


def test_groups_that_engines_fuse() -> None:
    assert group_of("model.layers.3.self_attn.k_proj.weight") == group_of("model.layers.3.self_attn.v_proj.weight")
    assert group_of("model.layers.3.mlp.gate_proj.weight") == group_of("model.layers.3.mlp.up_proj.weight")
    assert group_of("model.layers.3.mlp.down_proj.weight") != group_of("model.layers.4.mlp.down_proj.weight")
    one, other = (f"model.layers.3.mlp.experts.{e}.gate_proj.weight" for e in (0, 11))
    assert group_of(one) == group_of(other) != group_of(one.replace("layers.3", "layers.4"))


def test_steps_are_built_from_the_registry(coarse: type[Coarse]) -> None:
    assert isinstance(make_step("coarse", {}), Step)
    assert isinstance(methods.build("coarse", {"step": 0.5}), Coarse)
    assert Statistics().scaled(np.ones(4, np.float32)).hessian is None
    assert Progress("calibrate", 1, 2, "layers").note == ""
