"""What every weight method must do, found by its file: a new method is tested with no edit here."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from tcw import methods
from tcw.errors import FormatError, SourceError
from tcw.tensor import PART_DTYPES, TensorData, TensorInfo
from tcw.weights import Encoded, Statistics, WeightMethod

NAMES = methods.names("weights")
WIDTH = {"BF16": 2, "F16": 2, "F32": 4}


def gaussian(dtype: str, shape: tuple[int, ...], seed: int = 0) -> TensorData:
    """Weights as a trained layer has them."""
    values = np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)
    if dtype == "BF16":
        words = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        words = values.astype({"F16": np.float16, "F32": np.float32}[dtype])
    return TensorData(TensorInfo("model.layers.0.mlp.up_proj.weight", dtype, shape), words.reshape(-1).view(np.uint8))


def build(name: str) -> WeightMethod:
    method = methods.build(name, {})
    assert isinstance(method, WeightMethod)
    return method


def encode(name: str, tensor: TensorData) -> Encoded:
    encoded = build(name).encode(tensor)
    assert encoded is not None, "a Gaussian matrix should be worth storing"
    return encoded


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", WIDTH)
@pytest.mark.parametrize("shape", [(128, 96), (257, 129), (4, 32, 3, 33)])
def test_round_trip(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    method, tensor = build(name), gaussian(dtype, shape)
    if not method.wants(tensor.info):
        pytest.skip(f"{name} leaves {dtype} {shape} alone")
    encoded = encode(name, tensor)
    decoded = type(method).decode(tensor.info, encoded)
    assert decoded.info == tensor.info
    if method.lossless:
        assert np.array_equal(decoded.data, tensor.data)
    assert encoded.nbytes < tensor.info.nbytes
    assert set(encoded.parts) <= set(method.part_names(tensor.info))
    assert all(part.dtype.name in PART_DTYPES and part.flags.c_contiguous for part in encoded.parts.values())
    assert json.loads(json.dumps(encoded.params)) == encoded.params
    average = getattr(method, "bits", 0) * tensor.info.numel / 8  # of tensors whose bits are allocated over a model
    assert method.predict(tensor) == pytest.approx(average if method.allocates() else encoded.nbytes, rel=0.005)


@pytest.mark.parametrize("name", NAMES)
def test_same_input_same_bytes(name: str) -> None:
    first, again = (encode(name, gaussian("BF16", (300, 200))) for _ in range(2))
    assert first.params == again.params
    assert all(np.array_equal(first.parts[p], again.parts[p]) for p in first.parts)


@pytest.mark.parametrize("name", NAMES)
def test_input_is_not_touched(name: str) -> None:
    tensor = gaussian("BF16", (128, 96))
    before = tensor.data.copy()
    tensor.data.flags.writeable = False
    encode(name, tensor)
    assert np.array_equal(tensor.data, before)


@pytest.mark.parametrize("name", NAMES)
def test_parts_that_do_not_fit_are_refused(name: str) -> None:
    method, tensor = build(name), gaussian("BF16", (128, 96))
    encoded = encode(name, tensor)
    for key, part in encoded.parts.items():
        for wrong in (part[:-1], np.concatenate([part, part[-1:]]), part[:0], part.astype(np.float64)):
            with pytest.raises(FormatError):
                type(method).decode(tensor.info, Encoded({**encoded.parts, key: wrong}, encoded.params))
        rest = {k: v for k, v in encoded.parts.items() if k != key}
        with pytest.raises(FormatError):
            type(method).decode(tensor.info, Encoded(rest, encoded.params))
    for shape in ((128, 97), (1 << 24, 1 << 20), (0, 4), (64, 96)):
        with pytest.raises(FormatError):
            type(method).decode(dataclasses.replace(tensor.info, shape=shape), encoded)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", [None, "many", -1, 1 << 70, [], True, 0.5])
def test_params_that_lie_are_refused(name: str, wrong: Any) -> None:
    method, tensor = build(name), gaussian("BF16", (128, 96))
    encoded = encode(name, tensor)
    for key in encoded.params:
        with pytest.raises(FormatError):
            type(method).decode(tensor.info, Encoded(encoded.parts, {**encoded.params, key: wrong}))


@pytest.mark.parametrize("name", NAMES)
def test_class_is_a_frozen_dataclass_with_described_options(name: str) -> None:
    cls = methods.get(name)
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(f.metadata.get("help") for f in dataclasses.fields(cls))


LOSSY = [name for name in NAMES if not methods.get(name).lossless]
CALIBRATED = [name for name in LOSSY if methods.get(name).needs_calibration]


def hessian(columns: int, kind: str = "correlated") -> np.ndarray:
    """Second moments of inputs, float32 [columns, columns], good and bad."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(4 * columns, columns)) @ rng.normal(size=(columns, columns)) ** 3
    inputs[:, 3] *= 100
    h = inputs.T @ inputs / len(inputs)
    if kind == "dead inputs":
        h[5:9] = h[:, 5:9] = 0
    elif kind == "all dead":
        h[:] = 0
    elif kind == "rank one":
        h = np.outer(inputs[0], inputs[0])
    elif kind == "indefinite":
        h -= 0.5 * np.diag(np.diag(h))
    elif kind == "tiny":
        h *= 1e-30 / np.diag(h).max()
    elif kind == "huge":
        h *= 1e30 / np.diag(h).max()
    return h.astype(np.float32)


