"""The memory that weights are decoded into: one buffer for a whole model, lent to one block after another."""

import threading
import weakref

import numpy as np
import torch


class Scratch:
    """Lends its buffer to whoever asks while nobody has it, and nobody has it once no tensor is left that shows it.

    So nobody gives it back, and nothing can look at memory that has been lent again: a weight that outlives its block
    (somebody kept it, or a gradient needs it) keeps the buffer with the values it has, and so does a block that runs in
    another thread, or around this one. Then the next block gets a new buffer, which takes the place of the old one.
    """

    def __init__(self) -> None:
        """Start without a buffer: the first loan makes it."""
        self.size = 0  # bytes; what a new buffer has room for
        self._buffer = np.empty(0, np.uint8)
        self._loan: weakref.ref[np.ndarray] | None = None
        self._lock = threading.Lock()

    def lend(self, size: int) -> np.ndarray:
        """Give the first `size` bytes of the buffer, uint8 [size], at a multiple of 64; their content is undefined.

        The loan lasts as long as this array, which a tensor made by `torch.from_numpy` of it keeps; slices of the array
        itself do not.
        """
        with self._lock:
            lent = self._loan is not None and self._loan() is not None
            if lent or self._buffer.size < size:
                self._buffer = np.empty(0, np.uint8)  # gives memory back before it takes more
                self._buffer = torch.empty(max(size, self.size), dtype=torch.uint8).numpy()
            loan = self._buffer[:size]
            self._loan = weakref.ref(loan)
            return loan
