import gc
from typing import Any

import pytest
import torch

import tcw
from tcw.runtime import packed
from tcw.runtime.packed import Packed
from tcw.runtime.scratch import Scratch


def huffman(animal: Any) -> Any:
    return tcw.load(animal.artifact, residency="huffman", device="cpu")


def test_every_block_is_decoded_into_the_same_memory(zoo: Any) -> None:
    model, plain = huffman(zoo("llama")), zoo("llama").plain()
    places: list[tuple[int, int]] = []

    def look(module: Any, *_: Any) -> None:
        storage = module.weight.untyped_storage()
        places.append((storage.data_ptr(), storage.nbytes()))

    for module in (*(layer.mlp.up_proj for layer in model.model.layers), model.lm_head):
        module.register_forward_pre_hook(look)
    for _ in range(2):
        with torch.no_grad():
            model(**zoo("llama").inputs())
    assert len(places) == 6
    assert len({pointer for pointer, _ in places}) == 1
    large = [p.numel() * 2 for p in plain.model.layers[0].parameters() if p.numel() >= 1024]
    assert places[0][1] == sum(large)  # each a multiple of 64
    assert places[2][1] == plain.lm_head.weight.numel() * 2


def test_a_weight_that_was_kept_keeps_its_values(zoo: Any) -> None:
    model, plain = huffman(zoo("llama")), zoo("llama").plain()
    kept: list[Any] = []
    hook = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, *_: kept.append(m.weight[3:5].detach()))
    inputs = zoo("llama").inputs()
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert all(torch.equal(rows, plain.model.layers[0].mlp.up_proj.weight[3:5]) for rows in kept)
    assert len({rows.untyped_storage().data_ptr() for rows in kept}) == 3
    hook.remove()


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral"])
def test_gradients_see_the_weights_that_were_used(zoo: Any, name: str) -> None:
    found = []
    for model in (huffman(zoo(name)), zoo(name).plain()):
        embedded = model.get_input_embeddings()(zoo(name).inputs()["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.float().pow(2).mean().backward()
        found.append(embedded.grad)
    assert found[1].abs().max() > 0
    assert torch.equal(*found)


def test_a_buffer_is_lent_to_one_at_a_time_and_comes_back_by_itself() -> None:
    scratch = Scratch()
    scratch.size = 256
    first = torch.from_numpy(scratch.lend(100))
    view = first[10:20].view(torch.bfloat16)
    pointer = first.data_ptr()
    assert pointer % 64 == 0
    del first
    second = torch.from_numpy(scratch.lend(200))
    assert not pointer <= second.data_ptr() < pointer + 100
    view.fill_(1)
    pointer = second.data_ptr()
    del second
    gc.collect()
    third = torch.from_numpy(scratch.lend(256))
    assert third.data_ptr() == pointer
    assert view.tolist() == [1] * 5
    assert scratch.lend(1000).size == 1000  # more than was said


def test_a_lookup_decodes_rows_only(zoo: Any, monkeypatch: Any) -> None:
    model, plain = huffman(zoo("llama-tied")), zoo("llama-tied").plain()
    table, reference = model.model.embed_tokens, plain.model.embed_tokens
    assert isinstance(table.weight, Packed)
    assert model.lm_head.weight is table.weight
    monkeypatch.setattr(packed, "decode_all", lambda stores: pytest.fail("decodes everything"))
    cases = [torch.tensor(3), torch.tensor([[255, 0, 255], [7, 8, 100]]), torch.zeros(2, 0, dtype=torch.long),
             torch.arange(256), torch.tensor([4, 5], dtype=torch.int32)]  # fmt: skip
    for ids in cases:
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                assert torch.equal(table(ids).view(torch.int16), reference(ids).view(torch.int16))
    for ids in ([256], [-1, 3]):
        with pytest.raises(IndexError, match="out of range"):
            table(torch.tensor(ids))


def test_a_damaged_stream_is_an_error_that_names_the_tensor(zoo: Any) -> None:
    from tcw.errors import FormatError

    model = huffman(zoo("llama"))
    store = model.model.layers[1].mlp.up_proj.weight.data.store
    store.encoded.parts["codes"][:] ^= 0x5A
    with pytest.raises(FormatError, match=r"`model.layers.1.mlp.up_proj.weight`: lanes: lane"):
        model(**zoo("llama").inputs())
    assert all(isinstance(p, Packed) for p in model.parameters() if p.dim() > 1)
