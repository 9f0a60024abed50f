"""int8, int4 and int2 as methods: options, hostile weights, what calibration buys."""

from typing import Any

import numpy as np
import pytest

from tcw import methods
from tcw.codecs import compiled
from tcw.errors import SourceError, UsageError
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Statistics, WeightMethod
from tcw.weights._integer import IntegerMethod

NAME = "model.layers.3.self_attn.v_proj.weight"
BITS = {"int8": 8, "int4": 4, "int2": 2}


def build(name: str, **options: Any) -> IntegerMethod:
    method = methods.build(name, options)
    assert isinstance(method, IntegerMethod)
    return method


def tensor(values: np.ndarray, dtype: str = "BF16", name: str = NAME) -> TensorData:
    return TensorData.of_floats(TensorInfo(name, dtype, values.shape), values)


def gaussian(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


def correlated(width: int, seed: int = 0) -> Statistics:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(2000, width)) @ (rng.normal(size=(width, width)) * np.linspace(1, 0.03, width)[:, None])
    return Statistics(hessian=(inputs.T @ inputs / 2000).astype(np.float32), tokens=2000)


def decoded(method: WeightMethod, given: TensorData, statistics: Statistics | None = None) -> np.ndarray:
    encoded = method.encode(given, statistics)
    assert encoded is not None
    assert encoded.nbytes == method.predict(given)
    assert set(encoded.parts) <= set(method.part_names(given.info))
    return type(method).decode(given.info, encoded).floats()


def lost(weights: np.ndarray, back: np.ndarray, statistics: Statistics) -> float:
    assert statistics.hessian is not None
    error = (weights - back).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", error, statistics.hessian.astype(np.float64), error))


GRIDS = [("int8", "symmetric"), ("int8", "zero"), ("int4", "symmetric"), ("int4", "zero"), ("int2", "float"),
         ("int2", "midrise"), ("int2", "zero")]  # fmt: skip


@pytest.mark.parametrize(("name", "grid"), GRIDS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", [(64, 96), (33, 131), (1, 200), (50, 32)])
@pytest.mark.parametrize("known", [True, False])
def test_every_grid_dtype_and_shape(name: str, grid: str, dtype: str, shape: tuple[int, int], known: bool) -> None:
    given = tensor(gaussian(shape), dtype)
    back = decoded(build(name, grid=grid, group_size=48), given, correlated(shape[1]) if known else None)
    error = ((back - given.floats()) ** 2).mean() / 0.02**2
    assert error < {8: 2e-4, 4: 0.05, 2: 0.6}[BITS[name]]


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_damaged_weights_are_refused_by_name(name: str, bad: float) -> None:
    values = gaussian((40, 64))
    values[2, 3] = bad
    for statistics in (None, correlated(64)):
        with pytest.raises(SourceError, match="v_proj"):
            build(name).encode(tensor(values), statistics)


@pytest.mark.parametrize("name", BITS)
def test_a_hessian_that_is_no_number_means_none(name: str) -> None:
    given, broken = tensor(gaussian((40, 64))), correlated(64).hessian
    assert broken is not None
    broken[0, 0] = np.nan
    assert np.array_equal(decoded(build(name), given, Statistics(hessian=broken)), decoded(build(name), given))


@pytest.mark.parametrize(("name", "grid"), GRIDS)
def test_zeros_stay_zeros(name: str, grid: str) -> None:
    values = gaussian((48, 96))
    values[5], values[:, 7] = 0, 0
    back = decoded(build(name, grid=grid, group_size=32), tensor(values), correlated(96))
    assert not back[5].any()
    assert np.isfinite(back).all()
    assert not decoded(build(name, grid=grid), tensor(np.zeros((48, 96), np.float32))).any()


@pytest.mark.parametrize("name", BITS)
def test_a_dead_input_does_no_harm(name: str) -> None:
    statistics = correlated(96)
    assert statistics.hessian is not None
    statistics.hessian[10], statistics.hessian[:, 10] = 0, 0
    back = decoded(build(name, group_size=32), tensor(gaussian((48, 96))), statistics)
    assert np.abs(back).max() < 0.2


@pytest.mark.parametrize("group_size", [0, 64])
def test_int4_by_gptq_hurts_the_output_less_than_rounding(group_size: int) -> None:
    given, statistics = tensor(gaussian((128, 256))), correlated(256)
    rounded = decoded(build("int4", algo="rtn", group_size=group_size), given)
    calibrated = decoded(build("int4", group_size=group_size), given, statistics)
    limit = 0.75 * lost(given.floats(), rounded, statistics)
    assert lost(given.floats(), calibrated, statistics) <= limit


def test_int2_hurts_the_output_less_than_plain_gptq_at_no_more_bits() -> None:
    given, statistics = tensor(gaussian((128, 256))), correlated(256)
    plain = build("int2", grid="zero", group_size=64, tune=0)
    ours = build("int2")
    assert ours.predict(given) <= plain.predict(given)
    gptq, better = (decoded(m, given, statistics) for m in (plain, ours))
    assert lost(given.floats(), better, statistics) <= 0.9 * lost(given.floats(), gptq, statistics)


@pytest.mark.parametrize("name", BITS)
def test_rtn_takes_no_notice_of_statistics(name: str) -> None:
    method, given = build(name, algo="rtn"), tensor(gaussian((40, 64)))
    assert not method.calibrates()
    assert build(name).calibrates()
    assert np.array_equal(decoded(method, given, correlated(64)), decoded(method, given))


@pytest.mark.parametrize("name", BITS)
def test_threads_do_not_change_the_codes(name: str) -> None:
    given, statistics = tensor(gaussian((100, 300))), correlated(300)
    try:
        results = []
        for threads in (1, 3):
            compiled.set_threads(threads)
            results.append(decoded(build(name, group_size=64), given, statistics))
    finally:
        compiled.set_threads(0)
    assert np.array_equal(results[0], results[1])


@pytest.mark.parametrize("name", BITS)
def test_targets(name: str) -> None:
    head = TensorInfo("lm_head.weight", "BF16", (96, 64))
    linear = TensorInfo(NAME, "BF16", (96, 64))
    assert build(name).wants(linear)
    assert not build(name).wants(head)
    assert build(name, targets="embedding").wants(head)
    assert not build(name, targets="embedding").wants(linear)
    assert build(name, targets="all").wants(head)


def test_only_int2_rotates() -> None:
    assert build("int2").rotates()
    assert not build("int2", rotate=False).rotates()
    assert not build("int4").rotates()
    assert not build("int8").rotates()


@pytest.mark.parametrize("name", BITS)
def test_what_cannot_be_quantised_is_kept(name: str) -> None:
    for dtype, shape in (("I32", (64, 64)), ("F64", (64, 64)), ("BF16", (4, 8, 8)), ("BF16", (0, 64))):
        info = TensorInfo(NAME, dtype, shape)
        given = TensorData(info, np.zeros(info.nbytes, np.uint8))
        assert build(name).encode(given) is None
        assert build(name).predict(given) == info.nbytes


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int4", {"group_size": -1}), ("int4", {"group_size": 4}), ("int4", {"damp": -0.1}), ("int4", {"damp": 2.0}),
        ("int4", {"tune": -1}), ("int8", {"group_size": 1 << 40}), ("int2", {"grid": "symmetric"}),
        ("int2", {"algo": "awq"}), ("int8", {"algo": "best"}), ("int4", {"targets": "heads"}), ("int2", {"tune": 5000}),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        build(name, **options)
