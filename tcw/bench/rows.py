"""Rows of results: what was measured, on what, and the file they are appended to."""

import datetime
import json
import os
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tcw import __version__
from tcw.bench.clock import Times, percentile
from tcw.bench.timed import Timed
from tcw.cache import cache_folder
from tcw.cores import cores
from tcw.device import Device, cpu_name
from tcw.disk import writing


@dataclass(frozen=True)
class Facts:
    """What all rows of a run share.

    Attributes:
        copy_gbps: how fast the device copies, GB (1e9 bytes) a second, bytes read and bytes written.
        device: its name; driver: of a GPU, else ""; torch, tcw: versions.
        commit: of the checkout, with "-dirty" where files but results differ from it.
        date: when the run began, UTC; cpu: the processor; threads: the cores that this process may use.
    """

    copy_gbps: float
    device: str
    driver: str
    torch: str
    tcw: str
    commit: str
    date: str
    cpu: str
    threads: int


@dataclass(frozen=True)
class Row:
    """One way to do one case, timed; a line of results.jsonl.

    Attributes:
        op, case, way: what was timed.
        ms_p20, ms_p50, ms_p80: milliseconds of a run, by percentile.
        gbps: GB (1e9 bytes) a second of `bytes`, at the median.
        percent_of_copy: `gbps` as a share of how fast the device copies.
        ratio: how many times as long as the case's first way it takes, at the median.
        cpu_gbps: GB a second of processor time, all threads added up; None on a GPU.
        bytes: that must at least move.
        runs: how many were timed; graph: as a CUDA graph.
        facts: the rest.
    """

    op: str
    case: str
    way: str
    ms_p20: float
    ms_p50: float
    ms_p80: float
    gbps: float
    percent_of_copy: float
    ratio: float
    cpu_gbps: float | None
    bytes: int
    runs: int
    graph: bool
    facts: Facts

    def to_json(self) -> dict[str, Any]:
        """All of it, flat."""
        own = asdict(self)
        known = own.pop("facts")
        return {**own, **known}


def facts(device: Device, copy_gbps: float, checkout: Path | None) -> Facts:
    """What a run on `device` is known by; `checkout` is the work tree that the kernels are in, if they are in one."""
    import torch

    return Facts(
        copy_gbps=_rounded(copy_gbps),
        device=device.name,
        driver=driver_version() if device.kind == "cuda" else "",
        torch=torch.__version__,
        tcw=__version__,
        commit=commit_of(checkout),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        cpu=cpu_name(),
        threads=cores(),
    )


def row(op: str, timed: Timed, times: Times, first_ms: float | None, known: Facts) -> Row:
    """Put a row together; `first_ms` is the median of the case's first way, None where this is the first way."""
    low, middle, high = (percentile(times.ms, percent) for percent in (20, 50, 80))
    gbps = timed.nbytes / middle / 1e6
    cpu = percentile(times.cpu_ms, 50) if times.cpu_ms else 0.0
    return Row(
        op=op,
        case=timed.case,
        way=timed.way,
        ms_p20=_rounded(low),
        ms_p50=_rounded(middle),
        ms_p80=_rounded(high),
        gbps=_rounded(gbps),
        percent_of_copy=_rounded(100 * gbps / known.copy_gbps),
        ratio=_rounded(1.0 if first_ms is None else middle / first_ms),
        cpu_gbps=_rounded(timed.nbytes / cpu / 1e6) if cpu else None,
        bytes=timed.nbytes,
        runs=len(times.ms),
        graph=times.graph,
        facts=known,
    )


def _rounded(value: float) -> float:
    """Four digits: a clock says no more."""
    return float(f"{value:.4g}")


def place_of(op_folder: Path) -> Path:
    """Where results of the operation in `op_folder` go: there in a writable git work tree, else in the cache folder."""
    if checkout_of(op_folder) and os.access(op_folder, os.W_OK):
        return op_folder / "results.jsonl"
    return cache_folder() / "bench" / f"{op_folder.name}.jsonl"


def checkout_of(op_folder: Path) -> Path | None:
    """The git work tree that has kernels/<op> at its top, or None."""
    top = op_folder.parent.parent
    return top if (top / ".git").exists() else None


def append(rows: Iterable[Row], path: Path) -> None:
    """Append rows to a file, one JSON object a line; folders are made."""
    text = "".join(json.dumps(each.to_json()) + "\n" for each in rows)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)


def commit_of(checkout: Path | None) -> str:
    """The commit of a work tree, with "-dirty" where files but results differ from it; without git, `$TCW_COMMIT`."""
    commit = _git(checkout, "rev-parse", "--short=12", "HEAD") if checkout else ""
    if not checkout or not commit:
        return os.environ.get("TCW_COMMIT", "")
    changed = _git(checkout, "status", "--porcelain", "--", ".", ":(exclude)kernels/*/results.jsonl")
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    return _said("git", "-C", str(folder), *arguments)


def driver_version() -> str:
    """The version of NVIDIA's driver, "" where nothing says it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return found.group() if found else _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _said(*command: str) -> str:
    """The first line that a program prints, "" where it fails or is not here."""
    environment: dict[str, Any] = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # only looks
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0].strip()
