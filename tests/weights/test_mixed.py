"""Mixed precision: the width follows the bits that a tensor is given, and sharing them out pays."""

from typing import Any

import numpy as np
import pytest

from tcw import methods
from tcw.errors import UsageError
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Curve, Statistics
from tcw.weights.mixed import Mixed

LINEAR = "model.layers.{}.mlp.down_proj.weight"


def build(**options: Any) -> Mixed:
    method = methods.build("mixed", options)
    assert isinstance(method, Mixed)
    return method


def tensor(shape: tuple[int, int], name: str = LINEAR.format(0), size: float = 0.02, seed: int = 0) -> TensorData:
    values = np.random.default_rng(seed).normal(0, size, shape).astype(np.float32)
    return TensorData.of_floats(TensorInfo(name, "BF16", shape), values)


def statistics(width: int, bits: float | None = None) -> Statistics:
    rng = np.random.default_rng(width)
    inputs = rng.normal(size=(1500, width)) @ (rng.normal(size=(width, width)) * np.linspace(1, 0.1, width)[:, None])
    return Statistics(hessian=(inputs.T @ inputs / 1500).astype(np.float32), tokens=1500, bits=bits)


@pytest.mark.parametrize(
    ("bits", "width"), [(0.5, 2), (2.2, 2), (2.6, 2), (2.7, 3), (3.6, 3), (3.7, 4), (6.1, 4), (6.2, 8), (99.0, 8)]
)
def test_the_width_is_the_nearest_in_real_bits(bits: float, width: int) -> None:
    encoded = build().encode(tensor((64, 256)), statistics(256, bits))
    assert encoded is not None
    assert encoded.params["bits"] == width


@pytest.mark.parametrize(("bits", "width"), [(2.0, 2), (3.0, 3), (4.0, 4), (9.0, 8)])
def test_without_calibration_it_is_the_average(bits: float, width: int) -> None:
    for given in (None, Statistics()):
        encoded = build(bits=bits).encode(tensor((64, 256)), given)
        assert encoded is not None
        assert encoded.params["bits"] == width
        assert encoded.nbytes == build(bits=bits, algo="rtn").predict(tensor((64, 256)))
    assert build(bits=bits).predict(tensor((64, 256))) == bits * 64 * 256 / 8  # what widths are shared out to


@pytest.mark.parametrize("bits", [2.0, 3.0])
def test_embeddings_keep_four_bits(bits: float) -> None:
    table = tensor((300, 64), "model.embed_tokens.weight")
    method = build(bits=bits)
    encoded = method.encode(table, Statistics(bits=2.0))
    assert encoded is not None
    assert encoded.params["bits"] == 4
    assert len(method.probe(table, Statistics(hessian=None))) == 2


def test_probe_counts_real_bits_and_output_errors() -> None:
    given, known = tensor((300, 200)), statistics(200)
    method = build(group_size=64)
    curve = method.probe(given, known)
    assert len(curve) == 4
    for bits, (real, errors) in zip((2, 3, 4, 8), curve.items(), strict=True):
        encoded = method.encode(given, Statistics(hessian=known.hessian, bits=real))
        assert encoded is not None
        assert encoded.params["bits"] == bits
        assert encoded.nbytes * 8 / 60000 == pytest.approx(real)
        assert errors.shape == (300,)
        assert errors.dtype == np.float64
    sums = [e.sum() for e in curve.values()]
    assert sums == sorted(sums, reverse=True)


def test_sharing_out_bits_beats_the_same_for_all() -> None:
    """Some layers matter a hundred times as much as others: with the same bytes in all, less is lost."""
    method = build(bits=3.2, group_size=64)
    weight = [100.0, 1.0, 1.0, 1.0, 10.0, 0.1]
    layers = [tensor((96, 256), LINEAR.format(k), seed=k) for k in range(len(weight))]
    known = statistics(256)
    curves = []
    for layer, matters in zip(layers, weight, strict=True):
        damage = {bits: matters * float(error.sum()) for bits, error in method.probe(layer, known).items()}
        curves.append(Curve(layer.info.name, layer.info.numel, damage))
    chosen = method.share_out(curves)
    assert set(chosen) == {layer.info.name for layer in layers}

    def total(bits_of: dict[str, float]) -> tuple[float, int]:
        lost, size = 0.0, 0
        assert known.hessian is not None
        for layer, matters in zip(layers, weight, strict=True):
            encoded = method.encode(layer, Statistics(hessian=known.hessian, bits=bits_of[layer.info.name]))
            assert encoded is not None
            error = (layer.floats() - Mixed.decode(layer.info, encoded).floats()).astype(np.float64)
            lost += matters * float(np.einsum("ij,jk,ik->", error, known.hessian.astype(np.float64), error))
            size += encoded.nbytes
        return lost, size

    mixed, size = total(chosen)
    uniform, most = total({layer.info.name: 3.2 for layer in layers})
    assert size * 8 <= 3.2 * 96 * 256 * len(layers)
    assert size <= most
    assert mixed < 0.6 * uniform


def test_it_allocates_only_when_it_calibrates() -> None:
    assert build().allocates()
    assert not build(algo="rtn").allocates()


@pytest.mark.parametrize("options", [{"bits": 1.5}, {"bits": 12.0}, {"bits": float("nan")}, {"group_size": 3}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        build(**options)
