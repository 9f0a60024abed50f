"""BF16 weights that stay packed in memory: the plain model's bits, and its products up to the order of sums."""

import logging
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.functional import linear

import tcw
from tcw.runtime import autotune, lossless, residency
from tcw.runtime.linear import QuantizedEmbedding, QuantizedLinear
from tcw.runtime.lossless import LosslessWeight
from tcw.tensor import TensorInfo


class Named:
    """What a weight says of where it was stored."""

    def __init__(self, *shape: int) -> None:
        self.info = TensorInfo("w", "BF16", shape)


def weight_of(*shape: int, form: str = "p4", looked_up: bool = False) -> tuple[torch.Tensor, LosslessWeight | None]:
    plain = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05).bfloat16()
    plain.view(-1)[::97] = torch.tensor(float("inf"))
    return plain, lossless.build(Named(*shape), plain, form, looked_up=looked_up)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}).logits


def assert_near(found: torch.Tensor, right: torch.Tensor) -> None:
    """Equal up to the order of sums, and roundings to BF16."""
    assert found.dtype == right.dtype
    assert (found - right).float().norm() <= right.float().norm() / 100


@pytest.mark.parametrize("form", ["p4", "p3"])
def test_all_bits_are_kept_and_rows_are_read_alone(form: str, monkeypatch: Any) -> None:
    plain, weight = weight_of(100, 512, form=form, looked_up=True)
    assert weight is not None
    assert weight.nbytes == sum(buffer.nbytes for buffer in weight.buffers()) < 0.9 * plain.nbytes
    assert torch.equal(bits(weight.dense()), bits(plain))
    ids = torch.tensor([99, 0, 17, 17, 33])
    unpack = lossless.unpack
    monkeypatch.setattr(
        lossless, "unpack", lambda near: unpack(near) if near.shape == (80, 512) else pytest.fail(str(near.shape))
    )
    assert torch.equal(bits(weight.rows(ids)), bits(plain[ids]))
    monkeypatch.undo()
    assert weight.rows(ids[:0]).shape == (0, 512)
    monkeypatch.setattr(lossless, "_AT_ONCE", 2)  # no memory for all rows of a long prompt at once
    monkeypatch.setattr(lossless, "unpack", lambda near: unpack(near) if near.shape[0] <= 32 else pytest.fail("many"))
    assert torch.equal(bits(weight.rows(ids)), bits(plain[ids]))
    with pytest.raises((IndexError, RuntimeError)):
        weight.rows(torch.tensor([100]))  # the last tile has rows 96 to 111


def test_gradients_go_through_torchs_product() -> None:
    plain, weight = weight_of(64, 256)
    assert weight is not None
    x = torch.randn(2, 256).bfloat16().requires_grad_()
    weight.linear(x, None).float().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (torch.ones(2, 64).bfloat16() @ plain))


def test_what_does_not_pay_or_fit_stays_plain() -> None:
    assert weight_of(100, 448, looked_up=True)[1] is None  # rows of tiles whose escapes are counted across rows
    assert weight_of(100, 448)[1] is not None
    assert weight_of(3, 5, 7)[1] is None
    noise = torch.randint(-32768, 32767, (64, 256), generator=torch.Generator().manual_seed(1)).short()
    assert lossless.build(Named(64, 256), noise.view(torch.bfloat16), "p4", looked_up=False) is None


