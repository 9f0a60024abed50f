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
        self._device, self._file = device, None
        self._held: list[torch.Tensor | None] = [None] * count
        self._map: np.ndarray | None = None
        if folder is not None:
            self._file = folder / f"{name}.f32"
            with writing(self._file):
                self._map = np.memmap(self._file, np.float32, "w+", shape=(count, *shape))

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, k: int) -> torch.Tensor:
        if self._map is not None:
            return torch.from_numpy(np.array(self._map[k])).to(self._device)
        held = self._held[k]
        assert held is not None
        return held

    def __setitem__(self, k: int, value: torch.Tensor) -> None:
        if self._map is not None:
            self._map[k] = value.detach().float().cpu().numpy()
        else:
            self._held[k] = value.detach().float()

    def close(self) -> None:
        """Forget them; a file is deleted."""
        self._held, self._map = [], None
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def fits(count: int, shape: tuple[int, ...], free_bytes: int) -> bool:
    """Say whether so many activations are kept in memory."""
    return 4 * count * math.prod(shape) <= _SHARE * free_bytes
