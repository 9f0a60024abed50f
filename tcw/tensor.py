"""A tensor as bytes with a name, a dtype and a shape: what sources give, codecs take and artifacts store.

NumPy has no BF16 or FP8 and importing torch takes seconds, so the streaming path speaks in raw little-endian
bytes and the dtype names of safetensors ("BF16", "F8_E4M3", ...).
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from tcw.errors import FormatError

# safetensors dtype name -> bits per element
MAX_DIMS = 64  # NumPy's limit
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

FLOAT_DTYPES = frozenset({"BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"})

# NumPy dtype of a part -> safetensors dtype name; parts of compressed tensors are plain integers and floats
PART_DTYPES: dict[str, str] = {
    "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "float32": "F32", "float64": "F64",
}  # fmt: skip

_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@dataclass(frozen=True)
class TensorInfo:
    """Name, safetensors dtype and shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BITS:
            raise FormatError(f"tensor `{self.name}` has the unknown dtype `{self.dtype}`")
        if any(not isinstance(d, int) or isinstance(d, bool) or d < 0 for d in self.shape):
            raise FormatError(f"tensor `{self.name}` has the impossible shape {list(self.shape)}")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """Bits per element."""
        return DTYPE_BITS[self.dtype]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.bits // 8


@dataclass(frozen=True)
class TensorData:
    """A tensor's bytes: `data` is uint8 [info.nbytes], contiguous, little-endian, row-major."""

    info: TensorInfo
    data: np.ndarray

    def __post_init__(self) -> None:
        if self.data.dtype != np.uint8 or self.data.ndim != 1 or self.data.size != self.info.nbytes:
            raise FormatError(
                f"tensor `{self.info.name}` should hold {self.info.nbytes} bytes "
                f"({self.info.dtype} {list(self.info.shape)}), got {self.data.size}"
            )

    @property
    def words(self) -> np.ndarray:
        """The bit patterns as unsigned integers of the element's width, [numel]. A view, no copy."""
        return self.data.view(_UNSIGNED[self.info.bits])

    def sha256(self) -> str:
        """Hex SHA-256 of the bytes."""
        return hashlib.sha256(self.data.data).hexdigest()

    def floats(self) -> np.ndarray:
        """The values as float32 [*shape], a copy; of BF16, F16, F32, and F64 rounded. Raises FormatError for others."""
        if self.info.dtype == "BF16":
            values = (self.words.astype(np.uint32) << 16).view(np.float32)
        elif self.info.dtype in ("F16", "F32", "F64"):
            values = self.words.view(f"f{self.info.bits // 8}").astype(np.float32)
        else:
            raise FormatError(f"tensor `{self.info.name}` is {self.info.dtype}, not a float that is computed with")
        return values.reshape(self.info.shape)

    def as_rows_of(self, info: TensorInfo) -> "TensorData":
        """A sample of the matrix `info` as whole rows of its width: scales and groups are counted by rows."""
        width = info.shape[-1] if len(info.shape) == 2 else 0
        rows = self.info.numel // width if width else 0
        if not rows:
            return self
        cut = TensorInfo(info.name, info.dtype, (rows, width))
        return TensorData(cut, self.data[: cut.nbytes])

    @classmethod
    def of_floats(cls, info: TensorInfo, values: np.ndarray) -> "TensorData":
        """Round float32 or float64 values [*shape] to the dtype of `info` (BF16, F16, F32, F64), ties to even.

        BF16 is rounded by way of float32. Raises FormatError for another dtype or shape.
        """
        if values.shape != info.shape:
            raise FormatError(f"tensor `{info.name}` has the shape {list(info.shape)}, got {list(values.shape)}")
        if info.dtype == "BF16":
            words = round_to_bf16(np.ascontiguousarray(values, np.float32))
        elif info.dtype in ("F16", "F32", "F64"):
            with np.errstate(over="ignore"):
                words = np.ascontiguousarray(values, f"f{info.bits // 8}")
        else:
            raise FormatError(f"tensor `{info.name}` is {info.dtype}, not a float that is computed with")
        return cls(info, words.reshape(-1).view(np.uint8))


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of the BF16 numbers nearest to float32 `values`, ties to even; a NaN stays one."""
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), (bits >> 16).astype(np.uint16) | np.uint16(0x40), rounded)
