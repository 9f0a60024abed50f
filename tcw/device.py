"""Where work runs: pick a device, say why, how much memory it has, and how fast it copies.

Memory is what this process may use: the machine's, or less where a cgroup (a container, a job scheduler) says so.
torch is imported only to look for an accelerator, so `pick("cpu")` costs nothing.
"""

import itertools
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tcw.cores import cores
from tcw.errors import UsageError

MAX_COPY_BYTES = 512 << 20
_RUNS = 7
_COPIES = 8  # a GPU copies too fast to time one copy


@dataclass(frozen=True)
class Device:
    """A place to run: `torch_name` is what torch calls it; memory in bytes; `reason` says why it was picked."""

    name: str
    torch_name: str
    kind: str
    memory_bytes: int
    free_bytes: int
    reason: str
    cores: int = 0


def pick(text: str = "auto") -> Device:
    """Pick the device called `text`: "auto" (cuda, then mps, then cpu), "cpu", "cuda", "cuda:1" or "mps".

    Raises UsageError for a name that means nothing and for a device that is not here; the hint lists what is.
    """
    asked = text.strip().lower()
    if asked == "cpu":
        return _cpu("asked for")
    if asked != "auto" and not re.fullmatch(r"mps|cuda(:\d{1,3})?", asked):
        raise UsageError(f"no device is called `{text}`", f"choose from: auto, {', '.join(available())}")
    here = available()
    if asked == "auto":
        found = here[0]
        reason = {"cpu": "no CUDA or MPS device is here"}.get(found, "the first accelerator found")
    else:
        found, reason = "cuda:0" if asked == "cuda" else asked, "asked for"
    if found not in here:
        raise UsageError(f"the device `{text}` is not here", f"choose from: {', '.join(here)}")
    return {"cuda": _cuda, "mps": _mps, "cpu": lambda name, why: _cpu(why)}[found.partition(":")[0]](found, reason)


def available() -> list[str]:
    """Names of the devices here, best first; the last one is always "cpu"."""
    import torch

    names = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        names.append("mps")
    return [*names, "cpu"]


def copy_bandwidth(device: Device) -> float:
    """Measure how fast `device` copies memory, in GB/s (1e9 bytes).

    Bytes read plus bytes written, so a copy of n bytes counts 2n. The buffer is twice the last-level cache, at least
    64 MB, at most 512 MB and a sixteenth of the free memory; the median of 7 runs after a warm-up. On the CPU
    every core this process may use copies its own slice.
    """
    size = copy_bytes(device)
    run, wait = _cpu_copy(size, device.cores) if device.kind == "cpu" else _torch_copy(size, device)
    copies = 1 if device.kind == "cpu" else _COPIES
    run()
    wait()
    seconds = []
    for _ in range(_RUNS):
        start = time.perf_counter()
        for _ in range(copies):
            run()
        wait()
        seconds.append((time.perf_counter() - start) / copies)
    return 2 * size / median(seconds) / 1e9


def copy_bytes(device: Device) -> int:
    """Size of the buffer that `copy_bandwidth` copies, in bytes, a multiple of 4096."""
    wanted = min(max(64 << 20, 2 * _last_level_cache()) if device.kind == "cpu" else MAX_COPY_BYTES, MAX_COPY_BYTES)
    return max(4096, min(wanted, device.free_bytes // 16) // 4096 * 4096)


def _cpu_copy(size: int, cores: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    # ones, not zeros: untouched pages all map to the same physical zero page
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    cuts = np.linspace(0, size, max(1, cores) + 1).astype(int)
    slices = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    pool = ThreadPoolExecutor(len(slices))

    def run() -> None:
        list(pool.map(lambda part: np.copyto(target[part], source[part]), slices))

    return run, lambda: None


def _torch_copy(size: int, device: Device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import torch

    source = torch.ones(size, dtype=torch.uint8, device=device.torch_name)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), synchronize(device.torch_name)


def synchronize(torch_name: str) -> Callable[[], Any]:
    """Return a function that waits until the device called `torch_name` has done all its work."""
    import torch

    if torch_name.startswith("cuda"):
        return lambda: torch.cuda.synchronize(torch_name)
    return torch.mps.synchronize if torch_name == "mps" else lambda: None


def _cuda(name: str, reason: str) -> Device:
    import torch

    free, total = torch.cuda.mem_get_info(name)
    return Device(torch.cuda.get_device_name(name), name, "cuda", total, free, reason, cores())


def _mps(name: str, reason: str) -> Device:
    import torch

    total = torch.mps.recommended_max_memory()
    free = max(0, total - torch.mps.driver_allocated_memory())
    return Device(f"{cpu_name()} GPU", name, "mps", total, free, reason, cores())


def _cpu(reason: str) -> Device:
    total, free = cpu_memory()
    return Device(cpu_name(), "cpu", "cpu", total, free, reason, cores())


def cpu_name() -> str:
    """The processor's name as its maker prints it, or the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = f"model name: {_sysctl('machdep.cpu.brand_string')}"
    found = re.search(r"^(?:model name|Hardware|Model)[ \t]*:[ \t]*(\S.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine() or "CPU"


def cpu_memory() -> tuple[int, int]:
    """Memory this process may use and how much of it is free now, in bytes; cgroup limits are honoured."""
    total, free = _machine_memory()
    for limit, used in _cgroup_limits():
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def _machine_memory() -> tuple[int, int]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        lines = ""
    kib = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", lines, re.MULTILINE)}
    if "MemTotal" in kib:
        return kib["MemTotal"] << 10, kib.get("MemAvailable", kib.get("MemFree", kib["MemTotal"])) << 10
    if platform.system() == "Darwin":
        page = int(_sysctl("hw.pagesize") or 4096)
        total = int(_sysctl("hw.memsize") or 0)
        return total, int(_sysctl("vm.page_free_count") or 0) * page or total
    # other systems without /proc: total by POSIX, free where the system says
    page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    total = os.sysconf("SC_PHYS_PAGES") * page if page else 0
    return total, total


def _sysctl(key: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """(limit, used) in bytes of this process's cgroup and each of its parents that has a memory limit."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        version1 = bool(controllers)
        top = root / "memory" if version1 else root
        here = top / path.lstrip("/")
        # inside a container the path may name the host's tree: then the mount's top is this process's group
        for folder in (here, *here.parents) if here.is_dir() else (top,):
            if folder == top or top in folder.parents:
                found.append(_cgroup_memory(folder, version1))
    return [(limit, used) for limit, used in found if limit is not None]


def _cgroup_memory(folder: Path, version1: bool) -> tuple[int | None, int]:
    limit = _number(folder / ("memory.limit_in_bytes" if version1 else "memory.max"))
    used = _number(folder / ("memory.usage_in_bytes" if version1 else "memory.current")) or 0
    return limit, max(0, used - _reclaimable(folder))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max" means no limit
        return None


def _reclaimable(folder: Path) -> int:
    """File cache that the kernel drops when memory is asked for."""
    try:
        text = (folder / "memory.stat").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", text, re.MULTILINE)
    return int(found.group(1)) if found else 0


def _last_level_cache() -> int:
    """Size of the largest CPU cache in bytes, 32 MB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text(encoding="ascii").strip())
        if found:
            sizes.append(int(found.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30}[found.group(2)])
    return max(sizes, default=32 << 20)
