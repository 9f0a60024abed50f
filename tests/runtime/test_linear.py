import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn.functional import linear as plain_linear

import tcw
from tcw.artifact import method_class
from tcw.errors import FormatError, UsageError
from tcw.recipe import from_specs
from tcw.runtime import residency
from tcw.runtime.ecq_stream import EcqWeight
from tcw.runtime.linear import Quantized, QuantizedEmbedding, QuantizedLinear, attach
from tcw.runtime.packed import Packed, Store, to_torch
from tcw.runtime.quantized import Fp8Weight, IntegerWeight, build
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Encoded, Statistics
from tcw.weights._integer import SCALE_TYPES, pack, pack_flat

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
INTEGERS = {2: "int2", 3: "mixed", 4: "int4", 8: "int8"}
GRIDS = ("symmetric", "zero", "midrise", "float")
SPECS = (
    "int8:algo=rtn", "int4:algo=rtn,grid=zero,group_size=32", "int2:algo=rtn,rotate=off", "fp8:activation=none",
    "fp8:activation=none,entropy=on,scale=block", "int8:algo=rtn,targets=all",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _same_inputs() -> None:
    torch.manual_seed(4)


def matrix(*shape: int, dtype: str = "BF16", seed: int = 0) -> TensorData:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 0.1
    return TensorData.of_floats(TensorInfo("model.layers.0.mlp.up_proj.weight", dtype, shape), values)


def stored_integers(bits: int, grid: str, group: int, shape: tuple[int, int], dtype: str = "BF16") -> Store:
    """A weight of random codes and scales, as the integer methods store it."""
    random = np.random.default_rng(bits)
    span = min(group, shape[1]) or shape[1]
    groups = -(-shape[1] // span)
    codes = random.integers(0, 1 << bits, shape).astype(np.uint8)
    scale = floats(random.random((shape[0], groups)) + 0.1, dtype)
    parts = {"codes": pack(codes, bits), "scale": scale}
    if grid == "zero":
        parts["zero"] = pack_flat(random.integers(0, 1 << bits, shape[0] * groups).astype(np.uint8), bits)
    elif grid == "float":
        parts["zero"] = floats(random.standard_normal((shape[0], groups)), dtype)
    params = {"bits": bits, "group_size": group, "grid": grid, "scale": dtype}
    info = TensorInfo("model.layers.0.mlp.up_proj.weight", dtype, shape)
    return Store(info, method_class(INTEGERS[bits]), Encoded(parts, params))


def floats(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as scales are stored."""
    info = TensorInfo("scale", dtype, values.shape)
    return TensorData.of_floats(info, values).data.view(SCALE_TYPES[dtype]).reshape(values.shape)


def stored(spec: str, tensor: TensorData, statistics: Statistics | None = None) -> Store:
    """A weight as a method stores it."""
    step = from_specs([spec]).steps[0]
    method = tcw.methods.build(step.method, step.options)
    encoded = method.encode(tensor, statistics)
    assert encoded is not None
    return Store(tensor.info, type(method), encoded)


def decoded(store: Store) -> torch.Tensor:
    """What the method itself gives."""
    return store.decode()


def assert_near(found: torch.Tensor, right: torch.Tensor) -> None:
    """Equal up to roundings to BF16, each of which is 1/256 at most."""
    assert found.dtype == right.dtype
    assert (found - right).float().norm() <= right.float().norm() / 100


@pytest.mark.parametrize("group", [0, 8, 32, 50])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_are_the_methods_own_and_multiply_right(bits: int, grid: str, group: int) -> None:
    store = stored_integers(bits, grid, group, (33, 100))
    weight = IntegerWeight(store, torch.bfloat16)
    expected = decoded(store)
    assert torch.equal(weight.dense(), expected)
    ids = torch.tensor([32, 0, 0, 7])
    assert torch.equal(weight.rows(ids), expected[ids])
    x, bias = torch.randn(2, 3, 100).bfloat16(), torch.randn(33).bfloat16()
    assert_near(weight.linear(x, bias), plain_linear(x, expected, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_compute_in_the_dtype_asked_for_and_keep_their_scales(dtype: str) -> None:
    store = stored_integers(4, "zero", 32, (40, 64), dtype)
    weight = IntegerWeight(store, DTYPES[dtype])
    scale = weight.scale.clone()
    assert torch.equal(weight.dense(), decoded(store))
    for other in DTYPES.values():
        assert weight.to(other).dense().dtype == other
        assert weight.linear(torch.randn(2, 64, dtype=other), None).dtype == other
        assert (weight.scale.dtype, weight.words.dtype) == (DTYPES[dtype], torch.int32)
        assert torch.equal(weight.scale, scale)
    assert torch.equal(weight.to(DTYPES[dtype]).dense(), decoded(store))


@pytest.mark.parametrize(("bits", "group", "per_weight"), [(2, 64, 2.25 + 0.125), (4, 128, 4.125 + 0.0625), (8, 0, 8)])
def test_memory_is_what_the_bits_say(bits: int, group: int, per_weight: float) -> None:
    weight = IntegerWeight(stored_integers(bits, "zero" if group else "symmetric", group, (256, 1024)), torch.bfloat16)
    assert weight.nbytes == pytest.approx(256 * 1024 * per_weight / 8, rel=0.01)


def test_integers_that_do_not_fit_are_refused() -> None:
    store = stored_integers(4, "zero", 32, (40, 64))
    wrong = SimpleNamespace(info=TensorInfo("w", "BF16", (40, 72)), encoded=store.encoded)
    with pytest.raises(FormatError, match="tensor `w`: codes are"):
        IntegerWeight(wrong, torch.bfloat16)  # type: ignore[arg-type]


@pytest.mark.parametrize("entropy", ["on", "off"])
@pytest.mark.parametrize("scale", ["channel", "tensor", "block"])
def test_fp8_weights_are_the_methods_own(scale: str, entropy: str) -> None:
    store = stored(f"fp8:scale={scale},entropy={entropy},activation=none", matrix(300, 200))
    weight = Fp8Weight(store, torch.bfloat16)
    expected = decoded(store)
    assert torch.equal(weight.dense(), expected)
    ids = torch.tensor([299, 0, 130, 130])
    assert torch.equal(weight.rows(ids), expected[ids])
    x = torch.randn(5, 200).bfloat16()
    assert torch.equal(weight.linear(x, None), plain_linear(x, expected))
    assert weight.nbytes < 300 * 200 * 1.03


def e4m3(values: np.ndarray) -> np.ndarray:
    """The nearest E4M3 numbers, by looking at all of them, even ones first."""
    numbers = np.concatenate([np.arange(0, 256, 2), np.arange(1, 256, 2)]).astype(np.uint8)
    table = torch.from_numpy(numbers).view(torch.float8_e4m3fn).double().numpy()
    table = table[np.isfinite(table)]
    return table[np.abs(values[..., None] - table).argmin(-1)]


@pytest.mark.parametrize("spec", ["fp8", "fp8:scale=tensor", "fp8:scale=block", "fp8:activation=static"])
def test_fp8_inputs_are_rounded_as_the_method_says(spec: str) -> None:
    store = stored(spec, matrix(40, 200), Statistics(input_max=3.0))
    x = torch.randn(6, 200).bfloat16()
    x[2], bias = 0, torch.randn(40).bfloat16()
    exact = x.double().numpy()
    if "static" in spec:
        scale = np.full((6, 200), np.float64(np.float32(3.0 / 448)))
    else:
        width = 128 if "block" in spec else 200
        pieces = [np.abs(exact[:, at : at + width]) for at in range(0, 200, width)]
        sizes = [np.repeat(piece.max(1, keepdims=True), piece.shape[1], 1) for piece in pieces]
        scale = np.concatenate(sizes, 1) / 448
    scale = np.where(scale > 0, scale, 1).astype(np.float32).astype(np.float64)
    rounded = e4m3(np.clip((exact / scale).astype(np.float32), -448, 448)) * scale
    expected = rounded @ decoded_exactly(store).T + bias.double().numpy()
    y = Fp8Weight(store, torch.bfloat16).linear(x, bias)
    np.testing.assert_allclose(y.double().numpy(), expected, rtol=2**-8, atol=1e-4)
    alone = Fp8Weight(store, torch.bfloat16, quantize_activations=False).linear(x, bias)
    assert torch.equal(alone, plain_linear(x, decoded(store), bias))
    assert not torch.equal(alone, y)


def decoded_exactly(store: Store) -> np.ndarray:
    """FP8 weights before they are rounded to BF16."""
    from tcw.weights.fp8 import stored as fp8_stored

    codes, scale = fp8_stored(store.info, store.encoded)
    values = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).double().numpy()
    if scale.ndim == 2 and scale.shape[1] > 1:
        scale = np.kron(scale, np.ones((128, 128)))[: values.shape[0], : values.shape[1]]
    return values * scale


@pytest.mark.parametrize("spec", ["fp8", "fp8:scale=tensor", "fp8:activation=static"])
def test_what_a_gpu_multiplies_is_what_the_processor_multiplies(spec: str) -> None:
    """torch._scaled_mm, which runs on a processor too, given the very operands that a GPU would get."""
    weight = Fp8Weight(stored(spec, matrix(48, 64), Statistics(input_max=3.0)), torch.bfloat16)
    x, bias = torch.randn(7, 64).bfloat16(), torch.randn(48).bfloat16()
    y = weight.scaled_mm(*weight._rounded(x), bias)
    torch.testing.assert_close(y, weight.linear(x, bias), rtol=2**-6, atol=2**-6)  # it rounds before the bias, too


@pytest.mark.parametrize("trellis", [0, 6])
def test_ecq_numbers_are_the_methods_own(trellis: int) -> None:
    store = stored(f"ecq:bits=3,trellis={trellis}", matrix(64, 96))
    weight = EcqWeight(store, torch.bfloat16)
    expected = decoded(store)
    assert torch.equal(weight.dense(), expected)
    ids = torch.tensor([63, 0, 5])
    assert torch.equal(weight.rows(ids), expected[ids])
    x, bias = torch.randn(5, 96).bfloat16(), torch.randn(64).bfloat16()
    assert torch.equal(weight.linear(x, bias), plain_linear(x, expected, bias))


def logits(model: Any, length: int = 20) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 3 + length).reshape(1, -1)).logits.float()


def packed(folder: Path, **more: Any) -> Any:
    return tcw.load(folder, residency="packed", device="cpu", **more)


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the artifact of a method, made once."""
    root, known = tmp_path_factory.mktemp("quantised"), {}

    def get(spec: str) -> Path:
        if spec not in known:
            known[spec] = root / str(len(known))
            tcw.compress(tcw.open_model(tiny_llama), from_specs([spec]), known[spec])
        return Path(known[spec])

    return get


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_of_quantised_layers_says_what_the_decoded_one_says(made: Any, spec: str) -> None:
    folder = made(spec)
    expected = tcw.load(folder, residency="bf16", device="cpu")
    model = packed(folder)
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == 14 + ("targets=all" in spec)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding) is ("targets=all" in spec)
    assert not any(isinstance(p, Packed) for p in model.parameters())
    assert torch.equal(layers[3].weight, dict(expected.named_modules())[name_of(model, layers[3])].weight)
    found, right = logits(model), logits(expected)
    assert_near(found, right)
    assert found.argmax(-1).tolist() == right.argmax(-1).tolist()


def name_of(model: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer)


@pytest.mark.parametrize("spec", [*SPECS, "fp8"])
def test_huffman_and_plain_loading_give_the_decoded_weights(made: Any, spec: str) -> None:
    folder = made(spec)
    expected = logits(tcw.load(folder, residency="bf16", device="cpu"))
    compressed = tcw.load(folder, residency="huffman", device="cpu")
    assert torch.equal(logits(compressed), expected)
    stays = [p for p in compressed.parameters() if isinstance(p, Packed)]
    assert len(stays) >= 14
    plain = hf.AutoModelForCausalLM.from_pretrained(str(folder))
    assert all(type(p) is nn.Parameter and p.dtype == torch.bfloat16 for p in plain.parameters())
    assert torch.equal(logits(plain), expected)


def test_fp8_measures_rounded_inputs_unless_told_not_to(made: Any) -> None:
    folder = made("fp8")
    weights_only = logits(tcw.load(folder, residency="bf16", device="cpu"))
    both, alone = logits(packed(folder)), logits(packed(folder, quantize_activations=False))
    assert torch.equal(alone, weights_only)
    assert 0.005 < (both - weights_only).norm() / weights_only.norm() < 0.2


def test_ecq_stays_in_its_code_on_the_cpu(made: Any, tmp_path: Path, tiny_llama: Path) -> None:
    folder = made("ecq:bits=3,allocate=equal")
    model = packed(folder)
    stays = {n: p for n, p in model.named_parameters() if isinstance(p, Packed)}
    assert len(stays) == 14
    assert torch.equal(logits(model), logits(tcw.load(folder, residency="bf16", device="cpu")))
    with pytest.raises(UsageError, match="stay compressed on the CPU"):
        model.to(torch.float32)


def test_it_generates(made: Any) -> None:
    folder = made("int8:algo=rtn,targets=all")
    ids = torch.arange(3, 12).reshape(1, -1)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    model = packed(folder)
    expected = tcw.load(folder, residency="bf16", device="cpu").generate(ids, **how)
    assert torch.equal(model.generate(ids, **how), expected)


def test_it_says_what_it_keeps(made: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, logger="tcw")
    model = packed(made("int8:algo=rtn"))
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    size = sum(layer.quantized.nbytes for layer in layers)
    assert size < 0.55 * sum(2 * layer.in_features * layer.out_features for layer in layers)
    assert f"14 layers hold {size / 1000:.1f} kB; decoded when used: 0 weights, at load: 0" in caplog.text
    packed(made("ecq:bits=3,allocate=equal"))
    assert "0 layers hold 0 B; decoded when used: 14 weights, at load: 0" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_is_honoured(made: Any, dtype: torch.dtype) -> None:
    for spec in ("int8:algo=rtn,targets=all", "fp8:activation=none", "ecq:bits=3,allocate=equal"):
        model, expected = packed(made(spec), dtype=dtype), tcw.load(made(spec), device="cpu", dtype=dtype)
        assert model.dtype == dtype
        with torch.no_grad():
            y = model(torch.arange(3, 9).reshape(1, -1)).logits
        assert y.dtype == dtype
        assert_near(logits(model), logits(expected))


def test_a_model_moves_and_casts_as_a_whole_or_not_at_all(made: Any, tmp_path: Path) -> None:
    model = packed(made("int8:algo=rtn,targets=all"))
    expected = logits(model)
    assert torch.equal(logits(model.to("cpu")), expected)
    layer = model.model.layers[0].mlp.up_proj
    assert "bytes" in repr(layer)
    with pytest.raises(UsageError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    layer.to("meta")
    assert layer.quantized.words.device.type == "meta"


def test_tied_weights_are_kept_once(zoo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tied"
    tcw.compress(tcw.open_model(zoo("llama-tied").folder), from_specs(["int8:algo=rtn,targets=all"]), folder)
    model, expected = packed(folder), tcw.load(folder, residency="bf16", device="cpu")
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.lm_head.quantized is model.model.embed_tokens.quantized
    ids = torch.tensor([[5, 250], [0, 5]])
    assert torch.equal(model.model.embed_tokens(ids), expected.model.embed_tokens(ids))
    assert_near(logits(model), logits(expected))


@pytest.mark.parametrize("name", ["mixtral", "bert", "t5", "whisper"])
def test_other_families_run_quantised(zoo: Any, tmp_path: Path, name: str) -> None:
    animal, folder = zoo(name), tmp_path / "a"
    tcw.compress(tcw.open_model(animal.folder), from_specs(["int8:algo=rtn"]), folder)
    model = tcw.load(folder, residency="packed", device="cpu", auto_class=animal.cls)
    expected = tcw.load(folder, residency="bf16", device="cpu", auto_class=animal.cls)
    assert any(isinstance(m, QuantizedLinear) for m in model.modules())
    with torch.no_grad():
        found, right = (m(**animal.inputs()).logits.float() for m in (model, expected))
    assert_near(found, right)


class Scaled(nn.Linear):
    """A layer that computes in a way of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A layer that only has another name."""


def test_layers_with_a_way_of_their_own_keep_it() -> None:
    store = stored_integers(4, "symmetric", 32, (48, 64))
    model = nn.ModuleDict({"own": Scaled(64, 48), "named": Named(64, 48), "plain": nn.Linear(64, 48, bias=False)})
    for layer in model.values():
        layer.weight = nn.Parameter(Quantized(store, "int4", torch.float32), requires_grad=False)
    model.eval()
    x, biases = torch.randn(3, 64), {name: layer.bias for name, layer in model.items()}
    done = attach(model)
    assert (done.layers, done.decoded) == (2, 1)
    weight = decoded(store).float()
    assert type(model["own"]) is Scaled
    assert type(model["own"].weight.data) is torch.Tensor
    torch.testing.assert_close(model["own"](x), 2 * plain_linear(x, weight, biases["own"]))
    for name in ("named", "plain"):
        assert isinstance(model[name], QuantizedLinear)
        assert not model[name].training
        assert_near(model[name](x), plain_linear(x, weight, biases[name]))  # whose weights were rounded to BF16


def test_hooks_of_accelerate_move_along() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Double(ModelHook):
        def pre_forward(self, module: nn.Module, x: torch.Tensor) -> Any:
            return (2 * x,), {}

    store = stored_integers(8, "symmetric", 0, (48, 64))
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    model[0].weight = nn.Parameter(Quantized(store, "int8", torch.bfloat16), requires_grad=False)
    add_hook_to_module(model[0], Double())
    attach(model)
    x = torch.randn(3, 64).bfloat16()
    torch.testing.assert_close(model(x), plain_linear(2 * x, decoded(store)))


def test_a_weight_that_is_loaded_notes_where_it_goes() -> None:
    store = stored_integers(4, "symmetric", 32, (48, 64))
    weight = Quantized(store, "int4", torch.bfloat16)
    half = weight.to(torch.float16)
    away = half.to("meta")
    assert [type(w) for w in (half, away, nn.Parameter(away).detach())] == [Quantized] * 3
    assert (away.dtype, away.device.type, away.store) == (torch.float16, "meta", store)
    assert torch.equal(half[3:5], decoded(store).half()[3:5])
    assert torch.equal(torch.stack([half, half])[1], decoded(store).half())
    assert type(weight.to(torch.int32)) is torch.Tensor
    with torch.no_grad(), pytest.raises(UsageError, match="cannot be changed"):
        weight.mul_(2)


@pytest.mark.parametrize("change", [torch.float16, "meta"])
def test_a_layer_that_is_being_loaded_moves_as_any_other(change: Any) -> None:
    store = stored_integers(4, "symmetric", 32, (48, 64))
    layer = nn.Linear(64, 48, bias=False)
    layer.weight = nn.Parameter(Quantized(store, "int4", torch.bfloat16), requires_grad=False)
    assert isinstance(layer.to("cpu").weight, Quantized)
    layer.to(change)
    model = nn.Sequential(layer)
    attach(model)
    kept = model[0].quantized
    assert kept.dtype == (change if isinstance(change, torch.dtype) else torch.bfloat16)
    assert kept.words.device.type == ("meta" if change == "meta" else "cpu")


@pytest.mark.parametrize("spread", [False, True])
def test_device_maps_lead_to_the_same_model(made: Any, monkeypatch: Any, spread: bool) -> None:
    """As a load onto one GPU goes, or onto several: by way of accelerate."""
    from tcw.runtime import load as module

    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    where = dict.fromkeys(parts, "cpu") if spread else {"": "cpu"}
    for spec in ("int8:algo=rtn,targets=all", "fp8", "ecq:bits=3,allocate=equal"):
        expected = logits(packed(made(spec)))
        monkeypatch.setattr(module, "_device_map", lambda *_: where)
        assert torch.equal(logits(packed(made(spec))), expected)
        monkeypatch.undo()


def test_forms_are_built_by_the_methods_name() -> None:
    store = stored("fp8", matrix(48, 64))
    built = build("fp8", store, torch.bfloat16, quantize_activations=False)
    assert isinstance(built, Fp8Weight)
    assert built.activation == "none"
    assert isinstance(to_torch(matrix(2, 2)), torch.Tensor)


def test_packed_is_refused_where_it_makes_no_sense(zoo: Any, made: Any) -> None:
    single = SimpleNamespace(id="single", tensors=lambda: {"w": TensorInfo("w", "F32", (64, 64))})
    with pytest.raises(UsageError, match="nothing in `single` is quantised, nor a matrix in BF16"):
        residency.settle("packed", single, None, ["cpu"])  # type: ignore[arg-type]
    source = tcw.open_model(made("int8:algo=rtn"))
    for devices in (["cpu", "disk"], ["cpu", 0]):
        with pytest.raises(UsageError, match="wants the whole model on GPUs, or all of it on the CPU"):
            residency.settle("packed", source, None, devices)
    assert residency.settle("packed", source, None, [0, "cuda:1"]).residency == "packed"


def test_the_size_in_memory_is_known_beforehand(made: Any) -> None:
    source = tcw.open_model(made("int8:algo=rtn"))
    whole, kept = (residency.loaded_bytes(source, None, choice) for choice in ("bf16", "packed"))
    quantised = sum(source.tensor_bytes(n) for n in source.tensors() if residency.stays_packed(source, n))
    plain = sum(i.nbytes for n, i in source.tensors().items() if not residency.stays_packed(source, n))
    assert kept == quantised + plain < whole
    model = packed(source)
    held = sum(t.nbytes for t in [*model.parameters(), *(b for m in model.modules() for b in m._buffers.values()
                                                        if b is not None and hasattr(m, "nbytes"))])  # fmt: skip
    assert held == pytest.approx(kept, rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*SPECS, "fp8", "fp8:scale=block", "ecq:bits=3,allocate=equal"])
def test_a_gpu_says_what_the_processor_says(made: Any, spec: str) -> None:
    here, there = packed(made(spec)), tcw.load(made(spec), residency="packed", device="cuda")
    ids = torch.arange(3, 30).reshape(1, -1)
    with torch.no_grad():
        right, found = here(ids).logits.float(), there(ids.cuda()).logits.float().cpu()
    assert (found - right).norm() <= 0.03 * right.norm()
