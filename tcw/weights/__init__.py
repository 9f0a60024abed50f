"""Weight methods: one method a file. A method sees one tensor at a time and no file.

`encode` takes a tensor's bytes and returns the parts to store, or None to keep the tensor as it is. `decode` turns
the parts back into bytes; it must not trust them: parts come from a file, and what disagrees with the declared
shape raises FormatError before anything is allocated by it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
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

    def encode(self, tensor: TensorData) -> Encoded | None:
        """Compress one tensor, or return None to keep it raw (it would grow, or cannot be coded)."""
        raise NotImplementedError

    def predict(self, tensor: TensorData) -> int:
        """Bytes that `encode` would store (the raw size where it would return None), without encoding."""
        raise NotImplementedError

    @classmethod
    def decode(cls, info: TensorInfo, encoded: Encoded) -> TensorData:
        """Turn the parts back into the tensor's bytes. Raises FormatError when they do not fit `info`."""
        raise NotImplementedError

    @classmethod
    def reader(cls, info: TensorInfo, encoded: Encoded) -> Reader:
        """Open the parts for reading them again and again. Raises FormatError as `decode` does, now or later."""
        return Reader(cls, info, encoded)
