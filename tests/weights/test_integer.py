"""The stored format of the integer methods: packing, values, and parts that lie."""

from typing import Any

import numpy as np
import pytest

from tcw.errors import FormatError, SourceError
from tcw.tensor import TensorData, TensorInfo, round_to_bf16
from tcw.weights import Encoded
from tcw.weights._integer import (
    GRIDS,
    Fit,
    Grid,
    assemble,
    finite,
    open_parts,
    pack,
    pack_flat,
    unpack,
    unpack_flat,
    words,
)  # fmt: skip
from tcw.weights.mixed import Mixed

DTYPES = ("BF16", "F16", "F32")
NAME = "model.layers.0.mlp.up_proj.weight"


def bits_of(row: np.ndarray, bits: int) -> int:
    """A row of codes as one big number: the slow, obvious packing."""
    return sum(int(code) << (i * bits) for i, code in enumerate(row))


def as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Floats that `dtype` holds exactly, as float32."""
    if dtype == "BF16":
        return (round_to_bf16(values).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float16).astype(np.float32) if dtype == "F16" else values


def random_codes(shape: tuple[int, int], grid: Grid, seed: int = 0) -> tuple[np.ndarray, Fit]:
    rng = np.random.default_rng(seed)
    groups = (shape[0], grid.groups(shape[1]))
    scale = as_stored(rng.normal(0, 0.01, groups).astype(np.float32), grid.scale)
    zero = np.full(groups, grid.middle, np.float32)
    if grid.kind == "zero":
        zero = rng.integers(0, grid.top + 1, groups).astype(np.float32)
    if grid.kind == "float":
        zero = as_stored(rng.normal(0, 0.02, groups).astype(np.float32), grid.scale)
    return rng.integers(0, grid.top + 1, shape).astype(np.uint8), Fit(scale, zero)


def slow_values(codes: np.ndarray, fit: Fit, grid: Grid) -> np.ndarray:
    """What the format says, one weight at a time in float64."""
    span = grid.group_size or codes.shape[1]
    out = np.empty(codes.shape)
    for r, i in np.ndindex(codes.shape):
        scale, zero = float(fit.scale[r, i // span]), float(fit.zero[r, i // span])
        q = int(codes[r, i])
        out[r, i] = {
            "symmetric": (q - 2 ** (grid.bits - 1)) * scale,
            "midrise": (q - (2**grid.bits - 1) / 2) * scale,
            "zero": (q - zero) * scale,
            "float": q * scale + zero,
        }[grid.kind]
    return out


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 31, 32, 33, 64, 96, 129])
def test_packing_is_one_row_of_bits(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (3, count)).astype(np.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == np.int32
    assert packed.shape == (3, words(count, bits))
    for row, stream in zip(codes, packed, strict=True):
        assert int.from_bytes(stream.astype("<i4").tobytes(), "little") == bits_of(row, bits)
    assert np.array_equal(unpack(packed, bits, count), codes)
    flat = pack_flat(codes[0], bits)
    assert flat.dtype == np.uint8
    assert flat.size == -(-count * bits // 8)
    assert int.from_bytes(flat.tobytes(), "little") == bits_of(codes[0], bits)
    assert np.array_equal(unpack_flat(flat, bits, count), codes[0])


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_that_of_compressed_tensors(bits: int) -> None:
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = np.random.default_rng(0).integers(0, 1 << bits, (5, 96)).astype(np.uint8)
    signed = torch.from_numpy(codes.astype(np.int16) - (1 << (bits - 1))).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits).numpy()
    assert np.array_equal(pack(codes, bits), theirs)


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [0, 16, 40, 4096])
def test_values_are_those_of_the_format(kind: str, bits: int, dtype: str, group_size: int) -> None:
    grid, info = Grid(bits, kind, group_size, dtype), TensorInfo(NAME, dtype, (5, 97))
    codes, fit = random_codes((5, 97), grid)
    encoded = assemble(codes, fit, grid)
    expected = TensorData.of_floats(info, slow_values(codes, fit, grid).astype(np.float32)).floats()
    decoded = Mixed.decode(info, encoded)
    if kind == "float" and dtype == "F32":  # q·s + z may be fused
        assert np.allclose(decoded.floats(), expected, rtol=1e-6, atol=1e-6)
    else:
        assert np.array_equal(decoded.floats(), expected)
    assert encoded.nbytes == grid.nbytes((5, 97))


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reader_gives_rows_and_pieces_of_the_same_tensor(kind: str, dtype: str) -> None:
    grid, info = Grid(3, kind, 32, dtype), TensorInfo(NAME, dtype, (300, 80))
    encoded = assemble(*random_codes((300, 80), grid), grid)
    whole = Mixed.decode(info, encoded).data
    reader = Mixed.reader(info, encoded)
    out = np.full(info.nbytes, 0xAA, np.uint8)
    for piece in reversed(reader.pieces(out)):
        piece()
    assert np.array_equal(out, whole)
    for wanted in ([], [0], [3, 4, 299], list(range(300))):
        rows = reader.rows(np.array(wanted, np.int64))
        assert np.array_equal(rows, whole.reshape(300, -1)[wanted])


def stored(kind: str = "zero", shape: tuple[int, int] = (40, 96)) -> tuple[TensorInfo, Encoded]:
    grid = Grid(3, kind, 64, "BF16")
    return TensorInfo(NAME, "BF16", shape), assemble(*random_codes(shape, grid), grid)


@pytest.mark.parametrize("kind", GRIDS)
def test_damaged_parts_are_refused(kind: str) -> None:
    info, good = stored(kind)
    Mixed.decode(info, good)
    for key, part in good.parts.items():
        for wrong in (part[1:], part[:, None], part.astype(np.int64), part[:0], np.zeros(3, part.dtype)):
            for opening in (Mixed.decode, Mixed.reader):
                with pytest.raises(FormatError, match=NAME):
                    opening(info, Encoded({**good.parts, key: wrong}, good.params))
    with pytest.raises(FormatError):
        Mixed.decode(info, Encoded({**good.parts, "more": np.zeros(1, np.uint8)}, good.params))


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5}, {"bits": 4}, {"bits": 3.0}, {"bits": "3"}, {"group_size": 32}, {"group_size": 0}, {"scale": "F16"},
        {"group_size": -64}, {"group_size": 1 << 31}, {"group_size": None}, {"grid": "round"}, {"grid": "float"},
        {"grid": "symmetric"}, {"scale": "F32"}, {"scale": 7}, {"extra": 1}, {"grid": ["zero"]},
    ],
)  # fmt: skip
def test_params_that_lie_are_refused(change: dict[str, Any]) -> None:
    info, good = stored()
    with pytest.raises(FormatError, match=NAME):
        Mixed.decode(info, Encoded(good.parts, {**good.params, **change}))


@pytest.mark.parametrize("shape", [(40, 97), (41, 96), (40, 96, 1), (3840,), (1 << 40, 1 << 20), (0, 96), (40, 0)])
def test_shapes_that_lie_are_refused(shape: tuple[int, ...]) -> None:
    _, good = stored()
    with pytest.raises(FormatError, match=NAME):
        Mixed.decode(TensorInfo(NAME, "BF16", shape), good)


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64", "I8", "F8_E4M3"])
def test_dtypes_that_lie_are_refused(dtype: str) -> None:
    _, good = stored()
    with pytest.raises(FormatError, match=NAME):
        Mixed.decode(TensorInfo(NAME, dtype, (40, 96)), good)


@pytest.mark.parametrize("word", [0x7FC0, 0x7F80, 0xFF80])
def test_a_scale_that_is_no_number_is_refused(word: int) -> None:
    info, good = stored()
    scale = good.parts["scale"].copy()
    scale[3, 1] = word
    with pytest.raises(FormatError, match="finite"):
        Mixed.decode(info, Encoded({**good.parts, "scale": scale}, good.params))


def test_widths_of_another_method_are_refused() -> None:
    info, good = stored()
    with pytest.raises(FormatError, match="3"):
        open_parts(info, good, (2, 4))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e16, -3e38])
def test_damaged_weights_are_named(bad: float) -> None:
    values = np.zeros((32, 40), np.float32)
    values[7, 9] = bad
    tensor = TensorData.of_floats(TensorInfo(NAME, "F32", (32, 40)), values)
    with pytest.raises(SourceError, match=r"up_proj.*\[7, 9\]"):
        finite(tensor)
