"""FP8: the conversion against torch and against a search for the nearest value, scales, entropy coding, bad input."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcw import methods
from tcw.codecs.pieces import run
from tcw.errors import FormatError, SourceError, UsageError
from tcw.source import open_source
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Encoded, Statistics
from tcw.weights._fp8 import VALUES, to_e4m3
from tcw.weights.fp8 import Fp8

NAME = "model.layers.0.mlp.up_proj.weight"
ALL = [Fp8(scale=s, entropy=e) for s in ("channel", "tensor", "block") for e in (False, True)]


def tensor(values: np.ndarray, dtype: str = "BF16", name: str = NAME) -> TensorData:
    return TensorData.of_floats(TensorInfo(name, dtype, values.shape), values)


def gaussian(shape: tuple[int, int], dtype: str = "BF16", sigma: float = 0.02) -> TensorData:
    rng = np.random.default_rng(0)
    return tensor(rng.normal(0, sigma, shape) * np.exp(rng.normal(0, 1, (shape[0], 1))), dtype)


def through_torch(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


# ---- the conversion


def test_every_byte_is_what_torch_says() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(VALUES.view(np.uint32) & 0x7FC00000, theirs.view(np.uint32) & 0x7FC00000)
    finite = ~np.isnan(theirs)
    assert finite.sum() == 254
    assert np.array_equal(VALUES[finite].view(np.uint32), theirs[finite].view(np.uint32))


def test_every_bf16_pattern_rounds_as_in_torch() -> None:
    values = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    number = ~np.isnan(values)
    assert np.array_equal(to_e4m3(values)[number], through_torch(values[number]))
    assert (to_e4m3(values)[~number] & 0x7F == 0x7F).all()


def test_float32_around_every_tie() -> None:
    positive = np.sort(VALUES[np.isfinite(VALUES) & (VALUES >= 0)])
    ties = ((positive[:-1].astype(np.float64) + positive[1:]) / 2).astype(np.float32)
    near = np.concatenate([np.nextafter(ties, np.float32(x)) for x in (-np.inf, np.inf)] + [ties, positive])
    near = np.concatenate([near, -near, np.float32([449, 463.9, 464, 479, 480, 1e30, np.inf, -np.inf, 1e-45])])
    assert np.array_equal(to_e4m3(near), through_torch(near))
    for value, code in zip(near.astype(np.float64), to_e4m3(near), strict=True):  # the slow way: look at all values
        distance = np.abs(np.clip(value, -448, 448) - VALUES[:0x7F].astype(np.float64) * (-1 if code & 0x80 else 1))
        nearest = np.flatnonzero(distance == distance.min())
        assert code & 0x7F == (nearest[0] if len(nearest) == 1 else nearest[nearest % 2 == 0][0])


# ---- the method


def truncated(values: np.ndarray) -> np.ndarray:
    """To BF16 towards zero, in float64."""
    words = values.astype(np.float32).view(np.uint32) & 0xFFFF0000
    return words.view(np.float32).astype(np.float64)


def rounded(w: np.ndarray, s: np.ndarray) -> np.ndarray:
    """s E4M3(w / s) in float64, by torch."""
    q = torch.from_numpy(w.astype(np.float32) / s.astype(np.float32)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return q.double().numpy() * s


def scales_of(encoded: Encoded, shape: tuple[int, int]) -> np.ndarray:
    """The stored scales, one for each weight, float64 [out, in]."""
    scale = (encoded.parts["scale"].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if encoded.params["scale"] == "block":
        scale = np.kron(scale, np.ones((128, 128)))[: shape[0], : shape[1]]
    return np.broadcast_to(scale, shape)


@pytest.mark.parametrize("method", ALL, ids=str)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (33, 4100), (1030, 257)])
def test_against_the_formula(method: Fp8, dtype: str, shape: tuple[int, int]) -> None:
    before = gaussian(shape, dtype)
    encoded = method.encode(before)
    w, scales = before.floats().astype(np.float64), scales_of(encoded, shape)
    decoded = Fp8.decode(before.info, encoded)
    assert np.array_equal(decoded.floats(), TensorData.of_floats(before.info, rounded(w, scales)).floats())
    high, wide = {"channel": (1, shape[1]), "tensor": shape, "block": (128, 128)}[method.scale]
    for i in range(0, shape[0], high):
        for j in range(0, shape[1], wide):
            part = np.s_[i : i + high, j : j + wide]
            least = truncated(np.abs(w[part]).max() / 448)
            if method.scale != "channel":
                assert (scales[part] == least).all()
                continue
            tried = truncated(least * 2 ** (np.arange(32) / 32))
            errors = [((w[part] - rounded(w[part], np.full((1, 1), s))) ** 2).sum() for s in tried]
            assert scales[i, 0] in tried
            assert errors[list(tried).index(scales[i, 0])] <= min(errors) * 1.0001


def test_rows_have_less_error_than_with_the_least_scale() -> None:
    before = gaussian((300, 576))
    w = before.floats().astype(np.float64)
    plain = rounded(w, truncated(np.abs(w).max(axis=1, keepdims=True) / 448))
    found = Fp8.decode(before.info, Fp8().encode(before)).floats()
    assert ((found - w) ** 2).sum() < 0.9 * ((plain - w) ** 2).sum()


@pytest.mark.parametrize("scale", ["channel", "tensor", "block"])
def test_gptq_does_less_damage_to_the_output(scale: str) -> None:
    rng, before = np.random.default_rng(3), gaussian((200, 300))
    x = rng.normal(size=(2000, 300)) @ rng.normal(size=(300, 300)) * np.exp(rng.normal(size=300))
    statistics = Statistics(hessian=(x.T @ x / 2000).astype(np.float32), tokens=2000)
    method = Fp8(algo="gptq", scale=scale)
    assert method.calibrates()
    first, again = (method.encode(before, statistics) for _ in range(2))
    assert all(np.array_equal(first.parts[p], again.parts[p]) for p in first.parts)
    damage = {}
    for name, encoded in {"gptq": first, "rtn": Fp8(scale=scale).encode(before)}.items():
        error = Fp8.decode(before.info, encoded).floats().astype(np.float64) - before.floats()
        damage[name] = ((error @ x.T) ** 2).sum()
    assert damage["gptq"] < 0.6 * damage["rtn"]


def slow_gptq(w: np.ndarray, feedback: np.ndarray, order: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Column by column in float64: each takes what the errors before it ask of it."""
    out, errors = np.zeros_like(w), np.zeros_like(w)
    for j, column in enumerate(order):
        goal = w[:, column] + errors[:, :j] @ feedback[:j, j]
        out[:, column] = rounded(goal, scales[:, column])
        errors[:, j] = w[:, column] - out[:, column]
    return out


