"""Integers of 1 to 8 bits with a scale for a group of columns: how they are stored, and how they become weights again.

A weight w[r, i] in group k = i // group_size of its row is stored as a code q in 0..2^bits - 1, and

    grid        value                       extra part
    symmetric   (q - 2^(bits - 1)) · s      none; s may be negative, which gives the extra level to the other side
    midrise     (q - (2^bits - 1)/2) · s    none; there is no level at 0
    zero        (q - z) · s                 `zero`: whole numbers 0..2^bits - 1, packed
    float       q · s + z                   `zero`: of the scale's dtype

with s = scale[r, k], computed in float32 and rounded once, ties to even, to the tensor's dtype. Codes of a row follow
one another without gaps, lowest bits first, in 32-bit words (as in `weight_packed` of compressed-tensors); a row
begins a word. The last group of a row is shorter where the group does not divide the width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tcw.cores import cores
from tcw.errors import FormatError, SourceError
from tcw.tensor import TensorData, TensorInfo, round_to_bf16
from tcw.weights import Encoded, Reader, Statistics, WeightMethod
from tcw.weights._linears import FLOATS, wanted

GRIDS = ("symmetric", "zero", "midrise", "float")
SCALE_TYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("uint16"),
    "F16": np.dtype("float16"),
    "F32": np.dtype("float32"),
}
LARGEST = 1e15  # larger weights are damage, and their squares leave float32
_SLAB = 1 << 20  # weights decoded at a time


@dataclass(frozen=True)
class Grid:
    """Which values codes stand for.

    Attributes:
        bits: of a code, 1..8.
        kind: "symmetric", "zero", "midrise" or "float".
        group_size: columns that share a scale; 0 for the whole row.
        scale: dtype in which scales are stored: "BF16", "F16" or "F32".
    """

    bits: int
    kind: str
    group_size: int
    scale: str

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> float:
        """The code, or half code, that stands for 0 where the grid has no zero of its own."""
        return self.top / 2 if self.kind == "midrise" else float(1 << (self.bits - 1))

    @property
    def side_bits(self) -> int:
        """Bits of a group's scale and zero."""
        scale = 8 * SCALE_TYPES[self.scale].itemsize
        return scale + {"zero": self.bits, "float": scale}.get(self.kind, 0)

    def span(self, width: int) -> int:
        """Columns of a full group in rows of `width` weights."""
        return min(self.group_size, width) or width

    def groups(self, width: int) -> int:
        """Groups in a row of `width` weights."""
        return -(-width // self.span(width))

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Dtype and shape of each part of a tensor [out, in]."""
        out, width = shape
        groups = self.groups(width)
        parts: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
            "codes": (np.dtype("int32"), (out, words(width, self.bits))),
            "scale": (SCALE_TYPES[self.scale], (out, groups)),
        }
        if self.kind == "zero":
            parts["zero"] = (np.dtype("uint8"), (-(-out * groups * self.bits // 8),))
        if self.kind == "float":
            parts["zero"] = parts["scale"]
        return parts

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of all parts of a tensor [out, in]."""
        return sum(int(np.prod(size)) * dtype.itemsize for dtype, size in self.shapes(shape).values())

    def params(self) -> dict[str, Any]:
        """What is stored beside the parts."""
        return {"bits": self.bits, "group_size": self.group_size, "grid": self.kind, "scale": self.scale}


@dataclass(frozen=True)
class Fit:
    """Scales and zeros of a tensor, float32 [out, groups], as they will be read back.

    `zero` is the code that stands for 0 (for `float`: the value of code 0).
    """

    scale: np.ndarray
    zero: np.ndarray

    def shift(self, kind: str) -> np.ndarray:
        """The value of code 0, float32 [out, groups]."""
        return self.zero if kind == "float" else -self.zero * self.scale


@dataclass(frozen=True)
class Stored:
    """The parts of a tensor, checked against its shape: codes int32, scale and zero as they lie in the file."""

    info: TensorInfo
    grid: Grid
    codes: np.ndarray
    fit: Fit

    def rows(self, wanted: np.ndarray | slice) -> np.ndarray:
        """Bytes of some rows, uint8 [rows, row]."""
        from tcw.weights._unpack import decode_rows

        fit = Fit(self.fit.scale[wanted], self.fit.zero[wanted])
        return decode_rows(self.codes[wanted], fit, self.grid, self.info)


def open_parts(info: TensorInfo, encoded: Encoded, widths: tuple[int, ...]) -> Stored:
    """Check the parts of a tensor, whose codes may have the given `widths` in bits. Raises FormatError."""
    try:
        grid = _grid_of(info, encoded.params, widths)
        shapes = grid.shapes(info.shape)
        if set(encoded.parts) != set(shapes):
            raise FormatError(f"parts {sorted(encoded.parts)} instead of {sorted(shapes)}")
        for name, (dtype, shape) in shapes.items():
            part = encoded.parts[name]
            if part.dtype != dtype or part.shape != shape:
                raise FormatError(f"part `{name}` is {part.dtype} {list(part.shape)} instead of {dtype} {list(shape)}")
        scale = _floats(encoded.parts["scale"])
        zero = np.full_like(scale, grid.middle)
        if grid.kind == "float":
            zero = _floats(encoded.parts["zero"])
        elif grid.kind == "zero":
            zero = unpack_flat(encoded.parts["zero"], grid.bits, scale.size).reshape(scale.shape).astype(np.float32)
        if not (np.isfinite(scale).all() and np.isfinite(zero).all()):
            raise FormatError("a scale or zero is not a finite number")
    except FormatError as error:
        raise FormatError(f"tensor `{info.name}`: {error.message}", error.hint) from None
    return Stored(info, grid, encoded.parts["codes"], Fit(scale, zero))


def _grid_of(info: TensorInfo, params: dict[str, Any], widths: tuple[int, ...]) -> Grid:
    if not _fits(info):
        raise FormatError(f"it is {info.dtype} {list(info.shape)}, not a matrix of weights")
    if set(params) != {"bits", "group_size", "grid", "scale"}:
        raise FormatError(f"parameters {sorted(params)} instead of bits, group_size, grid, scale")
    bits, size, kind, scale = (params[k] for k in ("bits", "group_size", "grid", "scale"))
    if type(bits) is not int or bits not in widths:
        raise FormatError(f"codes have `{bits}` bits instead of one of {list(widths)}")
    if type(size) is not int or not 0 <= size < 1 << 31:
        raise FormatError(f"a group cannot have the size `{size}`")
    if kind not in GRIDS:
        raise FormatError(f"there is no grid `{kind}`")
    if scale != info.dtype:
        raise FormatError(f"it is {info.dtype} and its scales are `{scale}`")
    return Grid(bits, kind, size, scale)


def _floats(part: np.ndarray) -> np.ndarray:
    """Stored scales or zeros as float32; uint16 holds BF16."""
    if part.dtype == np.uint16:
        return (part.astype(np.uint32) << 16).view(np.float32)
    return part.astype(np.float32)


def _stored_floats(values: np.ndarray, dtype: str) -> np.ndarray:
    """The inverse of `_floats`, for values that the dtype holds exactly."""
    return round_to_bf16(values) if dtype == "BF16" else values.astype(SCALE_TYPES[dtype])


def words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes."""
    return -(-count * bits // 32)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 codes [rows, n] to int32 [rows, ceil(n·bits/32)]: code i has the bits i·bits .. of its row."""
    rows, count = codes.shape
    eights = np.zeros((rows, -(-count // 32) * 4, 8), np.uint8)
    eights.reshape(rows, -1)[:, :count] = codes
    joined = np.zeros(eights.shape[:2], "<u8")
    for k in range(8):
        joined |= eights[..., k].astype("<u8") << np.uint64(k * bits)
    stream = joined.view(np.uint8).reshape(rows, -1, 8)[..., :bits].reshape(rows, -1)
    return np.ascontiguousarray(stream).view("<i4")[:, : words(count, bits)].astype(np.int32)


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack`: uint8 [rows, count]."""
    rows = packed.shape[0]
    stream = np.zeros((rows, -(-count // 32) * 4 * bits), np.uint8)
    given = np.ascontiguousarray(packed, "<i4").view(np.uint8)
    stream[:, : given.shape[1]] = given
    eights = np.zeros((rows, stream.shape[1] // bits, 8), np.uint8)
    eights[..., :bits] = stream.reshape(rows, -1, bits)
    joined, codes = eights.view("<u8")[..., 0], np.empty_like(eights)
    for k in range(8):
        codes[..., k] = (joined >> np.uint64(k * bits)).astype(np.uint8) & np.uint8((1 << bits) - 1)
    return codes.reshape(rows, -1)[:, :count]


def pack_flat(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 codes [n] to bytes uint8 [ceil(n·bits/8)], lowest bits first."""
    return pack(codes[None], bits).astype("<i4").view(np.uint8)[0, : -(-codes.size * bits // 8)].copy()


def unpack_flat(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `pack_flat`: uint8 [count]."""
    padded = np.zeros(words(count, bits) * 4, np.uint8)
    padded[: stream.size] = stream
    return unpack(padded.view("<i4")[None], bits, count)[0]


class IntegerMethod(WeightMethod):
    """What the integer methods share: a method says which grid a tensor gets and how its codes are found.

    A subclass has the options `targets`, `algo`, `damp` and, if it likes, `tune`, and says in `WIDTHS` which bits it
    reads.
    """

    WIDTHS: ClassVar[tuple[int, ...]]
    targets: str
    algo: str
    damp: float
    tune = 0  # rounds in which scales and codes are improved after GPTQ (tcw/weights/_tune.py)

    def grid_of(self, info: TensorInfo, bits: float | None = None) -> Grid:
        """The grid for a tensor that was given `bits` real bits per weight, where bits are allocated."""
        raise NotImplementedError

    def calibrates(self) -> bool:
        """Every algorithm but plain rounding wants to know the layer's inputs."""
        return self.algo != "rtn"

    def prescales(self) -> bool:
        """Scale the inputs of layers with `algo=awq`."""
        return self.algo == "awq"

    def prescale(self, weights: list[np.ndarray], statistics: Statistics) -> np.ndarray | None:
        """AWQ's scale of the input that layers share."""
        from tcw.weights._awq import input_scale

        return input_scale(weights, statistics, self.grid_of(TensorInfo("", "F32", weights[0].shape)))

    def wants(self, info: TensorInfo) -> bool:
        """Take the matrices that `targets` names, by what they are called."""
        return wanted(info, self.targets)

    def part_names(self, info: TensorInfo) -> tuple[str, ...]:
        """Codes, scales, and the zeros where the grid has them."""
        return ("codes", "scale", "zero") if self.grid_of(info).kind in ("zero", "float") else ("codes", "scale")

    def predict(self, tensor: TensorData) -> int:
        """Bytes that `encode` would store: they follow from the shape."""
        if not _fits(tensor.info):
            return tensor.info.nbytes
        return self.grid_of(tensor.info).nbytes(tensor.info.shape)

    def encode(self, tensor: TensorData, statistics: Statistics | None = None) -> Encoded | None:
        """Quantise a matrix; from its values alone where nothing is known of the layer's inputs.

        Raises SourceError for weights that are NaN, infinite or absurdly large.
        """
        from tcw.weights._tune import quantise

        if not _fits(tensor.info):
            return None
        weights = finite(tensor)
        known = statistics if statistics is not None and self.calibrates() else Statistics()
        grid = self.grid_of(tensor.info, statistics.bits if statistics is not None else None)
        codes, fit = quantise(weights, known.hessian, grid, self.damp, self.tune)
        return assemble(codes, fit, grid)

    @classmethod
    def decode(cls, info: TensorInfo, encoded: Encoded) -> TensorData:
        """Turn the parts back into the tensor's bytes. Raises FormatError when they do not fit `info`."""
        stored = open_parts(info, encoded, cls.WIDTHS)
        out = np.empty(info.nbytes, np.uint8)
        for piece in _pieces(stored, out):
            piece()
        return TensorData(info, out)

    @classmethod
    def reader(cls, info: TensorInfo, encoded: Encoded) -> Reader:
        """Check the parts and open them for reading them again and again. Raises FormatError."""
        return _RowsReader(cls, info, encoded, open_parts(info, encoded, cls.WIDTHS))


class _RowsReader(Reader):
    """Rows are independent: threads share them out, and a look-up decodes only those it wants."""

    def __init__(self, method: type[WeightMethod], info: TensorInfo, encoded: Encoded, stored: Stored) -> None:
        super().__init__(method, info, encoded)
        self._stored = stored

    def pieces(self, out: np.ndarray) -> list[Callable[[], None]]:
        return _pieces(self._stored, out)

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        return self._stored.rows(wanted)


def finite(tensor: TensorData) -> np.ndarray:
    """The weights as float32 [out, in]. Raises SourceError where one is NaN, infinite or beyond `LARGEST`."""
    weights = tensor.floats()
    with np.errstate(invalid="ignore"):
        bad = ~(np.abs(weights) <= LARGEST)
    if bad.any():
        row, column = (int(i[0]) for i in np.nonzero(bad))
        raise SourceError(
            f"tensor `{tensor.info.name}` holds {weights[row, column]} at [{row}, {column}]",
            "the checkpoint is damaged, or skip this tensor in a recipe",
        )
    return weights


def assemble(codes: np.ndarray, fit: Fit, grid: Grid) -> Encoded:
    """Make the stored parts of codes uint8 [out, in] and their scales."""
    parts = {"codes": pack(codes, grid.bits), "scale": _stored_floats(fit.scale, grid.scale)}
    if grid.kind == "zero":
        parts["zero"] = pack_flat(fit.zero.astype(np.uint8).reshape(-1), grid.bits)
    if grid.kind == "float":
        parts["zero"] = _stored_floats(fit.zero, grid.scale)
    return Encoded(parts, grid.params())


def _fits(info: TensorInfo) -> bool:
    return info.dtype in FLOATS and len(info.shape) == 2 and info.numel > 0


def _pieces(stored: Stored, out: np.ndarray) -> list[Callable[[], None]]:
    """Work that together decodes all rows into `out`, uint8 [info.nbytes]."""
    height, width = stored.info.shape
    rows = out.reshape(height, -1) if out.size else out.reshape(height, 0)
    step = max(1, min(-(-height // cores()), _SLAB // max(1, width)))

    def piece(first: int) -> Callable[[], None]:
        def decode() -> None:
            rows[first : first + step] = stored.rows(slice(first, first + step))

        return decode

    return [piece(first) for first in range(0, height, step)]


def check_options(group_size: int, damp: float, tune: int = 0) -> None:
    """Refuse options that make no sense. Raises ValueError."""
    if group_size < 0 or 0 < group_size < 8 or group_size >= 1 << 31:
        raise ValueError(f"group_size is 0 for a whole row, or at least 8, not {group_size}")
    if not 0.0 <= damp <= 1.0:
        raise ValueError(f"damp is a share from 0 to 1, not {damp}")
    if not 0 <= tune <= 1000:
        raise ValueError(f"tune is a number of rounds from 0 to 1000, not {tune}")
