"""The hidden states that flow from block to block, a batch at a time: in memory, or in a file where memory is short."""

import math
from pathlib import Path

import numpy as np
import torch

from tcw.disk import writing

_SHARE = 0.4  # of free memory that activations may take


class Activations:
    """`count` float32 tensors of one shape; `folder` None keeps them in memory, else in a file there."""

    def __init__(
        self, count: int, shape: tuple[int, ...], folder: Path | None, name: str, device: torch.device
    ) -> None:
        self._device, self._shape = device, shape
        self._held: list[torch.Tensor | None] = [None] * count
        self._path = folder / f"{name}.f32" if folder is not None else None
        # plain reads and writes: pages of a mapped file would count as memory of this process
        self._file = self._path.open("w+b", buffering=0) if self._path is not None else None

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, k: int) -> torch.Tensor:
        if self._file is None:
            held = self._held[k]
            assert held is not None
            return held
        numel = math.prod(self._shape)
        self._file.seek(4 * numel * k)
        values = np.fromfile(self._file, np.float32, numel)
        return torch.from_numpy(values.reshape(self._shape)).to(self._device)

    def __setitem__(self, k: int, value: torch.Tensor) -> None:
        value = value.detach().float()
        if self._file is None or self._path is None:
            self._held[k] = value
            return
        with writing(self._path):
            self._file.seek(4 * math.prod(self._shape) * k)
            self._file.write(np.ascontiguousarray(value.cpu().numpy()).data)

    def close(self) -> None:
        """Forget them; a file is deleted."""
        self._held = []
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)


def fits(count: int, shape: tuple[int, ...], free_bytes: int) -> bool:
    """Say whether so many activations are kept in memory."""
    return 4 * count * math.prod(shape) <= _SHARE * free_bytes
