"""Work on tensors side by side, within a window of bytes, with results in order: memory never grows with the model."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from typing import TypeVar

from tcw.tensor import TensorInfo

WINDOW_BYTES = 256 << 20  # of tensors at work at once; a larger tensor is at work alone

_MOST = 1024  # tensors at work at once, however small
T = TypeVar("T")


def in_order(
    pool: Executor, infos: Iterable[TensorInfo], submit: Callable[[TensorInfo], "Future[T]"]
) -> Generator[tuple[TensorInfo, T], None, None]:
    """Give (info, result) for each tensor, in order; `submit` hands one to the pool.

    Close the generator, or take all of it: when it ends, early or not, what has not begun is cancelled and the pool
    is shut down.
    """
    todo = deque(infos)
    running: deque[tuple[TensorInfo, Future[T]]] = deque()
    busy = 0
    try:
        while todo or running:
            while todo and (not running or (busy + todo[0].nbytes <= WINDOW_BYTES and len(running) < _MOST)):
                info = todo.popleft()
                running.append((info, submit(info)))
                busy += info.nbytes
            info, future = running.popleft()
            result = future.result()
            del future  # holds the result as well
            yield info, result
            del result
            busy -= info.nbytes
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
