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
from tcw.runtime.on_device import DeviceReader
from tcw.runtime.packed import Packed, Store, from_torch, to_torch, torch_dtype
from tcw.source import Source
from tcw.tensor import TensorData, TensorInfo
from tcw.weights.dfloat11 import DFloat11

_CODEC = DFloat11()


class Unread:
    """A tensor that stays in its file until it is asked for; where a `Store` could be."""

    def __init__(self, source: Source, info: TensorInfo) -> None:
        self._source, self.info = source, info

    @property
    def nbytes(self) -> int:
        """Bytes in memory, once read."""
        return self.info.nbytes

    def decode(self) -> torch.Tensor:
        """Read it."""
        return to_torch(self._source.read(self.info.name))

    def rows(self, wanted: torch.Tensor) -> torch.Tensor:
        """Rows by number."""
        return self.decode()[wanted]


class LazyTensor:
    """One tensor of a source, read whenever it is indexed."""

    def __init__(
        self, source: Source, info: TensorInfo, choice: str, *, shell: bool = False, reader: DeviceReader | None = None
    ) -> None:
        """`shell`: give a `Quantized`, which notes where the tensor goes, instead of its values.

        `reader`: decodes on a GPU what it can.
        """
        self._source, self._info, self._residency, self._shell = source, info, choice, shell
        self._reader = reader

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
        artifact = source if isinstance(source, Artifact) and source.entry(name).method != RAW else None
        if self._shell and artifact is not None:
            method = methods.canonical(artifact.entry(name).method)
            return Quantized(self._store(artifact), method, self.dtype)
        if self._shell:
            return Quantized(Unread(source, self._info), RAW, self.dtype)
        if self._residency == residency.HUFFMAN:
            return pack(source.read(name)) if artifact is None else Packed(self._store(artifact))
        found = None if self._reader is None else self._reader.read(name)
        return to_torch(source.read(name)) if found is None else found

    def _store(self, source: Artifact) -> Store:
        name = self._info.name
        return Store(self._info, method_class(source.entry(name).method), source.encoded(name))


def lazy_state_dict(source: Source, choice: str = residency.BF16, *, gpu: torch.device | None = None) -> dict[str, Any]:
    """All tensors of `source`, by name in file order, each read when indexed.

    `choice`, a residency: BF16 decodes, on `gpu` where that is given. HUFFMAN on the CPU gives compressed tensors as
    they are stored, and compresses others that it is worth for. PACKED, OFFLOAD and HUFFMAN on a GPU give a `Quantized`
    for what will not be decoded.
    """
    tensors = source.tensors()
    shells: set[str] = set()
    if choice == residency.PACKED:
        shells = {name for name in tensors if residency.packs(source, name)}
    elif choice == residency.OFFLOAD or (choice == residency.HUFFMAN and gpu is not None):
        shells = {name for name, info in tensors.items() if _CODEC.wants(info)}
    reader = None if gpu is None or choice == residency.OFFLOAD else DeviceReader(source, gpu)
    return {
        name: LazyTensor(source, info, choice, shell=name in shells, reader=reader) for name, info in tensors.items()
    }


def pack(data: TensorData, device: str = "cpu") -> torch.Tensor:
    """Compress a tensor losslessly if that makes it smaller, else return it plain; `device` does the work."""
    encoded = _CODEC.encode_on(device, data) if _CODEC.wants(data.info) else None
    return to_torch(data) if encoded is None else Packed(Store(data.info, type(_CODEC), encoded))


def pack_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Compress a CPU tensor as `pack` does; one that is compressed stays as it is."""
    return tensor if isinstance(tensor, Packed) else pack(from_torch(name, tensor))


def shell(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter that is to stay compressed on a GPU: as it was loaded, or compressed now if that pays."""
    if isinstance(tensor, Packed):
        return tensor
    device = str(tensor.device) if tensor.device.type == "cuda" else "cpu"
    packed = pack(from_torch(name, tensor.cpu()), device)
    return Quantized(packed.store, "dfloat11", tensor.dtype, tensor.device) if isinstance(packed, Packed) else tensor
