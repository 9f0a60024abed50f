"""Kernels in a process of their own under a sanitizer (worker.py), on copies of the tensors."""

import atexit
import contextlib
import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch

from . import build
from .build import HostError
from .worker import LINE, read, write

WORKERS: dict[str, "Worker"] = {}
FRAME = re.compile(r"\s*(#\d+ .*?\.cuh?:\d+)")
HEADLINE = re.compile(
    r"ERROR|WARNING|runtime error|^ *(Previous )?(atomic )?(read|write) of|is located|stopped by", re.I
)


class Worker:
    """One process; it ends with the first kernel that fails."""

    def __init__(self, watch: str) -> None:
        library = build.sanitizer(watch)
        if library is None:
            raise HostError(f"the C++ compiler has no sanitizer of {watch} that works here")
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={"LD_PRELOAD": str(library), "PATH": os.environ.get("PATH", ""), **build.WATCH_OPTIONS},
        )  # fmt: skip
        atexit.register(self.end)

    def ask(self, header: dict[str, Any], buffers: list[bytes]) -> tuple[str, list[bytes]]:
        """Send a launch. Returns (what went wrong, the buffers as the kernel left them)."""
        try:
            write(pipe(self.process.stdin), header, buffers)
            answer = read(pipe(self.process.stdout))
        except BrokenPipeError:
            answer = None
        if answer is None:
            return digest(pipe(self.process.stderr).read().decode(errors="replace")), []
        return answer[0]["failed"], answer[1]

    def end(self) -> None:
        """Close the pipes and wait for the process."""
        atexit.unregister(self.end)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(BrokenPipeError):
                pipe(stream).close()
        self.process.wait(timeout=20)


def pipe(stream: Any) -> BinaryIO:
    """A stream of Popen, which is there."""
    return stream


def digest(report: str) -> str:
    """The lines of a sanitizer's report that say what, where in the kernel, and which thread."""
    names = dict(re.findall(r"Thread (T\d+) '(\(\d+, \d+, \d+\))'", report))
    kept = []
    for line in report.splitlines():
        frame = FRAME.match(line)
        if frame and not re.search(r"operator\(\)|_FUN|tcw_run_", line):
            kept.append(frame[1])
        elif not frame and HEADLINE.search(line):
            kept.append(re.sub(r"\bT\d+\b", lambda found: names.get(found[0], found[0]), line.strip()))
    return "\n".join(kept[:12]) or f"the process of the sanitizer died: {report[-500:]}"


def run(
    watch: str, built: Path, name: str, launch: ctypes.Structure, values: list[ctypes.Array], args: list[Any]
) -> str:
    """Run a launch in the worker and copy back what it wrote. Returns what went wrong, or nothing."""
    spans, places = lay_out([a for a in args if isinstance(a, torch.Tensor)])
    where = iter(places)
    header = {
        "library": str(built),
        "table": bytes(build.table(built)).hex(),
        "kernel": name,
        "launch": bytes(launch).hex(),
        "values": [
            next(where) if isinstance(a, torch.Tensor) else v.raw.hex() for a, v in zip(args, values, strict=True)
        ],
        "offsets": [start % LINE for start, _ in spans],
    }
    if watch not in WORKERS:
        WORKERS[watch] = Worker(watch)
    failed, left = WORKERS[watch].ask(header, [ctypes.string_at(start, end - start) for start, end in spans])
    if failed:
        WORKERS.pop(watch).end()
    for (start, _), data in zip(spans, left, strict=False):
        ctypes.memmove(start, data, len(data))
    return failed


def lay_out(tensors: list[torch.Tensor]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Returns (the stretches of memory, apart from each other; for each tensor its stretch and its offset there).

    Tensors that overlap share a stretch; those that only touch do not.
    """
    pieces = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors)
    spans: list[tuple[int, int]] = []
    for start, end in pieces:
        if spans and start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    places = []
    for t in tensors:
        start = t.data_ptr()
        i = next(i for i, (a, b) in enumerate(spans) if a <= start and (start < b or start == a == b))
        places.append((i, start - spans[i][0]))
    return spans, places