def output_error(tensor: TensorData, encoded: Encoded, name: str, h: np.ndarray) -> float:
    """tr(ΔW H ΔWᵀ) in float64."""
    delta = type(build(name)).decode(tensor.info, encoded).floats().astype(np.float64) - tensor.floats()
    return float(np.einsum("ri,ij,rj->", delta, h.astype(np.float64), delta))


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibration_makes_the_outputs_better(name: str) -> None:
    method, tensor, h = build(name), gaussian("BF16", (96, 160)), hessian(160)
    without, knowing = encode(name, tensor), method.encode(tensor, Statistics(h, tokens=640, input_max=5.0))
    assert knowing is not None
    assert knowing.nbytes == pytest.approx(without.nbytes, rel=0.02)
    assert output_error(tensor, knowing, name, h) < 0.8 * output_error(tensor, without, name, h)
    again = method.encode(tensor, Statistics(h, tokens=640, input_max=5.0))
    assert again is not None
    assert all(np.array_equal(part, again.parts[key]) for key, part in knowing.parts.items())


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("kind", ["dead inputs", "all dead", "rank one", "indefinite", "tiny", "huge"])
def test_any_hessian_gives_finite_weights(name: str, kind: str) -> None:
    tensor = gaussian("BF16", (64, 96))
    encoded = build(name).encode(tensor, Statistics(hessian(96, kind), tokens=384))
    assert encoded is not None
    decoded = type(build(name)).decode(tensor.info, encoded).floats()
    assert np.isfinite(decoded).all()
    if kind not in ("rank one", "all dead"):
        assert np.linalg.norm(decoded - tensor.floats()) < 1.5 * np.linalg.norm(tensor.floats())


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_an_error(name: str, bad: float) -> None:
    values = gaussian("BF16", (64, 96)).floats()
    values[7, 9] = bad
    info = TensorInfo("model.layers.0.mlp.up_proj.weight", "BF16", (64, 96))
    with pytest.raises(SourceError, match=r"up_proj.weight"):
        build(name).encode(TensorData.of_floats(info, values))


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("shape", [(64, 96), (33, 100), (128, 32)])
@pytest.mark.parametrize("dtype", WIDTH)
def test_what_is_all_zeros_stays_so(name: str, shape: tuple[int, int], dtype: str) -> None:
    tensor = gaussian(dtype, shape)
    values = tensor.floats()
    values[3] = 0
    tensor = TensorData.of_floats(tensor.info, values)
    encoded = build(name).encode(tensor)
    if encoded is not None:
        assert not type(build(name)).decode(tensor.info, encoded).floats()[3].any()
    nothing = build(name).encode(TensorData.of_floats(tensor.info, np.zeros(shape, np.float32)))
    if nothing is not None:
        assert not type(build(name)).decode(tensor.info, nothing).floats().any()
