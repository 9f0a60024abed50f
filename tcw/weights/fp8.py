"""FP8: a weight is an 8-bit float, E4M3, times a scale that its row, its tensor or its block shares.

    q = E4M3(w / s),    w' = s q,    s = max|w| / 448 for tensors and blocks, for rows the best from there to twice that

E4M3 has 4 bits of exponent and 3 of mantissa, so a weight keeps a relative precision of 1/16 over 2^15 of range, and
rounding alone, without any data, loses little. Micikevicius et al., FP8 Formats for Deep Learning, 2022,
https://arxiv.org/abs/2209.05433; a scale for each row with activations scaled for each token, and 128x128 blocks
(DeepSeek-V3), are what GPUs multiply in: `activation` says what the runtime and exports do with a layer's inputs.

Two things go beyond that. The precision hardly depends on s, but which weights happen to lie near a value of the grid
does, so a row takes the scale of least squared error. And `algo=gptq` uses calibration: columns are rounded one after
another, those still to come making up for each error (tcw/weights/_gptq.py).

A scale is a BF16 number, rounded towards zero: it takes half the room of FP32, s q is exact in FP32, so every reader
gets the very weight that we do however it multiplies, and with s = max|w| / 448 the largest weight cannot overflow.
What such a scale pushes above 448 (by less than 1 %) still rounds to 448.

The bytes are far from random: their exponents are as uneven as those of BF16. `entropy=on` codes them once more,
without loss, with the codes of dfloat11 (tcw/codecs/lanes.py).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tcw.errors import FormatError, SourceError
from tcw.methods import option
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Encoded, Reader, Statistics, WeightMethod
from tcw.weights._fp8 import BLOCK, LARGEST, VALUES, Grid, to_e4m3
from tcw.weights._linears import FLOATS, TARGETS, wanted

if TYPE_CHECKING:
    from tcw.codecs import lanes
    from tcw.weights._gptq import Hessian

SCALES = ("channel", "tensor", "block")
ACTIVATIONS = ("dynamic", "static", "none")
_CODED = ("codes", "lane_bytes", "chunk_base", "table")
_ONE, _LEAST, _MOST = 0x3F80, 0x0080, 0x7F7F  # BF16: 1, and the least and the greatest normal number
_ENDS = {"BF16": 3.3895e38, "F16": 65504.0, "F32": 3.4028e38}
_DAMP = 0.01  # share of the Hessian's mean diagonal
_NEAR = 4096  # codes of a chunk of lanes


@dataclass(frozen=True)
class Fp8(WeightMethod):
    """FP8 (E4M3) weights with a scale a row, tensor or 128x128 block: half of BF16, no data needed."""

    paper: ClassVar[str] = "arXiv 2209.05433"

    scale: str = option("channel", "what shares a scale: a row, the tensor, a 128x128 block", choices=SCALES)
    algo: str = option("rtn", "round to nearest, or GPTQ, which calibrates", choices=("rtn", "gptq"))
    activation: str = option("dynamic", "how a layer's inputs are quantised when the model runs", choices=ACTIVATIONS)
    entropy: bool = option(False, "code the FP8 bytes once more, without loss")
    targets: str = option("linear", "which tensors", choices=TARGETS)
    kv: str = option("off", "also find scales for a cache of keys and values", choices=("off", "fp8", "int8"))

    @property
    def limits(self) -> dict[str, float]:
        """What verify holds it to; wide enough for 135 M parameters, where quantised inputs double what is lost."""
        kl, same = (0.02, 0.9) if self.activation == "none" else (0.04, 0.87)
        return {"max_kl": kl, "min_top1": same, "max_weight_error": 0.05, "max_bits_per_weight": 8.25}

    def wants(self, info: TensorInfo) -> bool:
        """Take the weights of linear layers, embeddings, or both, as `targets` says."""
        return wanted(info, self.targets)

    def calibrates(self) -> bool:
        """Only GPTQ, static activations and scales for the cache need data."""
        return self.algo == "gptq" or self.activation == "static" or self.kv != "off"

    def part_names(self, info: TensorInfo) -> tuple[str, ...]:
        """The bytes or their codes, the scales, and that of the inputs where it is static."""
        static = ("input_scale",) if self.activation == "static" else ()
        return (*(_CODED if self.entropy else ("codes",)), "scale", *static)

    def encode(self, tensor: TensorData, statistics: Statistics | None = None) -> Encoded:
        """Round the tensor. Raises SourceError for a NaN or an infinity.

        Without a Hessian GPTQ falls back to rounding to nearest; a layer that saw no input gets dynamic activations.
        """
        grid = _grid(tensor.info, self.scale)
        hessian = _hessian(grid, statistics) if self.algo == "gptq" else None
        scales = _scales(tensor, grid, hessian)
        codes = _gptq_codes(tensor, grid, scales, hessian) if hessian else _codes(tensor, grid, scales)
        parts = {"codes": codes, "scale": scales}
        params: dict[str, Any] = {"scale": self.scale, "activation": self.activation, "entropy": "off"}
        if self.entropy:
            parts, params = _shorten(parts, params)
        if self.activation == "static":
            largest = statistics.input_max if statistics else 0.0
            if 0 < largest < np.inf:
                parts["input_scale"] = np.array([largest / LARGEST], np.float32)
            else:
                params["activation"] = "dynamic"
        return Encoded(parts, params)

    def predict(self, tensor: TensorData) -> int:
        """Bytes that `encode` would store: exact, from the sizes or, with `entropy`, the histogram of the bytes.

        A tensor of one dimension, a sample say, counts as one row.
        """
        grid = _grid(tensor.info, self.scale)
        size, scales = tensor.info.numel, 2 * int(np.prod(grid.shape))
        if self.entropy:
            from tcw.codecs import lanes

            codes = _codes(tensor, grid, _scales(tensor, grid)).reshape(-1)
            size = min(size, lanes.predict(codes, "u8"))
        return size + scales + (4 if self.activation == "static" else 0)

    @classmethod
    def decode(cls, info: TensorInfo, encoded: Encoded) -> TensorData:
        """Multiply bytes by scales, rounding once to the tensor's dtype. Raises FormatError."""
        reader = _Fp8Reader(cls, info, encoded)
        data = np.empty(info.nbytes, np.uint8)
        for piece in reader.pieces(data):
            piece()
        return TensorData(info, data)

    @classmethod
    def reader(cls, info: TensorInfo, encoded: Encoded) -> Reader:
        """Check the parts and open them for reading them again and again. Raises FormatError."""
        return _Fp8Reader(cls, info, encoded)


