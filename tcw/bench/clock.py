"""How long something takes, with cold caches: on a GPU by CUDA events, on a processor by its clocks.

Before each run a buffer of at least twice the last cache is overwritten, so that inputs come from memory, as weights do
in a model. On a GPU the run is captured in a CUDA graph where it can be (no gaps between launches), and runs are queued
behind one another: the host never waits between the two events. What the flush left to be written back falls into the
time, as in other tools, so times are a little too long rather than too short.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from tcw.device import Device, copy_bytes

LEAST, MOST = 5, 1000  # runs, where they are not asked for
_WARM_UP = 3


@dataclass(frozen=True)
class Times:
    """Milliseconds of each run, sorted; `cpu_ms` are of processor time (None on a GPU); `graph`: a CUDA graph ran."""

    ms: list[float]
    cpu_ms: list[float] | None = None
    graph: bool = False


class Clock(Protocol):
    """Times a function."""

    def measure(self, run: Callable[[], object], repeat: int | None, seconds: float) -> Times:
        """Warm up, then run `repeat` times, or about `seconds` long; caches are flushed before each run."""


def percentile(ordered: list[float], percent: float) -> float:
    """The value that `percent` % of sorted values do not exceed, between two of them where it falls there."""
    return float(np.percentile(ordered, percent))


def clock_of(device: Device) -> Clock:
    """The clock of a device."""
    return GpuClock(torch.device(device.torch_name)) if device.kind == "cuda" else CpuClock(copy_bytes(device))


def runs_in(seconds: float, each: float) -> int:
    """How many runs of `each` seconds fit into `seconds`, between `LEAST` and `MOST`."""
    return int(min(MOST, max(LEAST, seconds / max(each, 1e-9))))


class CpuClock:
    """Wall time, and the processor time of all threads: on a shared machine the one that others disturb less."""

    def __init__(self, flush_bytes: int) -> None:
        """Make a buffer of `flush_bytes` to overwrite caches with."""
        self._cold = np.zeros(flush_bytes, np.uint8)

    def measure(self, run: Callable[[], object], repeat: int | None, seconds: float) -> Times:
        """See `Clock`; the time that flushing takes counts in `seconds`."""
        run()  # compiles
        start = time.perf_counter()
        self._once(run)
        count = repeat or runs_in(seconds, time.perf_counter() - start)
        found = [self._once(run) for _ in range(count)]
        wall, cpu = (sorted(1000 * each for each in column) for column in zip(*found, strict=True))
        return Times(wall, cpu)

    def _once(self, run: Callable[[], object]) -> tuple[float, float]:
        self._cold += np.uint8(1)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        return time.perf_counter() - wall, time.process_time() - cpu


class GpuClock:
    """Time between two CUDA events on the current stream."""

    def __init__(self, device: torch.device, graphs: bool = True) -> None:
        """Make a buffer of twice the L2 cache; without `graphs` nothing is captured."""
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self._device, self._graphs = device, graphs
        self._cold = torch.empty(size, dtype=torch.uint8, device=device)

    def measure(self, run: Callable[[], object], repeat: int | None, seconds: float) -> Times:
        """See `Clock`."""
        with torch.cuda.device(self._device):
            for _ in range(_WARM_UP):
                run()
            torch.cuda.synchronize()
            graph = capture(run)[0] if self._graphs else None
            step = run if graph is None else graph.replay
            self._queue(step, _WARM_UP)
            start = time.perf_counter()
            self._queue(step, LEAST)
            count = repeat or runs_in(seconds, (time.perf_counter() - start) / LEAST)
            return Times(sorted(self._queue(step, count)), graph=graph is not None)

    def _queue(self, step: Callable[[], Any], count: int) -> list[float]:
        """Milliseconds of `count` runs, which the device does one after another."""
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            self._cold.zero_()
            start.record()
            step()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


def capture(run: Callable[[], object]) -> tuple[Any, str]:
    """Capture `run`, which has run before, in a CUDA graph.

    Returns:
        The graph and "", or None and why there is none: `run` waits for the device, or it launches on a stream of its
        own, so that the graph is empty and a replay would take no time at all.
    """
    stream = torch.cuda.current_stream()
    try:
        _run_without_waiting(run)  # a capture that fails leaves torch's allocator in a bad state
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with torch.cuda.graph(graph):
                kept = run()
    except Exception as error:  # launchers have errors of their own
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    del kept  # the graph's own memory pool keeps what it points to
    if any("graph is empty" in str(warning.message).lower() for warning in said):
        return None, "it launches on a stream of its own"
    return graph, ""


def _run_without_waiting(run: Callable[[], object]) -> None:
    """Run once. Raises RuntimeError where torch has to wait for the device meanwhile."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
