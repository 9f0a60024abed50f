"""ecq: the loops against slow float64 references, the rate in real bytes, and what each idea is there for."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from tcw import methods
from tcw.codecs import huffman
from tcw.errors import FormatError, UsageError
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Curve, Encoded, Statistics
from tcw.weights import _ecq_code as code
from tcw.weights._ecq_fit import Layer, distortion, rate
from tcw.weights._sic import TAPS, points, sweep
from tcw.weights.ecq import Ecq

MEMORIES = sorted(TAPS)


def tensor(shape: tuple[int, int], dtype: str = "BF16", seed: int = 0) -> TensorData:
    values = np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)
    return TensorData.of_floats(TensorInfo("model.layers.0.mlp.up_proj.weight", dtype, shape), values)


def hessian(size: int, seed: int = 1) -> np.ndarray:
    """Second moments of correlated inputs whose channels differ in size."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(size, size)) * np.exp(rng.normal(size=size))
    inputs = rng.normal(size=(4 * size, size)) @ mix
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def values(encoded: Encoded, of: TensorData) -> np.ndarray:
    return Ecq.decode(of.info, encoded).floats().astype(np.float64)


def errors(of: TensorData, encoded: Encoded, H: np.ndarray) -> np.ndarray:
    """Squared error of each output."""
    delta = values(encoded, of) - of.floats()
    return ((delta @ H.astype(np.float64)) * delta).sum(axis=1)


def made(method: Ecq, of: TensorData, statistics: Statistics | None = None) -> Encoded:
    encoded = method.encode(of, statistics)
    assert encoded is not None
    return encoded


def real_bits(encoded: Encoded, of: TensorData) -> float:
    return 8 * encoded.nbytes / of.info.numel


# the loops


def slow_points(labels: np.ndarray, memory: int) -> np.ndarray:
    """The definition in the docstring of _sic, row by row."""
    result = np.empty(labels.shape)
    for i, column in enumerate(labels):
        mirrored = []
        for t, z in enumerate(column):
            s = mirrored[t - memory] if t >= memory else 0
            for k in range(1, memory):
                if TAPS[memory] >> (k - 1) & 1 and t >= k:
                    s ^= int(column[t - k]) & 1
            mirrored.append(s)
            result[i, t] = -(2 * z - 0.5) if s else 2 * z - 0.5
    return result


@pytest.mark.parametrize("memory", [m for m in MEMORIES if m])
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 193])
def test_points_are_what_the_definition_says(memory: int, rows: int) -> None:
    labels = np.random.default_rng(rows).integers(-9, 9, (5, rows)).astype(np.int32)
    assert np.array_equal(points(labels, memory), slow_points(labels, memory))


@pytest.mark.parametrize("memory", [m for m in MEMORIES if m])
def test_the_search_finds_the_nearest_points(memory: int) -> None:
    """Against all labels of -2..2 for five rows."""
    targets = np.random.default_rng(memory).uniform(-2.5, 2.5, (20, 5)).astype(np.float32)
    every = np.array(list(itertools.product(range(-2, 3), repeat=5)), np.int32)
    there = slow_points(every, memory)
    for row in targets:
        found = sweep(row[None].copy(), np.eye(1, dtype=np.float32), np.ones(1, np.float32), memory)
        error = np.square(points(found, memory)[0] - row).sum()
        assert error == pytest.approx(np.square(there - row).sum(axis=1).min(), rel=1e-5)