def test_gptq_against_the_slow_way() -> None:
    """Equal but where a goal lies next to a tie, which float32 may take to the other side."""
    from tcw.weights._gptq import prepare

    rng, before = np.random.default_rng(3), gaussian((40, 200), "F32")
    x = rng.normal(size=(1000, 200)) @ rng.normal(size=(200, 200))
    hessian = (x.T @ x / 1000).astype(np.float32)
    encoded = Fp8(algo="gptq").encode(before, Statistics(hessian=hessian, tokens=1000))
    ready = prepare(hessian, 200, 0.01)
    assert ready is not None
    w, scales = before.floats().astype(np.float64), scales_of(encoded, (40, 200))
    expected = slow_gptq(w, ready.feedback.astype(np.float64), ready.order, scales)
    found = Fp8.decode(before.info, encoded).floats()
    assert (found == expected).all(axis=1).mean() > 0.9
    assert np.isclose(found, expected, rtol=1e-6).mean() > 0.97


def test_without_a_useful_hessian_it_rounds_to_nearest() -> None:
    before, plain = gaussian((64, 64)), Fp8().encode(gaussian((64, 64)))
    for hessian in (None, np.zeros((64, 64), np.float32), np.full((64, 64), np.nan, np.float32)):
        encoded = Fp8(algo="gptq").encode(before, Statistics(hessian=hessian, tokens=9))
        assert all(np.array_equal(encoded.parts[p], plain.parts[p]) for p in plain.parts)
    dead = np.diag(np.where(np.arange(64) < 8, 0.0, 1.0)).astype(np.float32)
    odd = Fp8(algo="gptq").encode(before, Statistics(hessian=dead - np.eye(64, dtype=np.float32) * 0.5, tokens=9))
    assert np.isfinite(Fp8.decode(before.info, odd).floats()).all()


