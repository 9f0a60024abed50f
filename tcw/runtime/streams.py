"""Work beside the model: a second stream of a device, and the order that it keeps with the first one.

    side = beside(device)
    side.fork()         what `run` is given from now on begins after all that was asked of the device so far
    side.run(work)      asked of the device, but not waited for
    side.join()         what is asked of the device from now on begins after all that `run` was given

Fork and join are events, which a CUDA graph that is being captured takes as edges: no call waits for the device. A
captured graph must end joined. On a processor there is one order only, that of the calls.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Side:
    """Beside a processor: `run` is done at once."""

    def fork(self) -> None:
        """Let side work wait for what was asked so far."""

    def run(self, work: Callable[[], object]) -> None:
        """Do `work` beside."""
        work()

    def join(self) -> None:
        """Let what comes wait for the side work."""

    def follow(self) -> None:
        """Let what comes wait for what was asked of the stream that was current at the last call, if another one is."""

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let nobody have the memory of `tensors`, once they are gone, before the side work of that time is done."""


class CudaSide(Side):
    """A stream beside torch's current one, on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._last: Any = None

    def fork(self) -> None:
        """Let side work wait for what was asked so far of the current stream."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def run(self, work: Callable[[], object]) -> None:
        """Do `work` with the side stream as torch's current one."""
        with torch.cuda.stream(self._stream):
            work()

    def join(self) -> None:
        """Let what comes on the current stream wait for the side work."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def follow(self) -> None:
        """Order this call's stream behind the last call's; a graph is captured after all that was asked before it."""
        now = torch.cuda.current_stream(self._device)
        if now != self._last and self._last is not None and not capturing(self._device):
            now.wait_stream(self._last)
        self._last = now

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """Tell torch's allocator that the side stream uses tensors too."""
        for tensor in tensors:
            tensor.record_stream(self._stream)


def beside(device: torch.device) -> Side:
    """A side of `device`."""
    return CudaSide(device) if device.type == "cuda" else Side()


def capturing(device: torch.device) -> bool:
    """Say whether a CUDA graph is being captured: then what was done outside it does not count, and vice versa."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_current_stream_capturing())
