"""A model that exists one block at a time computes what the whole model computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from tcw.calibration.blocks import BlockModel, CannotCalibrate
from tcw.source import open_source

from .conftest import CONFIGS


@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_the_whole_model(kind: str, model: Callable[..., Path]) -> None:
    folder = model(kind)
    auto = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    whole = auto.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 250, (2, 2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        blocks = BlockModel(open_source(folder))
        states = list(blocks.enter(ids))
        for k in range(len(blocks.paths)):
            block = blocks.block(k)
            states = [blocks.run(k, block, state) for state in states]
            blocks.release(k)
            assert all(p.is_meta for p in blocks.parameters_of(k).values())
        with blocks.tail() as tail:
            found = [tail(batch, state) for batch, state in zip(ids, states, strict=True)]
        expected = [whole(batch) for batch in ids]
    for out, ours in zip(expected, found, strict=True):
        theirs = out.logits if hasattr(out, "logits") else out[0]
        assert torch.equal(theirs, ours)


def test_every_tensor_of_the_blocks_has_a_place(model: Callable[..., Path]) -> None:
    source = open_source(model("qwen3_moe"))
    blocks = BlockModel(source)
    placed = {place.tensor for places in blocks.places.values() for place in places}
    assert placed == set(source.tensors())
    experts = blocks.places["model.layers.0.mlp.experts.gate_up_proj"]
    assert len(experts) == 16
    assert {(p.first, p.end) for p in experts if "up_proj" in p.tensor} == {(32, None)}


def test_what_is_no_text_model_is_refused(tmp_path: Path) -> None:
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(CannotCalibrate, match="text"):
        list(BlockModel(open_source(tmp_path / "vit")).enter(torch.zeros(1, 1, 8, dtype=torch.int64)))


def test_blocks_that_get_more_than_a_hidden_state_are_refused(
    model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = BlockModel(open_source(model("llama")))
    inner = blocks.model.model
    forward = inner.forward

    def with_tokens(input_ids: torch.Tensor, **kwargs: object) -> object:
        first = inner.layers[0].forward
        inner.layers[0].forward = lambda hidden, *a, **k: first(hidden, *a, tokens=input_ids, **k)
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(inner, "forward", with_tokens)
    ids = torch.arange(3, 35).reshape(2, 1, 16)
    with pytest.raises(CannotCalibrate, match="depends on the tokens"), torch.no_grad():
        list(blocks.enter(ids))
