"""Entropy-coded quantisation: as many bits a weight as you like, 1.5 to 8, counted in bytes on the disk.

WaterSIC (arXiv 2603.04956) with a trellis. A layer y = W x wants the quantised Ŵ that keeps Σ_r g_r E[(y - ŷ)_r²]
small, g_r being how much an error of output r costs (the Fisher information, where a survey found it; else 1). With the
Hessian H = E[x xᵀ] + damping = L Lᵀ and W' = diag(√g) W that is ‖(W' - Ŵ') L‖². Columns are settled from the last to
the first, each making up for the errors of those before it (successive interference cancellation, which is GPTQ):

    z_i  = quantise(Y_i / c)            Y = W' L;  the step in column i of W is c / ℓ_ii
    γ_i  = <Y_i, q_i> / (c <q_i, q_i>)  LMMSE shrink of the points q_i of z_i
    Y   ←  Y - (γ_i c / ℓ_ii) q_i L[i, :]

so that the error is the same constant in every direction of L ("waterfilling": steps go to where errors cost most), and
in every row, and in every layer, by its cost in KL. Then the scales of rows and columns are fitted to one another, in
turns, with z fixed: Ŵ = diag(t) q diag(s). Integers z are Huffman coded, so a weight takes as many bits as it needs.

What differs from the paper:

    - `quantise` is a trellis over the rows of a column, not rounding: 0.2 bit a weight less at the same error
      (tcw/weights/_sic.py). What is left to the rate-distortion bound of a Gaussian is 0.05 bit.
    - rows are weighted by the Fisher information, which entropy coding makes free
    - the rate is held on real bytes (streams, tables, scales, index), not on an entropy: c is found by the secant rule
    - bits are shared out over the layers by what they buy in KL (`allocate=sensitivity`), not evenly
    - scales are logarithms of 8 or 16 bits, not floats; labels are sorted into classes with a table each
      (tcw/weights/_ecq_code.py)
    - left out: attention-weighted covariances, mixing, finetuning. Drift correction is an option.

Parts besides those of the codec: `scales` U8 or U16 [out + in] and `ranges` F32 [4]. A scale is
2^(low + step·(code - 1)), or 0 where the code is 0; `ranges` is low and step of the rows, then of the columns.
Parameters: `trellis`, its memory in bits, and those of the codec.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tcw.errors import FormatError, SourceError
from tcw.methods import option
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Curve, Encoded, Statistics, WeightMethod
from tcw.weights._linears import TARGETS, wanted

if TYPE_CHECKING:
    from tcw.weights._ecq_code import Opened
    from tcw.weights._ecq_fit import Layer

CODEC_PARTS = ("codes", "table", "index", "side", "escapes")
MEMORIES = (0, 2, 3, 4, 5, 6)
LEAST_BITS, MOST_BITS = 1.5, 8.0
FINE_FROM = 4.5  # bits a weight from which scales have 16 bits: the rounding of 8 would be seen
NEAR = 0.004  # bits a weight: a rate is met
TRIES = 8
OVERHEAD = 0.03, 150, 1.5  # bits a weight, bytes a tensor, bytes a row and column that coding adds to theory, about
LADDER = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)  # bits a weight that `probe` looks at


@dataclass(frozen=True)
class Ecq(WeightMethod):
    """Entropy-coded quantisation at any rate, 1.5 to 8 real bits a weight (WaterSIC with a trellis)."""

    needs_calibration: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv 2603.04956"

    bits: float = option(3.0, "real bits per weight, 1.5 to 8, all side data included")
    allocate: str = option(
        "sensitivity", "share bits out over the layers by their cost in KL, or evenly", choices=("sensitivity", "equal")
    )
    step: str = option(
        "waterfill", "steps of columns: by what their errors cost, or all alike", choices=("waterfill", "uniform")
    )
    trellis: int = option(6, "memory of the trellis in bits; 0 for plain rounding", choices=MEMORIES)
    damp: float = option(0.2, "added to the Hessian's diagonal, as a share of its median")
    drift: bool = option(False, "make up for the errors of earlier layers too: for low rates")
    targets: str = option("linear", "which tensors", choices=TARGETS)

    @property
    def limits(self) -> dict[str, float]:
        """What verify holds it to: a bit less costs four times the KL; wide enough for 135 M parameters."""
        lost = max(0.005, 0.5 * 4 ** (3 - self.bits))
        return {"max_kl": lost, "min_top1": max(0.0, 1 - 0.5 * lost**0.5), "max_bits_per_weight": self.bits + 0.02}

    def __post_init__(self) -> None:
        if not LEAST_BITS <= self.bits <= MOST_BITS:
            raise ValueError(f"bits are {LEAST_BITS} to {MOST_BITS:.0f} a weight, not {self.bits}")
        if not 0.0 < self.damp <= 1.0:
            raise ValueError(f"damp is a share above 0 and up to 1, not {self.damp}")

    def wants(self, info: TensorInfo) -> bool:
        """Take the matrices of linear layers, or what `targets` says."""
        return wanted(info, self.targets)

    def wants_drift(self) -> bool:
        """Ask for the drift where it is to be corrected."""
        return self.drift

    def allocates(self) -> bool:
        """Say whether bits are shared out over the layers."""
        return self.allocate == "sensitivity"

    def part_names(self, info: TensorInfo) -> tuple[str, ...]:
        """Parts of the codec, and the scales."""
        return (*CODEC_PARTS, "scales", "ranges")

    def encode(self, tensor: TensorData, statistics: Statistics | None = None) -> Encoded | None:
        """Quantise a matrix at the rate asked for. Raises SourceError where a weight is not finite."""
        from tcw.weights import _sic
        from tcw.weights._ecq_fit import Layer

        statistics = statistics or Statistics()
        bits = self.bits if statistics.bits is None else statistics.bits
        layer = Layer.of(_finite(tensor), statistics, self.damp, self.drift)
        dtype = np.uint16 if bits >= FINE_FROM else np.uint8
        beside = sum(tensor.info.shape) * np.dtype(dtype).itemsize + 4 * np.dtype(np.float32).itemsize
        labels, steps, encoded = self._at_rate(layer, bits, beside)
        where = _sic.points(labels, self.trellis)
        column_codes, column_range = _logarithms(layer.scales(where, steps)[1], dtype)
        row_codes, row_range = _logarithms(layer.fit_rows(where, _powers(column_codes, column_range)), dtype)
        encoded.parts["scales"] = np.concatenate([row_codes, column_codes])
        encoded.parts["ranges"] = np.concatenate([row_range, column_range])
        return encoded if encoded.nbytes < tensor.info.nbytes else None

    def _at_rate(self, layer: "Layer", bits: float, beside: int) -> tuple[np.ndarray, np.ndarray, Encoded]:
        """Find the step by the secant rule on log2 c; `beside` bytes come on top of what is coded here.

        Returns:
            Labels int32 [in, out], steps float64 [in], and the labels as they are stored.
        """
        from tcw.weights import _ecq_code, _sic

        shape = np.ones(len(layer.factor)) if self.step == "waterfill" else np.diag(layer.factor)
        at, slope, missed = self._first(layer, shape, bits), -1.0, np.inf
        tried: list[tuple[float, float]] = []
        chosen: _ecq_code.Plan | None = None
        for _ in range(TRIES):
            steps = shape * 2.0**at
            labels = layer.labels(steps, self.trellis)
            chosen = chosen or _ecq_code.plan(labels, _sic.points(labels, self.trellis))
            parts, params = _ecq_code.encode(labels, chosen)
            encoded = Encoded(parts, {"trellis": self.trellis, **params})
            got = 8 * (encoded.nbytes + beside) / labels.size
            if abs(got - bits) < missed:
                best, missed = (labels, steps, encoded), abs(got - bits)
            if missed <= NEAR:
                break
            if tried and at != tried[-1][0]:
                slope = float(np.clip((got - tried[-1][1]) / (at - tried[-1][0]), -1.5, -0.25))
            tried.append((at, got))
            at += (bits - got) / slope
        return best

    def _first(self, layer: "Layer", shape: np.ndarray, bits: float) -> float:
        """The log2 c that theory gives for a rate."""
        from tcw.weights._ecq_fit import rate

        low, high, goal = -60.0, 60.0, bits - _overhead(layer.target.shape)
        while high - low > 1e-3:
            middle = 0.5 * (low + high)
            short = rate(layer.spread, shape * 2.0**middle, self.trellis > 0) < goal
            low, high = (low, middle) if short else (middle, high)
        return high

    def predict(self, tensor: TensorData) -> int:
        """The bytes asked for: `encode` comes near to them."""
        return min(tensor.info.nbytes, round(tensor.info.numel * self.bits / 8))

    def probe(self, tensor: TensorData, statistics: Statistics) -> dict[float, np.ndarray]:
        """Errors at a ladder of rates in closed form, from the Hessian's factor and the size of each column."""
        from tcw.weights._ecq_fit import Layer, distortion, rate

        layer = Layer.of(_finite(tensor), Statistics(statistics.hessian, statistics.tokens), self.damp, False)
        spread, ones = layer.spread, np.ones(len(layer.factor))
        found = {}
        for c in np.exp2(np.arange(-14.0, 4.0, 0.5)) * np.exp(np.log(spread + 1e-30).mean()):
            bits = rate(spread, ones * c, self.trellis > 0) + _overhead(tensor.info.shape)
            if LADDER[0] - 0.5 <= bits <= LADDER[-1] + 0.5:
                found[bits] = np.full(tensor.info.shape[0], layer.unit * distortion(spread, ones * c, self.trellis > 0))
        return found

    def share_out(self, curves: list[Curve]) -> dict[str, float]:
        """Share out `bits` a weight so that the KL in all is least."""
        from tcw.calibration.allocate import spend

        return spend(curves, self.bits, least=1.0, most=8.0)

    @classmethod
    def decode(cls, info: TensorInfo, encoded: Encoded) -> TensorData:
        """Turn the parts back into the tensor. Raises FormatError when they do not fit `info`."""
        values, rows, columns = stored(info, encoded)
        values *= columns[:, None]
        values *= rows
        return TensorData.of_floats(info, values.T)