def stored(info: TensorInfo, encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """What a tensor is made of: FP8 bytes, uint8 [out, in], and scales, float32 [1], [out, 1] or a number a block.

    Raises FormatError when the parts do not fit `info`.
    """
    reader = _Fp8Reader(Fp8, info, encoded)
    return reader.codes(), reader.scales


class _Fp8Reader(Reader):
    """A tensor in FP8: bands of rows are decoded by any threads, and a row costs no more than the chunks it lies in."""

    def __init__(self, method: type[WeightMethod], info: TensorInfo, encoded: Encoded) -> None:
        super().__init__(method, info, encoded)
        scale, activation = read_params(info, encoded.params)
        self._grid = _grid(info, scale)
        with _named(info):
            parts = dict(encoded.parts)
            self.scales = _read_scales(parts.pop("scale", None), self._grid)
            if activation == "static":
                _check_input_scale(parts.pop("input_scale", None))
            self._codes = self._open(parts, encoded.params)

    def _open(self, parts: dict[str, np.ndarray], params: dict[str, Any]) -> "np.ndarray | lanes.Reader":
        if params["entropy"] == "on":
            from tcw.codecs import lanes

            rest = {k: v for k, v in params.items() if k not in ("scale", "activation", "entropy")}
            if rest.get("split") != "u8":
                raise FormatError(f"FP8 bytes are not coded as `{rest.get('split')}`")
            return lanes.reader(parts, rest, self.info.numel)
        codes = parts.pop("codes", None)
        if parts:
            raise FormatError(f"unexpected part `{min(parts)}`")
        if codes is None or codes.dtype != np.uint8 or codes.shape != self.info.shape:
            raise FormatError(f"`codes` are not bytes {list(self.info.shape)}")
        return codes

    def codes(self) -> np.ndarray:
        """All bytes, uint8 [out, in]."""
        with _named(self.info):
            codes = self._codes if isinstance(self._codes, np.ndarray) else self._codes.decode()
        return codes.reshape(self.info.shape)

    def pieces(self, out: np.ndarray) -> list[Callable[[], None]]:
        codes = self.codes()
        width = out.size // max(len(codes), 1)

        def piece(rows: np.ndarray) -> Callable[[], None]:
            first, end = int(rows[0]), int(rows[-1]) + 1

            def decode() -> None:
                out[first * width : end * width] = self._values(codes[first:end], rows)

            return decode

        return [piece(rows) for rows in self._grid.bands()]

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        return self._values(self._rows(wanted), wanted).reshape(len(wanted), self.info.nbytes // self.info.shape[0])

    def _rows(self, wanted: np.ndarray) -> np.ndarray:
        if isinstance(self._codes, np.ndarray):
            return self._codes[wanted]
        width, at = self._grid.columns, 0
        codes = np.empty((len(wanted), width), np.uint8)
        apart = np.diff(wanted) > _NEAR // width  # rows that are nearer share a chunk
        for near in np.split(wanted, np.flatnonzero(apart) + 1) if len(wanted) else ():
            with _named(self.info):
                span = self._codes.span(int(near[0]) * width, (int(near[-1]) + 1) * width)
            codes[at : at + near.size] = span.reshape(-1, width)[near - near[0]]
            at += near.size
        return codes

    def _values(self, codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        values = VALUES[codes] * self._grid.spread(self.scales, rows)
        return TensorData.of_floats(TensorInfo(self.info.name, self.info.dtype, codes.shape), values).data


def _grid(info: TensorInfo, scale: str) -> Grid:
    rows = info.shape[0] if len(info.shape) == 2 else 1
    return Grid(scale, rows, info.numel // rows if rows else 0)


def _bands(tensor: TensorData, grid: Grid) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and their values as float32, a band at a time."""
    width = grid.columns * tensor.info.bits // 8
    for rows in grid.bands():
        data = tensor.data[rows[0] * width : (rows[-1] + 1) * width]
        info = TensorInfo(tensor.info.name, tensor.info.dtype, (len(rows), grid.columns))
        yield rows, TensorData(info, data).floats()


def _hessian(grid: Grid, statistics: Statistics | None) -> "Hessian | None":
    if statistics is None or statistics.hessian is None:
        return None
    from tcw.weights._gptq import prepare

    return prepare(statistics.hessian, grid.columns, _DAMP)


def _scales(tensor: TensorData, grid: Grid, hessian: "Hessian | None" = None) -> np.ndarray:
    """The scales as BF16 bit patterns, uint16. Raises SourceError for weights that are not finite."""
    largest = np.zeros(grid.shape, np.float32)
    for rows, values in _bands(tensor, grid):
        grid.largest(values, rows, largest)
    if not np.isfinite(largest).all():
        raise SourceError(
            f"tensor `{tensor.info.name}` holds a NaN or an infinity", "the model is damaged: get it again"
        )
    words = ((largest / np.float32(LARGEST)).view(np.uint32) >> 16).astype(np.uint16)
    words = np.where(largest > 0, np.maximum(words, np.uint16(_LEAST)), np.uint16(_ONE))
    return _searched(tensor, grid, words, largest, hessian) if grid.kind == "channel" else words


def _searched(
    tensor: TensorData, grid: Grid, words: np.ndarray, largest: np.ndarray, hessian: "Hessian | None"
) -> np.ndarray:
    """The best scale of each row. One with weights near the end of the dtype's range keeps the scale it has."""
    from tcw.weights._fp8_fit import row_scales

    importance = hessian.importance if hessian else np.ones(grid.columns, np.float32)
    room = largest[:, 0] < 0.9 * _ENDS[tensor.info.dtype]
    for rows, values in _bands(tensor, grid):
        best = row_scales(values, _floats(words)[rows, 0], importance).view(np.uint32) >> 16
        words[rows, 0] = np.where(room[rows], best, words[rows, 0])
    return words


def _floats(scales: np.ndarray) -> np.ndarray:
    return (scales.astype(np.uint32) << 16).view(np.float32)


def _codes(tensor: TensorData, grid: Grid, scales: np.ndarray) -> np.ndarray:
    """The FP8 bytes, uint8 [rows, columns]."""
    codes = np.empty((grid.rows, grid.columns), np.uint8)
    for rows, values in _bands(tensor, grid):
        codes[rows[0] : rows[-1] + 1] = to_e4m3(values / grid.spread(_floats(scales), rows))
    return codes


def _gptq_codes(tensor: TensorData, grid: Grid, scales: np.ndarray, hessian: "Hessian") -> np.ndarray:
    from tcw.weights._fp8_fit import gptq

    span = min(BLOCK, grid.columns) if grid.kind == "block" else grid.columns
    of_rows = np.repeat(_floats(scales), BLOCK, axis=0) if grid.kind == "block" else _floats(scales).reshape(-1, 1)
    of_rows = np.broadcast_to(of_rows, (grid.rows, 1)) if grid.kind == "tensor" else of_rows[: grid.rows]
    return gptq(tensor.floats(), hessian, np.ascontiguousarray(of_rows), span)


def _shorten(parts: dict[str, np.ndarray], params: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Code the bytes without loss, where that takes less room."""
    from tcw.codecs import lanes

    try:
        stream = lanes.encode(parts["codes"].reshape(-1), "u8")
    except lanes.NotCodable:  # 4 GiB of codes
        return parts, params
    if stream.nbytes >= parts["codes"].nbytes:
        return parts, params
    return {**stream.parts, "scale": parts["scale"]}, {**params, "entropy": "on", **stream.params}


def read_params(info: TensorInfo, params: dict[str, Any]) -> tuple[str, str]:
    """How a stored tensor is scaled and how its inputs are quantised: `scale`, `activation`. Raises FormatError."""
    if info.dtype not in FLOATS or len(info.shape) != 2:
        raise FormatError(f"tensor `{info.name}`: FP8 holds no {info.dtype} {list(info.shape)}")
    for key, choices in (("scale", SCALES), ("activation", ACTIVATIONS), ("entropy", ("on", "off"))):
        if params.get(key) not in choices:
            raise FormatError(f"tensor `{info.name}`: `{key}` cannot be `{params.get(key)}`")
    return params["scale"], params["activation"]


def _read_scales(scales: np.ndarray | None, grid: Grid) -> np.ndarray:
    if scales is None or scales.dtype != np.uint16 or scales.shape != grid.shape:
        raise FormatError(f"`scale` is not BF16 {list(grid.shape)}")
    if ((scales < 1) | (scales > _MOST)).any():
        raise FormatError("`scale` holds one that is not above 0 or not finite")
    return _floats(scales)


def _check_input_scale(scale: np.ndarray | None) -> None:
    if scale is None or scale.dtype != np.float32 or scale.shape != (1,) or not 0 < float(scale[0]) < np.inf:
        raise FormatError("`input_scale` is not one FP32 number above 0")


@contextlib.contextmanager
def _named(info: TensorInfo) -> Iterator[None]:
    """Say in an error which tensor it is about."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"tensor `{info.name}`: {error.message}", error.hint) from None
