"""The coded tensors of an official folder, decoded on a device: each group once, not for each of its matrices."""

import threading
from collections import Counter

import torch
from tcw.kernels.df11_decode import check, decode
from tcw.kernels.df11_decode.group import group_of

from tcw.errors import FormatError, SourceError
from tcw.sources.df11 import DF11Source


class FolderDecoder:
    """Reads the coded tensors of a source on a device. Threads may share one.

    A decoded group stays on the device until each of its tensors has been read once.
    """

    def __init__(self, source: DF11Source, device: torch.device | str) -> None:
        """Nothing is read yet."""
        self._source, self._device = source, torch.device(device)
        self._lock = threading.Lock()
        self._decoded: dict[str, torch.Tensor] = {}
        self._left: Counter[str] = Counter()

    def read(self, name: str) -> torch.Tensor:
        """Read one of `source.coded`, as a BF16 tensor of its own on the device.

        Raises:
            SourceError: There is no such coded tensor.
            FormatError: Its group does not decode.
        """
        matrix = self._source.coded.get(name)
        if matrix is None:
            raise SourceError(f"`{name}` of `{self._source.id}` is not a coded tensor")
        with self._lock:
            if matrix.group not in self._decoded:
                self._decoded[matrix.group] = self._decode(matrix.group)
                self._left[matrix.group] = sum(m.group == matrix.group for m in self._source.coded.values())
            # a copy: what begins in the middle of a group is not aligned, and must not keep the others alive
            weight = self._decoded[matrix.group][matrix.first : matrix.last].clone()
            self._left[matrix.group] -= 1
            if not self._left[matrix.group]:
                del self._decoded[matrix.group]
        return weight.view(matrix.info.shape)

    def _decode(self, name: str) -> torch.Tensor:
        try:
            group = group_of(**self._source.arrays(name)).to(self._device)
            if group.device.type != "cpu":  # there the codec looks while it decodes
                check(group)
            return decode(group)
        except FormatError as error:
            raise FormatError(
                f"`{name}` of `{self._source.id}`: {error.message}", "the file is damaged; get it again"
            ) from None