def slow_sic(W: np.ndarray, L: np.ndarray, c: float, quantise: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The formulas of ecq's docstring, in float64, a column at a time. Returns the points."""
    Y = W @ L
    found = np.zeros(W.shape)
    for i in range(W.shape[1] - 1, -1, -1):
        q = quantise(Y[:, i] / c)
        found[:, i] = q
        gamma = max(0.0, (Y[:, i] @ q) / (c * (q @ q))) if q.any() else 0.0
        Y -= np.outer(gamma * c / L[i, i] * q, L[i])
    return found


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("columns", [5, 64, 150])
def test_sic_against_float64(memory: int, columns: int) -> None:
    W = np.random.default_rng(0).normal(size=(40, columns))
    H = hessian(columns).astype(np.float64)
    L = np.linalg.cholesky(H / np.diag(H).mean() + 0.01 * np.eye(columns))
    c = 0.3

    def quantise(v: np.ndarray) -> np.ndarray:
        if memory == 0:
            return np.rint(v)
        one = np.ones(1, np.float32)
        return points(sweep(v.astype(np.float32)[None], one[None], one, memory), memory)[0].astype(np.float64)

    Y = np.ascontiguousarray((W @ L).T, np.float32)
    labels = sweep(Y, L.astype(np.float32), np.full(columns, c, np.float32), memory)
    assert (
        np.mean(points(labels, memory) == slow_sic(W, L, c, quantise).T) > 0.995
    )  # float32 decides some ties elsewise


@pytest.mark.parametrize(("memory", "above"), [(0, 0.265), (2, 0.10), (4, 0.075), (6, 0.055)])
@pytest.mark.parametrize("step", [0.35, 0.8])
def test_a_trellis_comes_nearer_to_the_bound(memory: int, above: float, step: float) -> None:
    """Entropy and error of a Gaussian source: bits above ½ log2(σ²/D)."""
    source = np.random.default_rng(0).normal(size=(64, 2000)).astype(np.float32)
    steps = np.full(64, step * (1 if memory else 2), np.float32)
    labels = sweep(source.copy(), np.eye(64, dtype=np.float32), steps, memory)
    found = points(labels, memory) * steps[0]
    gain = (found * source).sum() / np.square(found).sum()
    bits = huffman.entropy(np.bincount((labels - labels.min()).reshape(-1)))
    gap = bits + 0.5 * np.log2(np.square(source - gain * found).mean())
    assert 0 < gap < above
    if memory in (0, 6):
        ones = np.ones(1)
        assert rate(ones, steps[:1], memory > 0) == pytest.approx(bits, abs=0.04)
        assert distortion(ones, steps[:1], memory > 0) == pytest.approx(
            np.square(source - gain * found).mean(), rel=0.06
        )


def test_fitted_scales_are_the_best_there_are() -> None:
    """At the end of the turns no row's scale can be bettered, and columns hardly."""
    of, H = tensor((48, 96)), hessian(96)
    layer = Layer.of(of.floats(), Statistics(H, 400), 0.01, drift=False)
    steps = np.full(96, 0.5 * layer.spread.mean())
    where = points(layer.labels(steps, 4), 4)
    rows, columns = layer.scales(where, steps)

    def loss(rows: np.ndarray, columns: np.ndarray) -> float:
        delta = where.T * columns * rows[:, None] - of.floats()
        return float(np.einsum("ri,ij,rj->", delta, layer.hessian, delta))

    best = loss(rows, columns)
    assert best < loss(np.ones(48), steps / np.diag(layer.factor))
    for k in range(0, 48, 7):
        for factor in (0.97, 1.03):
            assert loss(rows * np.where(np.arange(48) == k, factor, 1), columns) > best
    for k in range(0, 96, 7):
        for factor in (0.9, 1.1):
            assert loss(rows, columns * np.where(np.arange(96) == k, factor, 1)) > best * 0.9999


# the rate


@pytest.mark.parametrize("bits", [1.5, 2.1, 2.5, 3.1, 5.3, 8.0])
@pytest.mark.parametrize("shape", [(192, 576), (301, 133)])
def test_rate_is_met_in_real_bytes(bits: float, shape: tuple[int, int]) -> None:
    of = tensor(shape)
    for statistics in (None, Statistics(hessian(shape[1]), 2048, gradient=np.geomspace(1, 30, shape[0]))):
        assert real_bits(made(Ecq(bits=bits), of, statistics), of) == pytest.approx(bits, abs=0.005)


@pytest.mark.parametrize("options", [{"trellis": 0}, {"trellis": 3}, {"step": "uniform"}, {"damp": 0.01}])
def test_rate_is_met_with_any_options(options: dict[str, object]) -> None:
    of = tensor((256, 300))
    encoded = made(methods.build("ecq", {"bits": 2.6, **options}), of, Statistics(hessian(300), 999))  # type: ignore[arg-type]
    assert real_bits(encoded, of) == pytest.approx(2.6, abs=0.005)


def test_bits_that_were_allocated_come_first() -> None:
    of = tensor((192, 256))
    encoded = made(Ecq(bits=2.0), of, Statistics(hessian(256), 999, bits=3.456))
    assert real_bits(encoded, of) == pytest.approx(3.456, abs=0.005)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_more_bits_less_error(dtype: str) -> None:
    of, H = tensor((160, 192), dtype), hessian(192)
    found = [errors(of, made(Ecq(bits=b), of, Statistics(H, 999)), H).sum() for b in (1.5, 2.0, 3.0, 4.0, 6.0)]
    assert all(after < 0.6 * before for before, after in itertools.pairwise(found))


def test_what_would_grow_is_left_alone() -> None:
    of = tensor((32, 32))
    encoded = Ecq(bits=1.5).encode(of)
    assert encoded is None or encoded.nbytes < of.info.nbytes


# what each idea is for


def test_a_trellis_has_less_error_at_the_same_bytes() -> None:
    of, H = tensor((384, 384)), hessian(384)
    plain, trellis = (errors(of, made(Ecq(bits=2.5, trellis=m), of, Statistics(H, 999)), H).sum() for m in (0, 6))
    assert trellis < 0.8 * plain


def test_waterfilling_has_less_error_at_the_same_bytes() -> None:
    of, H = tensor((256, 256)), hessian(256)
    even, water = (
        errors(of, made(Ecq(bits=2.5, step=s), of, Statistics(H, 999)), H).sum() for s in ("uniform", "waterfill")
    )
    assert water < even


def test_rows_that_matter_more_get_finer_steps() -> None:
    of, H = tensor((256, 256)), hessian(256)
    gradient = np.geomspace(1, 100, 256).astype(np.float32)
    plain = errors(of, made(Ecq(bits=2.5), of, Statistics(H, 999)), H)
    fisher = errors(of, made(Ecq(bits=2.5), of, Statistics(H, 999, gradient=gradient)), H)
    assert (gradient * fisher).sum() < 0.8 * (gradient * plain).sum()
    assert fisher[-32:].sum() < 0.5 * plain[-32:].sum()


def test_drift_makes_up_for_what_went_wrong_before() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=(2000, 128)) @ np.linalg.cholesky(hessian(128)).T
    now = 0.9 * before + 0.3 * before.std(axis=0) * rng.normal(size=before.shape)
    H, D = now.T @ now / 2000, (before - now).T @ now / 2000
    of = tensor((96, 128), "F32")

    def output_error(encoded: Encoded) -> float:
        return float(np.square(before @ of.floats().T - now @ values(encoded, of).T).mean())

    statistics = Statistics(H.astype(np.float32), 2000, drift=D.astype(np.float32))
    without, corrected = (output_error(made(Ecq(bits=4.0, drift=d), of, statistics)) for d in (False, True))
    assert corrected < 0.95 * without
    assert Ecq(drift=True).wants_drift()
    assert not Ecq(drift=False).wants_drift()