def test_the_number_of_rows_decides_the_way(monkeypatch: Any) -> None:
    plain, weight = weight_of(96, 256)
    assert weight is not None
    plain, fused = plain.nan_to_num(posinf=0.0), []
    weight = lossless.build(Named(96, 256), plain, "p4", looked_up=False)
    assert weight is not None
    product = lossless.packed_matmul
    monkeypatch.setattr(lossless, "packed_matmul", lambda x, *more: (fused.append(len(x)), product(x, *more))[1])
    bias = torch.randn(96).bfloat16()
    for rows, limit in ((1, 16), (16, 16), (17, 16), (4, 1), (1, 0)):
        weight.fused_rows = limit
        x = torch.randn(rows, 256).bfloat16()
        torch.testing.assert_close(weight.linear(x, bias), linear(x, plain, bias))
    assert fused == [1, 16]
    assert weight.linear(torch.randn(2, 256).half(), None).dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "p4") for name in ("llama", "llama-tied", "mixtral", "bert", "t5", "whisper", "gpt-neox")),
        ("llama", "p3"),
    ],
)
def test_packed_models_say_what_plain_ones_say(zoo: Any, name: str, form: str) -> None:
    animal = zoo(name)
    plain, expected = animal.plain(), logits(animal.plain(), animal.inputs())
    for where in (animal.artifact, animal.folder):
        model = tcw.load(where, residency="packed", device="cpu", form=form, auto_class=animal.cls)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        assert len(layers) >= 7
        assert {m.quantized.packed().form for m in layers.values()} == {form}
        for key, layer in layers.items():
            assert torch.equal(bits(layer.weight), bits(plain.get_submodule(key).weight))
        for key, parameter in model.named_parameters():
            assert torch.equal(bits(parameter), bits(plain.get_parameter(key)))
        assert model.tcw_residency == "packed"
        assert torch.equal(logits(model, animal.inputs()), expected)  # on a processor the product is torch's, too


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tied model whose embedding can be packed, as a plain folder."""
    config = hf.LlamaConfig(
        hidden_size=256, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=100,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).bfloat16().eval()
    folder = tmp_path_factory.mktemp("wide") / "model"
    model.save_pretrained(folder)
    return model, folder


def test_a_tied_embedding_is_packed_once(wide: Any) -> None:
    plain, folder = wide
    model = tcw.load(folder, residency="packed", device="cpu")
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert model.lm_head.quantized is model.model.embed_tokens.quantized
    ids = {"input_ids": torch.tensor([[5, 99, 0, 5, 31, 32]])}
    assert_near(logits(model, ids), logits(plain, ids))


def test_packed_models_can_be_compiled(wide: Any) -> None:
    """Without a break in the graph; the ops have no meaning to the compiler but their shapes."""
    plain, folder = wide
    model = tcw.load(folder, residency="packed", device="cpu")
    x = torch.randn(1, 3, 256).bfloat16()
    mlp = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_near(mlp(x), plain.model.layers[0].mlp(x))
        ids = {"input_ids": torch.tensor([[5, 99, 0]]), "use_cache": False}
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_near(whole(**ids).logits, plain(**ids).logits)


def test_layers_go_by_what_was_measured(wide: Any, monkeypatch: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="tcw")
    times = {
        "256x256": (1, 2, 3),
        "128x256": (3, 1, 2),
        "256x128": (2, 1, 3),
        "100x256": (1, 3, 2),
    }  # plain fused unpack
    table = autotune.Table(
        {
            f"{shape} p4 {rows} {way}": float(value)
            for shape, found in times.items()
            for rows in autotune.ROWS
            for way, value in zip(("plain", "fused", "unpack"), found, strict=True)
            if way != "fused" or rows <= 16
        }
    )
    monkeypatch.setattr(residency, "KERNELS", {"cpu"})
    monkeypatch.setattr(autotune, "measured", lambda shapes, form, device: table)
    plain, folder = wide
    for mixed in (False, True):
        model = tcw.load(folder, residency="packed", device="cpu", mixed=mixed)
        layer = model.model.layers[0]
        assert isinstance(layer.self_attn.o_proj, nn.Linear) is mixed
        assert isinstance(model.lm_head, nn.Linear) is mixed
        assert (layer.mlp.up_proj.quantized.fused_rows, layer.mlp.down_proj.quantized.fused_rows) == (16, 16)
        ids = {"input_ids": torch.tensor([[5, 99, 0]])}
        assert_near(logits(model, ids), logits(plain, ids))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "weights of 256 x 256 stay BF16" in caplog.text
    assert tcw.load(folder, residency="packed", device="cpu").lm_head.quantized.fused_rows == 0


def test_the_very_kernels_run_a_packed_model(wide: Any, monkeypatch: Any) -> None:
    """kernels/packed_matmul/kernel.cu, compiled for this processor: layers, the head, and rows of the embedding."""
    from tcw.kernels.packed_matmul import launch

    from tests.kernels.host import HostModule, compiler

    if compiler() is None:
        pytest.skip("no C++ compiler: kernels cannot be run on the processor")
    module, calls = HostModule("packed_matmul"), []

    def product(x: torch.Tensor, weight: Any, bias: Any = None) -> torch.Tensor:
        calls.append("product")
        y = launch.matmul(module, x.reshape(-1, x.shape[-1]), weight, bias)
        return y.view(*x.shape[:-1], -1)

    def unpack(weight: Any) -> torch.Tensor:
        calls.append("unpack")
        out = torch.empty(weight.shape, dtype=torch.bfloat16)
        launch.unpack(module, weight, out)
        return out

    plain, folder = wide
    model = tcw.load(folder, residency="packed", device="cpu")
    ids = {"input_ids": torch.tensor([[5, 99, 0, 31]])}
    expected = logits(plain, ids)
    monkeypatch.setattr(lossless, "packed_matmul", product)
    monkeypatch.setattr(lossless, "unpack", unpack)
    assert_near(logits(model, ids), expected)
    assert (calls.count("unpack"), calls.count("product")) == (1, 8)
    table = model.model.embed_tokens
    assert torch.equal(bits(table(ids["input_ids"])), bits(plain.model.embed_tokens(ids["input_ids"])))
