"""The reader of ONNX files that benchmarks/dinov2.py has for itself."""

import importlib.util
import struct
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "benchmarks" / "dinov2.py"


@pytest.fixture(scope="module")
def dinov2():
    spec = importlib.util.spec_from_file_location("benchmark_dinov2", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def number(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(at, value):
    if isinstance(value, int):
        return number(at << 3) + number(value)
    return number(at << 3 | 2) + number(len(value)) + value


def tensor(name, values, kind=1):
    dims = b"".join(field(1, size) for size in values.shape)
    return field(5, dims + field(2, kind) + field(8, name.encode()) + field(9, values.numpy().tobytes()))


def node(name, kind, *inputs):
    return field(1, b"".join(field(1, i.encode()) for i in inputs) + field(3, name.encode()) + field(4, kind.encode()))


def model(*parts):
    return field(1, 9) + field(2, b"somebody") + field(7, b"".join(parts))


def test_varints_of_any_length(dinov2):
    for value in (0, 1, 127, 128, 300, 2**32, 2**63 + 5):
        assert dinov2.varint(memoryview(number(value)), 0) == (value, len(number(value)))


def test_tensors_and_who_uses_them(dinov2):
    weight, ids = torch.randn(3, 4), torch.arange(4)
    data = model(
        tensor("onnx::MatMul_7", weight),
        tensor("ids", ids, kind=7),
        node("/backbone/mlp/fc1/MatMul", "MatMul", "x", "onnx::MatMul_7"),
        node("/backbone/mlp/Add", "Add", "x", "y"),
    )
    onnx = dinov2.read_onnx(data)
    assert list(onnx.tensors) == ["onnx::MatMul_7"]
    assert torch.equal(onnx.tensors["onnx::MatMul_7"], weight)
    assert onnx.operands == {"/backbone/mlp/fc1/MatMul": ["onnx::MatMul_7"]}


def test_names_come_from_the_nodes(dinov2):
    weight, bias = torch.randn(3, 4), torch.randn(4)
    first, positions = torch.randn(1, 1, 2), torch.randn(1, dinov2.POSITIONS**2, 2)
    state = dinov2.state_dict(
        dinov2.read_onnx(
            model(
                tensor("backbone.encoder.layer.0.mlp.fc1.bias", bias),
                tensor("decoder.weight", bias),
                tensor("onnx::MatMul_7", weight),
                tensor("onnx::Concat_1", first),
                tensor("onnx::Reshape_2", positions),
                node("/backbone/encoder/layer.0/mlp/fc1/MatMul", "MatMul", "x", "onnx::MatMul_7"),
                node("/backbone/embeddings/Reshape_1", "Reshape", "onnx::Reshape_2", "shape"),
                node("/backbone/embeddings/Concat_6", "Concat", "onnx::Concat_1", "patches"),
            )
        )
    )
    layer = "encoder.layer.0.mlp.fc1"
    assert set(state) == {
        f"{layer}.weight", f"{layer}.bias", "embeddings.position_embeddings", "embeddings.mask_token",
    }  # fmt: skip
    assert torch.equal(state[f"{layer}.weight"], weight.T)
    assert torch.equal(state["embeddings.position_embeddings"], torch.cat([first, positions], 1))


def test_a_file_that_is_cut_off(dinov2):
    data = model(tensor("w", torch.randn(2, 2)), node("/n", "MatMul", "x", "w"))
    dinov2.read_onnx(data)
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"protobuf|ONNX"):
            dinov2.read_onnx(data[:length])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (number(7 << 3 | 3), "wire type"),
        (b"\xff" * 11, "does not end"),
        (number(7 << 3 | 2) + number(2**40) + b"x", "longer than its message"),
        (field(7, 5), "integer where a message"),
        (model(field(5, field(1, 3) + field(2, 1) + field(8, b"w") + field(9, struct.pack("<f", 1.0)))), "4 bytes"),
        (model(field(5, field(1, b"\x01") + field(2, 1) + field(8, b"w") + field(9, b"abcd"))), "4 bytes"),
    ],
)
def test_a_file_that_says_what_it_does_not_have(dinov2, data, message):
    with pytest.raises(ValueError, match=message):
        dinov2.read_onnx(data)