@pytest.mark.parametrize("method", ALL, ids=str)
def test_prediction_is_exact_or_nearly(method: Fp8) -> None:
    for shape in ((200, 300), (768, 512)):
        before = gaussian(shape)
        found, predicted = method.encode(before).nbytes, method.predict(before)
        assert predicted == pytest.approx(found, rel=0.004) if method.entropy else predicted == found


@pytest.mark.parametrize("scale", ["channel", "tensor", "block"])
def test_entropy_coding_changes_no_bit(scale: str) -> None:
    before = gaussian((512, 384))
    plain, short = (Fp8(scale=scale, entropy=e).encode(before) for e in (False, True))
    assert np.array_equal(Fp8.decode(before.info, plain).data, Fp8.decode(before.info, short).data)
    assert np.array_equal(plain.parts["scale"], short.parts["scale"])
    assert short.nbytes < 0.9 * plain.nbytes
    assert (plain.params["entropy"], short.params["entropy"]) == ("off", "on")


def test_bytes_that_do_not_get_shorter_stay() -> None:
    rng = np.random.default_rng(0)
    codes = rng.choice(np.flatnonzero(np.isfinite(VALUES)), (256, 256))  # all bytes equally often
    encoded = Fp8(entropy=True, scale="tensor").encode(tensor(VALUES[codes]))
    assert encoded.params["entropy"] == "off"
    assert set(encoded.parts) == {"codes", "scale"}


@pytest.mark.parametrize("method", ALL, ids=str)
def test_readers_give_what_decode_gives(method: Fp8) -> None:
    before = gaussian((700, 900))
    encoded = method.encode(before)
    whole, reader = Fp8.decode(before.info, encoded).data, Fp8.reader(before.info, encoded)
    out = np.zeros(before.info.nbytes, np.uint8)
    run(reader.pieces(out))
    assert np.array_equal(out, whole)
    for rows in ([], [0], [699], [3, 4, 5, 300, 301, 690]):
        wanted = np.array(rows, np.int64)
        assert np.array_equal(reader.rows(wanted), whole.reshape(700, -1)[wanted])


def test_scales_follow_their_rows_and_blocks() -> None:
    values = np.full((256, 256), 1.0)
    values[130, 5] = 896
    of = {s: Fp8(scale=s).encode(tensor(values)).parts["scale"] for s in ("channel", "tensor", "block")}
    assert {s: part.shape for s, part in of.items()} == {"channel": (256, 1), "tensor": (1,), "block": (2, 2)}
    two = 0x4000  # 896 / 448
    assert of["tensor"] == two
    assert of["block"][1, 0] == two
    assert of["channel"][130] == two
    assert len(np.unique(of["block"])) == len(np.unique(of["channel"])) == 2


# ---- numbers at the edge


@pytest.mark.parametrize("scale", ["channel", "tensor", "block"])
def test_zeros_stay_zeros(scale: str) -> None:
    values = gaussian((256, 256)).floats()
    values[:, 7], values[128:] = 0, 0
    encoded = Fp8(scale=scale).encode(tensor(values))
    decoded = Fp8.decode(tensor(values).info, encoded).floats()
    assert (decoded[values == 0] == 0).all()
    assert np.isfinite(decoded).all()
    assert Fp8(scale=scale).encode(tensor(np.zeros((128, 128)))).parts["scale"].flat[0] == 0x3F80


@pytest.mark.parametrize(("dtype", "edges"), [
    ("BF16", [3.3895e38, 1e-38, 1e-40]), ("F32", [3.4028235e38, 1e-38, 1e-45]), ("F16", [65504, 6e-8]),
])  # fmt: skip
def test_the_largest_and_the_least(dtype: str, edges: list[float]) -> None:
    """No weight overflows, and a row of the tiniest numbers only becomes zeros, not NaN."""
    for edge in edges:
        before = tensor(np.full((32, 32), edge), dtype)
        decoded = Fp8.decode(before.info, Fp8().encode(before)).floats()
        assert np.isfinite(decoded).all()
        assert (np.abs(decoded - before.floats()) <= max(edge / 16, 2.0**-127)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ALL, ids=str)
