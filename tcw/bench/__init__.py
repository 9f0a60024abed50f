"""Benchmarks of the kernels: each is held against its reference first, and timed only when it is right.

An operation takes part by a file kernels/<op>/bench.py with two functions; nothing else needs an edit:

    check(device: torch.device) -> dict[str, str]       # case -> "" where it is right, else what is wrong
    timed(device: torch.device) -> Iterator[Timed]      # what to time; sizes that fill the device, small on the CPU

Both are called once a run, for a CUDA device or the CPU. `timed` makes the tensors of a case when its first way is
asked for, so that one case at a time is in memory. What `check` gets from `torch.empty` is NaN: a cell that no kernel
writes shows.
"""

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcw import kernels
from tcw.bench.timed import Timed
from tcw.errors import UnknownName, UsageError
from tcw.events import Progress, Report, silent

if TYPE_CHECKING:
    from tcw.bench.rows import Row
    from tcw.device import Device

__all__ = ["Timed", "check", "device_for", "folder_of", "measure", "names"]


def names() -> list[str]:
    """The operations that can be benchmarked, sorted."""
    return sorted({file.parent.name for root in kernels.__path__ for file in Path(root).glob("*/bench.py")})


def folder_of(op: str) -> Path:
    """The folder of an operation. Raises UnknownName, with the nearest name."""
    for root in kernels.__path__:
        if (Path(root) / op / "bench.py").is_file() and op in names():
            return Path(root) / op
    raise UnknownName("kernel", op, names())


def device_for(text: str) -> "Device":
    """Pick a device, as `tcw.device.pick` does; kernels run on CUDA devices and on the CPU. Raises UsageError."""
    from tcw.device import pick

    found = pick(text)
    if found.kind == "mps" and text.strip().lower() == "auto":
        return pick("cpu")
    if found.kind == "mps":
        raise UsageError("no kernel runs on `mps`", "use `--device cpu`")
    return found


def check(op: str, device: "Device") -> dict[str, str]:
    """Hold every case of an operation against its reference, on `device`.

    Returns:
        For each case "" where it is right, else what is wrong.
    """
    import torch

    with _poisoned(), _on(device):
        return dict(_bench(op).check(torch.device(device.torch_name)))


def measure(
    ops: list[str], device: "Device", *, repeat: int | None = None, seconds: float = 0.5, progress: Report = silent
) -> Iterator["Row"]:
    """Time every way of every case of operations that are known to be right.

    Args:
        ops: their names.
        device: a CUDA device or the CPU.
        repeat: how often each way is run; None: for about `seconds`.
        seconds: for each way, the time that flushing caches takes included.
        progress: is told of each operation that is done, and of what comes next.

    Yields:
        A row for each way, as soon as it is measured.
    """
    import torch

    from tcw.bench.clock import clock_of
    from tcw.bench.rows import checkout_of, facts, row
    from tcw.device import copy_bandwidth

    progress(Progress("time", 0, len(ops), "kernels", "copying, to compare with"))
    known = facts(device, copy_bandwidth(device), checkout_of(folder_of(ops[0])) if ops else None)
    clock = clock_of(device)
    for done, op in enumerate(ops):
        firsts: dict[str, float] = {}
        with _on(device):
            for timed in _bench(op).timed(torch.device(device.torch_name)):
                progress(Progress("time", done, len(ops), "kernels", f"{op} {timed.case} {timed.way}"))
                found = row(op, timed, clock.measure(timed.run, repeat, seconds), firsts.get(timed.case), known)
                firsts.setdefault(timed.case, found.ms_p50)
                yield found
        progress(Progress("time", done + 1, len(ops), "kernels", op))


def _bench(op: str) -> Any:
    folder_of(op)
    return importlib.import_module(f"tcw.kernels.{op}.bench")


def _on(device: "Device") -> Any:
    """Makes a CUDA device the current one: kernels are launched on its current stream."""
    import torch

    return torch.cuda.device(device.torch_name) if device.kind == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Let `torch.empty` be filled with NaN (or the largest integer) meanwhile."""
    import torch

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some matrix product differs from run to run is not what is checked
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