def stored(info: TensorInfo, encoded: Encoded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a tensor is made of: points float32 [in, out], scales of rows float32 [out] and of columns float32 [in].

    Points are multiples of a half. Raises FormatError when the parts do not fit `info`.
    """
    from tcw.weights import _ecq_code, _sic

    with named(info):
        memory, parts, params, rows, columns = _taken_apart(info, encoded)
        return _sic.points(_ecq_code.decode(parts, params, *info.shape), memory), rows, columns


def opened(info: TensorInfo, encoded: Encoded) -> tuple["Opened", int, np.ndarray, np.ndarray]:
    """The stream of labels, the memory of the trellis, and the scales of rows [out] and columns [in], float32.

    For a decoder that is not on the processor. Raises FormatError when the parts do not fit `info`.
    """
    from tcw.weights import _ecq_code

    with named(info):
        memory, parts, params, rows, columns = _taken_apart(info, encoded)
        return _ecq_code.unfold(parts, params, *info.shape), memory, rows, columns


def _taken_apart(
    info: TensorInfo, encoded: Encoded
) -> tuple[int, dict[str, np.ndarray], dict[str, Any], np.ndarray, np.ndarray]:
    """Memory of the trellis, parts and parameters of the codec, scales of rows and of columns."""
    if len(info.shape) != 2:
        raise FormatError("ecq: not a matrix")
    params = dict(encoded.params)
    memory = params.pop("trellis", None)
    if isinstance(memory, bool) or memory not in MEMORIES:
        raise FormatError(f"ecq: `trellis` cannot be `{memory}`")
    parts = dict(encoded.parts)
    rows, columns = _read_scales(parts.pop("scales", None), parts.pop("ranges", None), info)
    return memory, parts, params, rows, columns


@contextlib.contextmanager
def named(info: TensorInfo) -> Iterator[None]:
    """Say in an error which tensor it is about."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"tensor `{info.name}`: {error.message}", error.hint) from None


def _overhead(shape: tuple[int, ...]) -> float:
    """Bits a weight that coding takes on top of the rate of a Gaussian, about."""
    always, tensor, side = OVERHEAD
    return always + 8 * (tensor + side * sum(shape)) / math.prod(shape)


def _finite(tensor: TensorData) -> np.ndarray:
    values = tensor.floats()
    if not np.isfinite(values).all():
        raise SourceError(f"tensor `{tensor.info.name}` has weights that are not finite", "repair the model first")
    return values


def _logarithms(scales: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Code scales, 0 or more, as logarithms: codes [n], and low and step, float32 [2], of 2^(low + step (code - 1))."""
    used = scales > 0
    if not used.any():
        return np.zeros(scales.size, dtype), np.zeros(2, np.float32)
    octaves = np.log2(scales[used])
    low = np.float32(octaves.min())
    step = np.float32((octaves.max() - low) / (np.iinfo(dtype).max - 1))
    codes: np.ndarray = np.zeros(scales.size, dtype)
    codes[used] = 1 + np.rint((octaves - low) / step) if step > 0 else 1
    return codes, np.array([low, step], np.float32)


def _powers(codes: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Scales of codes, float32 [n]."""
    low, step = ranges.astype(np.float64)
    return np.where(codes > 0, np.exp2(low + step * (codes.astype(np.float64) - 1)), 0.0).astype(np.float32)


def _read_scales(
    scales: np.ndarray | None, ranges: np.ndarray | None, info: TensorInfo
) -> tuple[np.ndarray, np.ndarray]:
    out = info.shape[0]
    if scales is None or scales.dtype not in (np.uint8, np.uint16) or scales.shape != (sum(info.shape),):
        raise FormatError("ecq: part `scales` does not fit the shape")
    if ranges is None or ranges.dtype != np.float32 or ranges.shape != (4,) or not (np.abs(ranges) < 128).all():
        raise FormatError("ecq: part `ranges` is not four numbers within the range of exponents")
    return _powers(scales[:out], ranges[:2]), _powers(scales[out:], ranges[2:])