def test_dead_inputs_cost_nothing() -> None:
    of, H = tensor((192, 256)), hessian(256)
    H[100:150] = H[:, 100:150] = 0
    encoded = made(Ecq(bits=2.5), of, Statistics(H, 999))
    alive = TensorData.of_floats(TensorInfo("w", "BF16", (192, 206)), np.delete(of.floats(), range(100, 150), axis=1))
    H_alive = np.delete(np.delete(H, range(100, 150), 0), range(100, 150), 1)
    most = errors(alive, made(Ecq(bits=2.5), alive, Statistics(H_alive, 999)), H_alive).sum()
    assert errors(of, encoded, H).sum() < most


def test_zero_rows_and_columns_stay_zero() -> None:
    of = tensor((128, 160))
    W = of.floats()
    W[7] = 0
    W[:, [0, 44, 159]] = 0
    of = TensorData.of_floats(of.info, W)
    decoded = values(made(Ecq(bits=3.0), of, None), of)
    assert not decoded[7].any()
    assert not decoded[:, [0, 44, 159]].any()
    assert np.isfinite(decoded).all()


def test_a_massive_channel_becomes_literals() -> None:
    of, H = tensor((256, 256)), hessian(256)
    H[9] *= 3000
    H[:, 9] *= 3000
    encoded = made(Ecq(bits=2.5), of, Statistics(H, 999))
    assert encoded.parts["escapes"].size > 200
    assert real_bits(encoded, of) == pytest.approx(2.5, abs=0.005)
    assert errors(of, encoded, H).sum() < 1e-3 * np.einsum("ri,ij,rj->", of.floats(), H, of.floats())


def test_a_hessian_that_is_not_finite_counts_as_none() -> None:
    of, H = tensor((64, 96)), hessian(96)
    H[3, 4] = np.nan
    assert np.array_equal(values(made(Ecq(), of, Statistics(H, 99)), of), values(made(Ecq(), of), of))


# sharing out bits


