"""A compressed weight that is a torch.Tensor: it has its shape, dtype and device, and any operation sees it decoded.

    Packed ── .shape .dtype .device         answered from the header, nothing is decoded
       │
       ├──── F.embedding(ids, W)          the rows that are looked up are decoded, and their neighbours in the stream
       │
       └──── F.linear(x, W), stack([W, …]), W.float(), W[3], …     decoded for this one operation, then forgotten

So a model may do with such a weight whatever it likes, and the result is the one it would have with the plain
weight: correctness does not hang on knowing where a model uses it. blocks.py makes it fast.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from tcw.errors import UsageError
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Encoded, WeightMethod

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "C64": torch.complex64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_EMBEDDING = torch.ops.aten.embedding.default


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """The torch dtype of a tensor."""
    return TORCH_DTYPES[info.dtype]


def to_torch(data: TensorData) -> torch.Tensor:
    """Make a torch tensor of the bytes, without a copy and without touching a bit."""
    array = data.data if data.data.flags.writeable else data.data.copy()
    return torch.from_numpy(array).view(torch_dtype(data.info)).reshape(data.info.shape)


def from_torch(name: str, tensor: torch.Tensor) -> TensorData:
    """The bytes of a CPU tensor, without a copy when it is contiguous."""
    array = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return TensorData(TensorInfo(name, _NAMES[tensor.dtype], tuple(tensor.shape)), np.ascontiguousarray(array))


class Store:
    """A tensor's parts in memory, checked, and the method that reads them."""

    def __init__(self, info: TensorInfo, method: type[WeightMethod], encoded: Encoded) -> None:
        """Check the parts, as far as the method can without decoding. Raises FormatError."""
        self.info, self.encoded = info, encoded
        self._reader = method.reader(info, encoded)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.encoded.nbytes

    def decode(self) -> torch.Tensor:
        """Decode into a fresh tensor on the CPU. Raises FormatError when the parts are damaged."""
        data = torch.empty(self.info.nbytes, dtype=torch.uint8)
        decode_all([(self, data.numpy())])
        return self.shaped(data)

    def shaped(self, data: torch.Tensor) -> torch.Tensor:
        """The tensor that these decoded bytes are: a view, of its dtype and shape."""
        return data.view(torch_dtype(self.info)).view(self.info.shape)

    def rows(self, wanted: torch.Tensor) -> torch.Tensor:
        """Decode the rows `wanted` (int64 [n], ascending, in range) alone: [n, ...]."""
        data = torch.from_numpy(self._reader.rows(wanted.numpy()))
        return data.view(torch_dtype(self.info)).view(len(wanted), *self.info.shape[1:])


def decode_all(stores: Iterable[tuple[Store, np.ndarray]]) -> None:
    """Decode each store into its bytes, uint8 [nbytes], on all cores at once. Raises FormatError."""
    if pieces := [piece for store, out in stores for piece in store._reader.pieces(out)]:
        from tcw.codecs.pieces import run  # imports the compiler: not for a model that is loaded from a plain folder

        run(pieces)


class Packed(torch.Tensor):  # type: ignore[misc]
    """A tensor whose values are compressed. It can be read in every way and changed in none."""

    store: Any  # what the values come from: a Store, or something that reads and decodes likewise
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, store: Any) -> "Packed":
        """Make the tensor's shell; it holds no values."""
        dtype = torch_dtype(store.info)
        return torch.Tensor._make_wrapper_subclass(cls, store.info.shape, dtype=dtype)

    def __init__(self, store: Any) -> None:
        self.store = store

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        info, size = self.store.info, self.store.nbytes
        return f"Packed({info.name!r}, {info.dtype}, {list(info.shape)}, {size} of {info.nbytes} bytes)"

    def decode(self) -> torch.Tensor:
        """The values, decoded into a fresh tensor."""
        return self.store.decode()

    def data_ptr(self) -> int:
        """A number that only tensors of the same store share: accelerate tells tied weights by it."""
        return id(self.store)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows by number, any integers [...] -> [..., width], decoding no others."""
        wanted, places = torch.unique(ids, return_inverse=True)
        if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < self.store.info.shape[0]:
            raise IndexError("index out of range in self")  # the words of torch
        return _EMBEDDING(self.store.rows(wanted.long()), places)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Packed":
        return self  # it never changes

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operation on the decoded values. Raises UsageError for one that would change them."""
        if func in _SAME:
            return cls(args[0].store)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise UsageError(
                    f"`{value.store.info.name}` stays compressed and cannot be changed",
                    "load the model with `residency='bf16'`",
                )
        if func is _EMBEDDING and isinstance(args[0], cls) and not isinstance(args[1], cls):  # the rest: for gradients
            return args[0].lookup(args[1])
        args, kwargs = tree_map_only(cls, lambda packed: packed.decode(), (args, kwargs or {}))
        return func(*args, **kwargs)
