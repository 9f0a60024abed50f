"""What a GPU does with coded weights, done on the processor: the same classes, and once the very kernels."""

import gc
import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from accelerate import dispatch_model
from torch import nn

import tcw
from tcw.errors import FormatError, ResourceError, UsageError
from tcw.recipe import from_specs
from tcw.runtime import offload, residency, resident
from tcw.runtime.arena import Arena
from tcw.runtime.coded import Coded
from tcw.runtime.linear import Quantized
from tcw.runtime.options import Options
from tcw.runtime.sliced import SlicedLinear
from tcw.runtime.state import Unread

from .conftest import MODELS

WAYS = (
    {}, {"scratch": 1 << 20}, {"overlap": False}, {"head": "whole"}, {"head": "plain"}, {"head": "slices"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def _on_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processor pass for a device that decodes weights itself."""
    monkeypatch.setattr(residency, "KERNELS", {"cpu"})


def load(where: Any, choice: str = "huffman", **how: Any) -> Any:
    return tcw.load(where, residency=choice, device="cpu", **how)


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}).logits


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def coded_of(model: nn.Module) -> dict[str, Coded]:
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p, Coded)}


@pytest.mark.parametrize("choice", ["huffman", "offload"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_logits_are_the_originals_bit_for_bit(zoo: Any, name: str, choice: str) -> None:
    animal = zoo(name)
    plain, model = animal.plain(), load(animal.artifact, choice)
    coded = coded_of(model)
    assert len(coded) > 4
    assert model.tcw_residency == choice
    expected = bits(logits(plain, animal.inputs()))
    for _ in range(2):
        assert torch.equal(bits(logits(model, animal.inputs())), expected)
    assert coded_of(model).keys() == coded.keys()  # all back in their places
    right = dict(plain.named_parameters(remove_duplicate=False))
    for key, weight in coded.items():  # and any other operation sees the values
        assert (weight.shape, weight.dtype, weight.device) == (right[key].shape, right[key].dtype, right[key].device)
        assert torch.equal(bits(weight.clone()), bits(right[key]))


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_every_way_to_decode_gives_the_same(zoo: Any, name: str, how: dict[str, Any]) -> None:
    animal, found = zoo(name), []
    ids = animal.inputs()["input_ids"]
    said = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "no_repeat_ngram_size": 1}
    for model in (animal.plain(), load(animal.artifact, **how), load(animal.folder, "offload", **how)):
        with torch.inference_mode():
            found.append((bits(logits(model, animal.inputs())), model.generate(ids, **said)))
    assert all(torch.equal(y, found[0][0]) and torch.equal(tokens, found[0][1]) for y, tokens in found[1:])
    head = model.lm_head
    assert isinstance(head, SlicedLinear) is (how.get("head") == "slices")
    assert isinstance(head.weight, Coded) is (how.get("head") != "plain" and how.get("overlap", True))


def test_the_memory_that_it_takes_is_counted(zoo: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="tcw")
    sizes = {}
    for way, how in {
        "usual": {"head": "plain"},
        "least": {"overlap": False, "head": "slices"},
        "blocks": {"scratch": 1 << 20},
    }.items():
        model = load(zoo("llama").artifact, **how)
        groups = {id(c.store.group): c.store.group for c in coded_of(model).values()}
        arena = arena_of(model)
        sizes[way] = arena.memory.nbytes
        coded = sum(group.nbytes for group in groups.values())
        plain = sum(p.nbytes for p in model.parameters() if not isinstance(p, Coded) and p.dim() > 1)
        shown = [tcw.units.show_bytes(n) for n in (coded, arena.memory.nbytes, plain)]
        assert f"codes {shown[0]}, scratch {shown[1]}, plain weights {shown[2]}; on the host 0 B" in caplog.text
        caplog.clear()
    layer = zoo("llama").plain().model.layers[0]
    weights = [p.nbytes for p in layer.parameters() if p.dim() > 1]
    assert sizes["least"] == max(weights) == 96 * 64 * 2
    assert sizes["usual"] <= 2 * max(weights)
    assert sum(weights) <= sizes["blocks"] // 2 <= sum(weights) + 512 * len(weights)


def arena_of(model: nn.Module) -> Arena:
    hook = next(h for h in model.model._forward_hooks.values() if isinstance(getattr(h, "__self__", None), Arena))
    return hook.__self__


def test_offload_keeps_codes_on_the_host_and_two_stages(zoo: Any) -> None:
    model = load(zoo("llama").artifact, "offload", scratch=1 << 20)
    arena = arena_of(model)
    stages = [stage.nbytes for stage in arena.supply._stages]
    groups = {id(c.store.group): c.store.group for n, c in coded_of(model).items() if ".layers." in n}
    assert len(groups) == len(stages) == 2
    assert all(group.nbytes <= stages[0] <= group.nbytes + 7 * 512 for group in groups.values())
    assert all(group.codes.untyped_storage().nbytes() < group.nbytes + 7 * 512 for group in groups.values())


def test_rows_of_embeddings_are_looked_up_without_decoding_the_rest(zoo: Any, monkeypatch: Any) -> None:
    model, right = load(zoo("llama").artifact), zoo("llama").plain().model.embed_tokens
    table = model.model.embed_tokens
    monkeypatch.setattr("tcw.runtime.coded.decode", lambda *_: pytest.fail("decodes everything"))
    for ids in (torch.tensor(3), torch.tensor([[255, 0, 255], [7, 8, 100]]), torch.arange(256), torch.zeros(0).int()):
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                assert torch.equal(bits(table(ids)), bits(right(ids)))
    for wrong in ([256], [-1, 3]):
        with pytest.raises(IndexError, match="out of range"):
            table(torch.tensor(wrong))


@pytest.mark.parametrize("width", [1, 24, 4096, 5000, 8192])
def test_rows_of_any_width(width: int) -> None:
    from tcw.kernels.lanes_decode import group

    from tcw.runtime.coded import Part, rows
    from tcw.tensor import TensorData, TensorInfo
    from tcw.weights.dfloat11 import DFloat11

    shape = (12_000 // width + 3, width)
    values = np.random.default_rng(width).standard_normal(shape).astype(np.float32)
    tensors = [TensorData.of_floats(TensorInfo("w", "BF16", shape), values * scale) for scale in (1, 2)]
    streams = []
    for tensor in tensors:
        encoded = DFloat11(min_saving=0.0).encode(tensor)
        assert encoded is not None
        params = {k: v for k, v in encoded.params.items() if k != "codec"}
        streams.append((encoded.parts, params, tensor.info.numel))
    part = Part(tensors[1].info, group(streams), 1, torch.device("cpu"))
    ids = torch.tensor([shape[0] - 1, 0, 1, shape[0] - 1])
    expected = torch.from_numpy(tensors[1].data).view(torch.bfloat16).view(shape)[ids]
    assert torch.equal(bits(rows(part, ids)), bits(expected))


def test_gradients_and_kept_weights_see_the_weights_that_were_used(zoo: Any) -> None:
    found: list[Any] = []
    for model in (zoo("llama").plain(), load(zoo("llama").artifact), load(zoo("llama").artifact, head="slices")):
        embedded = model.get_input_embeddings()(zoo("llama").inputs()["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.float().pow(2).mean().backward()
        found.append(embedded.grad)
    assert found[0].abs().max() > 0
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=0.02, atol=0.002)  # a sum of BF16 sums


def test_coded_weights_are_back_after_an_error(zoo: Any) -> None:
    model = load(zoo("llama").artifact)
    before = coded_of(model).keys()
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, zoo("llama").inputs())
    hook.remove()
    assert coded_of(model).keys() == before
    assert torch.equal(logits(model, zoo("llama").inputs()), logits(zoo("llama").plain(), zoo("llama").inputs()))


def test_threads_may_share_a_model(zoo: Any) -> None:
    animal, results = zoo("llama"), []
    model, expected = load(animal.artifact), logits(animal.plain(), animal.inputs())
    many = [
        threading.Thread(
            target=lambda: results.extend(torch.equal(logits(model, animal.inputs()), expected) for _ in range(4))
        )
        for _ in range(3)
    ]
    for thread in many:
        thread.start()
    for thread in many:
        thread.join()
    assert results == [True] * 12
    assert all(isinstance(layer.mlp.up_proj.weight, Coded) for layer in model.model.layers)


def test_from_pretrained_takes_the_same_options(zoo: Any) -> None:
    from tcw.runtime.quantizer import TcwConfig

    for choice in ("huffman", "offload"):
        how = TcwConfig(residency=choice, head="slices", scratch=1 << 20)
        model = hf.LlamaForCausalLM.from_pretrained(str(zoo("llama").artifact), quantization_config=how)
        assert (model.tcw_residency, len(coded_of(model))) == (choice, 16)
        inputs = zoo("llama").inputs()
        assert torch.equal(logits(model, inputs), logits(zoo("llama").plain(), inputs))
        with pytest.raises(UsageError, match="stay compressed"):
            model.to(torch.float32)
        with pytest.raises(UsageError, match="cannot be saved"):
            model.save_pretrained("nowhere")


def test_another_dtype_is_coded_anew(zoo: Any) -> None:
    model = load(zoo("llama").artifact, dtype=torch.float32)
    plain = zoo("llama").plain(dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in coded_of(model).values())
    assert torch.equal(logits(model, zoo("llama").inputs()), logits(plain, zoo("llama").inputs()))


def test_hooks_of_accelerate_go_on_working(zoo: Any) -> None:
    """As on several GPUs: accelerate hooks all modules between loading and `attach`."""
    animal, choices = zoo("llama-tied"), []
    settle = resident.attach

    def dispatched(model: Any, options: Options) -> Any:
        tied = model.lm_head.weight, model.model.embed_tokens.weight
        assert tied[0] is tied[1]
        dispatch_model(model, dict.fromkeys(("model", "lm_head"), "cpu"), force_hooks=True)
        choices.append(model.lm_head.weight is model.model.embed_tokens.weight)
        return settle(model, options)

    resident.attach = dispatched
    try:
        for head in ("auto", "slices"):
            model = load(animal.artifact, head=head)
            assert hasattr(model.lm_head, "_hf_hook")
            assert torch.equal(logits(model, animal.inputs()), logits(animal.plain(), animal.inputs()))
    finally:
        resident.attach = settle
    assert choices == [True, True]


def test_a_damaged_stream_is_refused_before_anything_is_decoded(zoo: Any, monkeypatch: Any) -> None:
    from tcw.artifact import Artifact

    encoded = Artifact.encoded

    def damaged(self: Artifact, name: str) -> Any:
        found = encoded(self, name)
        if "layers.1.mlp.up_proj" in name:
            found.parts["lane_bytes"] = found.parts["lane_bytes"].copy()
            found.parts["lane_bytes"][5] += 1
        return found

    monkeypatch.setattr(Artifact, "encoded", damaged)
    with pytest.raises(FormatError, match=r"`model.layers.1.mlp.up_proj.weight`: lanes"):
        load(zoo("llama").artifact)


def test_memory_that_runs_out_is_an_error_with_a_way_out(zoo: Any, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Arena, "__init__", full)
    with pytest.raises(ResourceError, match="cannot hold the model with `residency='huffman'`: CUDA out of") as error:
        load(zoo("llama").artifact)
    assert "residency='offload'" in error.value.hint
    with pytest.raises(ResourceError) as error:
        load(zoo("llama").artifact, "offload")
    assert "offload" not in error.value.hint


def test_auto_asks_for_memory_and_measurements(zoo: Any, monkeypatch: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="tcw")
    monkeypatch.setattr(residency, "KERNELS", {"cuda"})
    source = tcw.open_model(zoo("llama").artifact)
    need = residency.loaded_bytes(source, None)
    for free, faster, name in (
        (10 * need, 0, "bf16"), (10 * need, 2, "packed"), (need, 2, "packed"), (need // 10, 0, "offload"),
    ):  # fmt: skip
        monkeypatch.setattr(residency, "pick", lambda text, free=free: SimpleNamespace(free_bytes=free))
        monkeypatch.setattr(residency, "_measure", lambda *_, faster=faster: (faster, 5))
        monkeypatch.setattr(residency, "_kernels_run", lambda places: True)
        found = residency.settle("auto", source, None, ["cuda:0"])
        assert (found.residency, found.mixed) == (name, free > need and faster > 0)
        assert f"residency {name}: {found.why}" in caplog.text


@pytest.mark.parametrize("choice", ["huffman", "offload"])
@pytest.mark.parametrize("spec", ["int8:algo=rtn", "fp8:activation=none,entropy=on"])
def test_decoded_weights_of_quantised_artifacts_are_coded_anew(
    zoo: Any, tmp_path: Path, spec: str, choice: str
) -> None:
    tcw.compress(tcw.open_model(zoo("llama").folder), from_specs([spec]), tmp_path / "a")
    model, plain = load(tmp_path / "a", choice), load(tmp_path / "a", "bf16")
    assert len(coded_of(model)) == 16
    assert torch.equal(logits(model, zoo("llama").inputs()), logits(plain, zoo("llama").inputs()))


def test_pages_of_the_host_are_locked_as_long_as_they_are_used(monkeypatch: Any, caplog: Any) -> None:
    calls: list[tuple[str, int]] = []
    codes = {"register": 0}
    runtime = SimpleNamespace(
        cudaHostRegister=lambda at, size, flags: (calls.append(("register", at)), codes["register"])[1],
        cudaHostUnregister=lambda at: calls.append(("unregister", at)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("wait", 0)))
    memory = offload.locked(5000, torch.device("cpu"))
    view = memory[100:200].fill_(7)
    at = memory.data_ptr()
    assert (memory.shape, at % 4096, calls) == ((5000,), 0, [("register", at)])
    del memory
    gc.collect()
    assert len(calls) == 1
    assert view.tolist() == [7] * 100
    del view
    gc.collect()
    assert calls == [("register", at), ("wait", 0), ("unregister", at)]
    codes["register"], calls[:] = 2, []

    def blamed(*_: Any, **__: Any) -> None:  # as torch's next kernel is for an error that CUDA remembers
        calls.append(("kernel", 0))
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", blamed)
    assert offload.locked(10, torch.device("cpu")).numel() == 10
    gc.collect()
    assert "CUDA error 2" in caplog.text
    assert [call for call, _ in calls] == ["register", "kernel"]


def test_plain_tensors_wait_in_their_file(zoo: Any) -> None:
    source = tcw.open_model(zoo("llama").folder)
    info = source.tensors()["lm_head.weight"]
    unread = Unread(source, info)
    expected = zoo("llama").plain().lm_head.weight
    assert unread.nbytes == expected.nbytes
    assert torch.equal(unread.decode(), expected)
    assert torch.equal(unread.rows(torch.tensor([3, 5])), expected[[3, 5]])


def test_plain_weights_are_coded_on_their_device(zoo: Any, monkeypatch: Any) -> None:
    source, devices = tcw.open_model(zoo("llama").folder), []
    weight = Quantized(Unread(source, source.tensors()["lm_head.weight"]), "raw", torch.bfloat16, "meta")
    monkeypatch.setattr(resident, "pack", lambda data, device: devices.append((data.info.dtype, device)))
    assert resident.as_stream(weight) is None
    assert devices == [("BF16", "meta")]


def test_the_very_kernels_run_a_model(zoo: Any, monkeypatch: Any) -> None:
    """kernels/lanes_decode/kernel.cu, compiled for this processor, decodes units, rows and slices."""
    from tcw.kernels.lanes_decode import cpu, launch
    from tcw.kernels.lanes_decode.group import _shared

    from tests.kernels.host import HostModule, compiler

    if compiler() is None:
        pytest.skip("no C++ compiler: kernels cannot be run on the processor")
    module, launched = HostModule("lanes_decode"), []

    def on_host(tensors: Any, split: str, out: torch.Tensor) -> int:
        launched.append(out.numel())
        launch.decode(module, tensors, split, _shared(tensors[1].numpy()), out, None)
        return 0

    animal = zoo("llama")
    ids = {"input_ids": animal.inputs()["input_ids"][:, :4]}
    expected = logits(animal.plain(), ids)
    for choice, how in (("huffman", {"scratch": 1 << 20, "head": "slices"}), ("offload", {})):
        model = load(animal.artifact, choice, **how)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "decode", on_host)
            launched.clear()
            assert torch.equal(bits(logits(model, ids)), bits(expected))
        assert len(launched) >= 4