def test_what_is_not_finite_is_refused(bad: float, method: Fp8) -> None:
    values = gaussian((200, 300)).floats()
    values[150, 299] = bad
    with pytest.raises(SourceError, match=NAME):
        method.encode(tensor(values))


# ---- activations and the rest of the options


def test_static_activations_need_the_largest_input() -> None:
    method, before = Fp8(activation="static"), gaussian((64, 64))
    assert method.calibrates()
    assert not Fp8().calibrates()
    assert Fp8(kv="fp8").calibrates()
    encoded = method.encode(before, Statistics(input_max=896.0))
    assert encoded.params["activation"] == "static"
    assert encoded.parts["input_scale"].tolist() == [2.0]
    assert method.predict(before) == encoded.nbytes
    for statistics in (None, Statistics(), Statistics(input_max=np.inf)):
        assert method.encode(before, statistics).params["activation"] == "dynamic"
    assert Fp8(activation="none").encode(before).params["activation"] == "none"
    wrong = [np.float32([0]), np.float32([np.nan]), np.float32([1, 1]), np.float64([1])]
    for scale in wrong:
        with pytest.raises(FormatError, match="input_scale"):
            Fp8.decode(before.info, Encoded({**encoded.parts, "input_scale": scale}, encoded.params))


def test_targets() -> None:
    linear, table = (TensorInfo(n, "BF16", (64, 64)) for n in (NAME, "model.embed_tokens.weight"))
    assert [Fp8(targets=t).wants(linear) for t in ("linear", "embedding", "all")] == [True, False, True]
    assert [Fp8(targets=t).wants(table) for t in ("linear", "embedding", "all")] == [False, True, True]


def test_options_are_read_as_text() -> None:
    method = methods.build("fp8", {"scale": "block", "entropy": "on", "kv": "fp8"})
    assert method == Fp8(scale="block", entropy=True, kv="fp8")
    for key, value in {"scale": "row", "activation": "x", "kv": "int4", "targets": "norms"}.items():
        with pytest.raises(UsageError, match=key):
            methods.build("fp8", {key: value})


# ---- files that lie


@pytest.mark.parametrize("method", ALL, ids=str)
def test_scales_that_lie_are_refused(method: Fp8) -> None:
    before = gaussian((200, 300))
    encoded = method.encode(before)
    for word in (0, 0x7F80, 0x7FC0, 0x8000, 0xBF80):
        scale = encoded.parts["scale"].copy()
        scale.flat[-1] = word
        with pytest.raises(FormatError, match=f"{NAME}.*scale"):
            Fp8.decode(before.info, Encoded({**encoded.parts, "scale": scale}, encoded.params))


@pytest.mark.parametrize("change", [
    {"scale": "block"}, {"scale": "tensor"}, {"activation": "static"}, {"entropy": "on"}, {"split": "bf16"},
])  # fmt: skip
def test_params_of_another_tensor_are_refused(change: dict[str, Any]) -> None:
    before = gaussian((200, 300))
    plain = Fp8().encode(before)
    for method in (Fp8(), Fp8(entropy=True)):
        encoded = method.encode(before)
        if change.items() <= encoded.params.items() or ("split" in change and "split" not in encoded.params):
            continue
        with pytest.raises(FormatError, match=NAME):
            Fp8.decode(before.info, Encoded(encoded.parts, {**encoded.params, **change}))
    with pytest.raises(FormatError, match="unexpected part `more`"):
        Fp8.decode(before.info, Encoded({**plain.parts, "more": np.zeros(1)}, plain.params))


# ---- real weights


def test_real_weights_take_less_than_7_bits(smollm2: Path) -> None:
    source, bits = open_source(smollm2), {}
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.20.mlp.down_proj.weight"):
        before = source.read(name)
        encoded = Fp8(entropy=True).encode(before)
        error = Fp8.decode(before.info, encoded).floats() - before.floats()
        bits[name] = 8 * encoded.nbytes / before.info.numel
        assert (error**2).sum() < 8e-4 * (before.floats() ** 2).sum()
    assert max(bits.values()) < 7.0, bits