def test_probe_foretells_the_error() -> None:
    of, H = tensor((256, 320)), hessian(320)
    ladder = Ecq().probe(of, Statistics(H, 999))
    assert list(ladder) == sorted(ladder, reverse=True)
    assert all(error.shape == (256,) and error.dtype == np.float64 for error in ladder.values())
    known = sorted(ladder)
    for bits in (2.0, 3.0, 5.0):
        expected = np.exp(np.interp(bits, known, [np.log(ladder[b].sum()) for b in known]))
        got = errors(of, made(Ecq(bits=bits), of, Statistics(H, 999)), H).sum()
        assert 0.5 * np.log2(got / expected) == pytest.approx(0, abs=0.25)  # bits


def test_allocation_keeps_the_total() -> None:
    curves = [Curve(n, 1000, {b: scale * 4.0**-b for b in (1.0, 3.0, 8.0)}) for n, scale in (("a", 1.0), ("b", 64.0))]
    bits = Ecq(bits=3.0).share_out(curves)
    assert bits["a"] + bits["b"] == pytest.approx(6.0)
    assert bits["b"] - bits["a"] == pytest.approx(3.0, abs=0.01)
    assert Ecq().allocates()
    assert not Ecq(allocate="equal").allocates()


# what is stored


def labels_of(spread: np.ndarray, seed: int = 0) -> np.ndarray:
    return np.rint(np.random.default_rng(seed).normal(size=spread.shape) * spread).astype(np.int32)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 5.0, 60.0, 3000.0])
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (64, 192), (300, 301)])
def test_labels_come_back(scale: float, shape: tuple[int, int]) -> None:
    labels = labels_of(np.full(shape, scale))
    labels[-1, -1] = 123_456_789 if scale else 0
    chosen = code.plan(labels, labels.astype(np.float32))
    parts, params = code.encode(labels, chosen)
    assert np.array_equal(code.decode(parts, params, shape[1], shape[0]), labels)
    stored = sum(p.nbytes for key, p in parts.items() if key != "side")
    assert chosen.nbytes == pytest.approx(stored, rel=0.03, abs=60)


def test_classes_and_pairs_are_used_where_they_pay() -> None:
    rng = np.random.default_rng(0)
    alike = labels_of(np.full((512, 512), 0.6))
    uneven = labels_of(np.exp(rng.normal(size=(512, 1)) + 0.5 * rng.normal(size=(1, 512))))
    wide = labels_of(np.full((512, 512), 9.0))
    plans = [code.plan(z, z.astype(np.float32)) for z in (alike, uneven, wide)]
    assert [p.pair for p in plans] == [True, True, False] or not plans[2].pair
    assert plans[0].pair
    assert plans[0].classes.count == 1
    assert plans[1].classes.count > 3
    parts, params = code.encode(uneven, plans[1])
    one = dataclasses.replace(plans[1], classes=dataclasses.replace(plans[1].classes, tables=np.zeros(31, np.uint8)))
    assert sum(p.nbytes for p in parts.values()) < 0.95 * sum(p.nbytes for p in code.encode(uneven, one)[0].values())
    assert len(parts["table"]) == plans[1].classes.count
    assert "pair" in code.encode(alike, plans[0])[1]
    assert params["max_length"] == 12


def test_a_changed_byte_is_refused_or_harmless() -> None:
    """No byte of the small parts can make the decoder fail in another way than FormatError."""
    of, H = tensor((96, 128)), hessian(128)
    H[9] *= 1000
    H[:, 9] *= 1000
    encoded = made(Ecq(bits=2.5), of, Statistics(H, 999))
    assert "escapes" in encoded.parts
    refused = 0
    for name in ("index", "side", "escapes", "table", "codes", "scales"):
        part = encoded.parts[name]
        for at in range(0, part.size, max(1, part.size // 40)):
            wrong = part.copy()
            wrong.reshape(-1)[at] ^= 0x55
            try:
                decoded = Ecq.decode(of.info, Encoded({**encoded.parts, name: wrong}, encoded.params))
                assert decoded.info == of.info
            except FormatError:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("ranges", [[np.nan, 0, 0, 0], [0, np.inf, 0, 0], [200, 0, 0, 0]])
def test_scales_that_cannot_be_are_refused(ranges: list[float]) -> None:
    of = tensor((64, 64))
    encoded = made(Ecq(), of)
    with pytest.raises(FormatError, match="ranges"):
        Ecq.decode(of.info, Encoded({**encoded.parts, "ranges": np.array(ranges, np.float32)}, encoded.params))


@pytest.mark.parametrize("options", [{"bits": 1.0}, {"bits": 9.0}, {"trellis": 1}, {"damp": 0.0}, {"allocate": "no"}])
def test_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        methods.build("ecq", options)
