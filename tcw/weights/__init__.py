"""Weight methods: one method a file. A method sees one tensor at a time and no file.

`encode` takes a tensor's bytes and returns the parts to store, or None to keep the tensor as it is. `decode` turns
the parts back into bytes; it must not trust them: parts come from a file, and what disagrees with the declared
shape raises FormatError before anything is allocated by it.

A method that calibrates is also told what went into the layer (`Statistics`); without that it does what it can from
the weights alone. Modules whose names begin with `_` hold what several methods share.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from tcw.methods import Method
from tcw.tensor import TensorData, TensorInfo

ENGINE: tuple[str, ...] = ()  # modules here that are not methods


@dataclass(frozen=True)
class Encoded:
    """A tensor as a method stored it: plain arrays, and the small JSON values that say how to read them."""

    parts: dict[str, np.ndarray]
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts: streams, tables, scales, indices, padding."""
        return sum(part.nbytes for part in self.parts.values())


@dataclass(frozen=True)
class Statistics:
    """What calibration found out about the linear layer y = W x whose weight W [out, in] a tensor is.

    Attributes:
        hessian: float32 [in, in], mean over tokens of x xᵀ, where x is the layer's input in the model as it is
            quantised up to here; None where the layer saw too few tokens: then a method works from the weights alone.
        tokens: how many tokens went into that mean.
        drift: float32 [in, in], mean of (x₀ - x) xᵀ, where x₀ is the input in the original model; None if not asked.
        gradient: float32 [out], mean over tokens of (∂L/∂y)², where L is the summed loss on tokens drawn from the
            model's own predictions: half of Σ gradient · (error of y)² estimates the KL divergence a token, in nats.
        bits: the real bits per weight that this tensor is given, where they are allocated over the model.
        input_max: the largest |x| that was seen, 0 if none was.
    """

    hessian: np.ndarray | None = None
    tokens: int = 0
    drift: np.ndarray | None = None
    gradient: np.ndarray | None = None
    bits: float | None = None
    input_max: float = 0.0

    def scaled(self, scale: np.ndarray) -> "Statistics":
        """The statistics of x / scale; `scale` is float32 [in]."""
        both = np.outer(scale, scale).astype(np.float32)
        hessian, drift = (None if m is None else m / both for m in (self.hessian, self.drift))
        return replace(self, hessian=hessian, drift=drift, input_max=self.input_max / float(scale.min()))


@dataclass(frozen=True)
class Curve:
    """What a tensor costs at some sizes: real bits per weight -> estimated KL, nats; a group's tensors go together."""

    name: str
    numel: int
    damage: dict[float, float]
    group: str = ""


class Reader:
    """A stored tensor that is read again and again, as a model does that keeps its weights compressed.

    This one serves any method: it decodes everything each time. A method that can check its parts once, share the
    work out among threads, or decode single rows, returns a better one from `WeightMethod.reader`.
    """

    def __init__(self, method: type["WeightMethod"], info: TensorInfo, encoded: Encoded) -> None:
        """Take the parts. Raises FormatError here or when reading, where they do not fit `info`."""
        self.method, self.info, self.encoded = method, info, encoded

    def pieces(self, out: np.ndarray) -> list[Callable[[], None]]:
        """Begin to decode into `out`, uint8 [info.nbytes]; returns what any threads may do to complete it."""
        out[:] = self.method.decode(self.info, self.encoded).data
        return []

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        """Bytes of some rows, uint8 [len(wanted), row]; `wanted` is int64, ascending, of those that exist."""
        data = self.method.decode(self.info, self.encoded).data
        return data.reshape(self.info.shape[0], -1)[wanted]


class WeightMethod(Method):
    """A method that stores single tensors in fewer bytes."""

    family: ClassVar[str] = "weights"

    def wants(self, info: TensorInfo) -> bool:
        """Say whether this method would try a tensor, from its name, dtype and shape alone."""
        raise NotImplementedError

    def part_names(self, info: TensorInfo) -> tuple[str, ...]:
        """Names of all parts that `encode` may store for a tensor: their room in the file's header is set aside."""
        raise NotImplementedError

    def encode(self, tensor: TensorData, statistics: Statistics | None = None) -> Encoded | None:
        """Compress one tensor, or return None to keep it raw (it would grow, or cannot be coded)."""
        raise NotImplementedError

    def encode_on(self, device: str, tensor: TensorData) -> Encoded | None:
        """Compress one tensor as `encode` does without statistics, to the same bytes, on "cpu" or a GPU ("cuda:0").

        A method that does not use a GPU need not know of this; one that does says so with `encodes_on_gpu`.
        """
        return self.encode(tensor)

    def encodes_on_gpu(self) -> bool:
        """Say whether `encode_on` uses a GPU: only then one is looked for."""
        return False

    def predict(self, tensor: TensorData) -> int:
        """Bytes that `encode` would store (the raw size where it would return None), without encoding."""
        raise NotImplementedError

    def reads_text(self) -> bool:
        """Calibration of weights always is on a text."""
        return self.calibrates()

    def calibrates(self) -> bool:
        """Say whether `encode` wants statistics; options may switch that off."""
        return self.needs_calibration

    def wants_drift(self) -> bool:
        """Say whether the statistics should hold `drift`, which takes a second run of the original model."""
        return False

    def rotates(self) -> bool:
        """Say whether the model is to be rotated (tcw/calibration/rotation.py) before this method sees it."""
        return False

    def prescales(self) -> bool:
        """Say whether inputs are to be scaled before layers are coded: then `prescale` is asked."""
        return False

    def prescale(self, weights: list[np.ndarray], statistics: Statistics) -> np.ndarray | None:
        """Find a scale s for the input of linear layers that share it, or None for no scaling.

        Args:
            weights: float32 [out, in] of each layer.
            statistics: of the shared input.

        Returns:
            float32 [in], above 0. The layers get W·diag(s), and the norm before them is divided by s.
        """
        raise NotImplementedError

    def allocates(self) -> bool:
        """Say whether bits are allocated over the model: then `probe` and `share_out` are asked before `encode`."""
        return False

    def probe(self, tensor: TensorData, statistics: Statistics) -> dict[float, np.ndarray]:
        """Estimate what sizes cost: real bits per weight -> squared error of each output a token, float64 [out].

        `statistics` are those of the original model, without `gradient` and `bits`.
        """
        raise NotImplementedError

    def share_out(self, curves: list[Curve]) -> dict[str, float]:
        """Choose the real bits per weight of each tensor: name -> bits."""
        raise NotImplementedError

    @classmethod
    def decode(cls, info: TensorInfo, encoded: Encoded) -> TensorData:
        """Turn the parts back into the tensor's bytes. Raises FormatError when they do not fit `info`."""
        raise NotImplementedError

    @classmethod
    def reader(cls, info: TensorInfo, encoded: Encoded) -> Reader:
        """Open the parts for reading them again and again. Raises FormatError as `decode` does, now or later."""
        return Reader(cls, info, encoded)
