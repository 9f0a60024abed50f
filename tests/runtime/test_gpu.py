"""The residencies on a real GPU: bits, memory as the allocator counts it, and CUDA graphs."""

from typing import Any

import pytest
import torch

import tcw
from tcw.runtime.coded import Coded
from tcw.runtime.linear import QuantizedLinear

pytestmark = pytest.mark.gpu
HOW = ({}, {"scratch": 1 << 20}, {"overlap": False}, {"head": "whole"}, {"head": "slices"})


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def load(animal: Any, choice: str, **how: Any) -> Any:
    return tcw.load(animal.artifact, residency=choice, device="cuda", **how)


def inputs(animal: Any) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in animal.inputs().items()}


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("choice", ["huffman", "offload"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "bart", "gpt-neox"])
def test_logits_are_those_of_the_decoded_model(zoo: Any, name: str, choice: str, how: dict[str, Any]) -> None:
    plain, model, given = load(zoo(name), "bf16"), load(zoo(name), choice, **how), inputs(zoo(name))
    with torch.inference_mode():
        expected = plain(**given).logits
        for _ in range(3):
            found = model(**given).logits
            if how.get("head") == "slices":
                torch.testing.assert_close(found, expected)
            else:
                assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("choice", ["huffman", "offload", "packed"])
def test_a_graph_replays_what_a_run_gives(zoo: Any, choice: str) -> None:
    model = load(zoo("llama"), choice)
    model.set_attn_implementation("eager")  # transformers takes another mask, and kernel, for "sdpa" within a graph
    ids = torch.arange(3, 9, device="cuda").view(1, -1)
    with torch.inference_mode():
        for _ in range(2):
            expected = model(ids, use_cache=False).logits.clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(ids, use_cache=False).logits
        for _ in range(3):
            model(ids.flip(1), use_cache=False)  # leaves other weights behind
            found.fill_(-1)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(bits(found), bits(expected))
        assert torch.equal(bits(model(ids, use_cache=False).logits), bits(expected))


def test_the_allocator_has_no_more_than_was_counted(zoo: Any) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load(zoo("llama"), "huffman", head="slices")
    took = torch.cuda.memory_allocated() - before
    arena = next(h.__self__ for h in model.model._forward_hooks.values() if hasattr(h, "__self__"))
    groups = {id(c.store.group): c.store.group for c in model.parameters() if isinstance(c, Coded)}
    counted = sum(g.nbytes for g in groups.values()) + arena.memory.nbytes
    tensors = 7 * len(groups) + 40  # of up to 512 bytes of padding each; norms, and units of slices
    assert counted <= took <= counted + 512 * tensors + 4096


@pytest.mark.parametrize("form", ["p4", "p3"])
def test_packed_layers_give_the_bits_of_the_same_kernel_on_plain_weights(zoo: Any, form: str) -> None:
    from tcw.kernels.packed_matmul import raw_matmul

    model, plain = load(zoo("llama"), "packed", form=form), load(zoo("llama"), "bf16")
    for key, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight = plain.get_submodule(key).weight
            assert torch.equal(bits(layer.weight), bits(weight))
            layer.quantized.fused_rows = 16
            for rows in (1, 5, 16):
                x = torch.randn(rows, layer.in_features, device="cuda").bfloat16()
                assert torch.equal(bits(layer(x)), bits(raw_matmul(x, weight)))
