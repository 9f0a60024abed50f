"""A model's tensors as a state dict that reads each one when it is asked for.

transformers reads a checkpoint through slices: `get_slice(name)[...]`. These objects are such slices over a Source,
under the names the source had before compression, so everything transformers does on loading (renaming, merging
experts, tying, casting, placing on devices) works as it does for the original.
"""

from typing import Any

import torch

from tcw import methods
from tcw.artifact import RAW, Artifact, method_class
from tcw.runtime import residency
from tcw.runtime.linear import Quantized
from tcw.runtime.packed import Packed, Store, from_torch, to_torch, torch_dtype
from tcw.source import Source
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import WeightMethod


class LazyTensor:
    """One tensor of a source, read whenever it is indexed."""

    def __init__(self, source: Source, info: TensorInfo, choice: str) -> None:
        self._source, self._info, self._residency = source, info, choice

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        return torch_dtype(self._info)

    @property
    def shape(self) -> torch.Size:
        """The shape."""
        return torch.Size(self._info.shape)

    def is_floating_point(self) -> bool:
        """Say whether the dtype is a floating one."""
        return self.dtype.is_floating_point

    def get_dtype(self) -> str:
        """The safetensors name of the dtype, as the slices of safetensors have it."""
        return self._info.dtype

    def get_shape(self) -> list[int]:
        """The shape, as the slices of safetensors have it."""
        return list(self._info.shape)

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._load()
        return tensor if index is Ellipsis else tensor[index]

    def _load(self) -> torch.Tensor:
        name, source = self._info.name, self._source
        if self._residency == residency.HUFFMAN:
            if isinstance(source, Artifact) and source.entry(name).method != RAW:
                return Packed(self._store(source))
            return pack(source.read(name))
        if self._residency == residency.PACKED and residency.stays_packed(source, name):
            assert isinstance(source, Artifact)
            return Quantized(self._store(source), methods.canonical(source.entry(name).method), self.dtype)
        return to_torch(source.read(name))

    def _store(self, source: Artifact) -> Store:
        name = self._info.name
        return Store(self._info, method_class(source.entry(name).method), source.encoded(name))


def lazy_state_dict(source: Source, choice: str = residency.BF16) -> dict[str, Any]:
    """All tensors of `source`, by name in file order, each read when indexed.

    `choice`, a residency: BF16 decodes; HUFFMAN gives compressed tensors as they are stored, and compresses others that
    it is worth for; PACKED gives quantised tensors as they are stored, and decodes the others.
    """
    return {name: LazyTensor(source, info, choice) for name, info in source.tensors().items()}


def pack(data: TensorData) -> torch.Tensor:
    """Compress a tensor losslessly if that makes it smaller, else return it plain."""
    method = methods.build("dfloat11", {})
    assert isinstance(method, WeightMethod)
    encoded = method.encode(data) if method.wants(data.info) else None
    return to_torch(data) if encoded is None else Packed(Store(data.info, type(method), encoded))


def pack_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Compress a CPU tensor as `pack` does; one that is compressed stays as it is."""
    return tensor if isinstance(tensor, Packed) else pack(from_torch(name, tensor))
