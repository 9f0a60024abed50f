"""RoPE as the model does it: there, back, and from one place to another."""

import pytest
import torch

from tcw.kv import AttentionCall, LayerShape
from tcw.kv.calibrate import Session
from tcw.kv.shapes import shapes_of
from tests.kv.conftest import text

INTERLEAVED, PARTIAL = {"Cohere"}, {"GPTNeoX"}


def test_what_the_model_did_is_undone(any_model):
    """Keys of the same token are the same everywhere, once RoPE is taken back."""
    layers = shapes_of(any_model)
    assert all(layer.rope is not None for layer in layers)
    name = type(any_model).__name__.removesuffix("ForCausalLM")
    assert layers[0].rope.interleaved == (name in INTERLEAVED)
    assert (layers[0].rope.rotary_dim < layers[0].head_dim) == (name in PARTIAL)
    seen: list[torch.Tensor] = []

    def look(layer: LayerShape, call: AttentionCall) -> None:
        if layer.index == 0:
            seen.append(layer.rope.undo(call.keys, call.positions[:, None]))

    tokens = text(30)
    tokens[0, 20] = tokens[0, 3]
    Session(any_model, layers, tokens).watch(look)
    if layers[0].index == 0:
        (keys,) = seen
        assert torch.allclose(keys[:, :, 3], keys[:, :, 20], atol=1e-4)
        assert not torch.allclose(keys[:, :, 3], keys[:, :, 4], atol=1e-2)


@pytest.mark.parametrize("name", ["Llama", "Cohere", "GPTNeoX"])
def test_turning_is_rotating_elsewhere(architecture, name):
    rope = shapes_of(architecture(name))[0].rope
    x, positions = torch.randn(2, 3, 5, 16), torch.randint(0, 400, (2, 3, 5))
    there = rope.rotate(x, positions)
    assert torch.allclose(rope.turn(there, 17 - positions), rope.rotate(x, torch.tensor(17)), atol=1e-3)
    assert torch.allclose(rope.undo(there, positions), x, atol=1e-4)
    assert torch.allclose(rope.unbands(rope.bands(x)), x[..., : rope.rotary_dim])


def test_rotation_by_the_definition():
    from tcw.kv.rope import Rope

    rope = Rope(torch.tensor([1.0, 0.1]), scaling=2.0)
    x, p = torch.tensor([0.5, -1.0, 2.0, 3.0, 9.0]), 7
    expected = []
    for f, w in enumerate((1.0, 0.1)):
        z = complex(x[f], x[f + 2]) * complex(torch.cos(torch.tensor(p * w)), torch.sin(torch.tensor(p * w))) * 2
        expected.append(z)
    found = rope.rotate(x, torch.tensor(p))
    assert torch.allclose(found[:2], torch.tensor([z.real for z in expected]), atol=1e-5)
    assert torch.allclose(found[2:4], torch.tensor([z.imag for z in expected]), atol=1e-5)
    assert found[4] == 9.0
