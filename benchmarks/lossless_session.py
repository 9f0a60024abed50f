"""Runs the parts of benchmarks/lossless_gpu.py as processes, collects their rows, and writes them as they come."""

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

OPS = ("lanes_decode", "df11_decode", "lanes_encode", "packed_matmul")
LONGEST = {
    "check": 120,
    "decode": 300,
    "encode": 90,
    "prepare": 180,
    "load": 120,
    "ops": 120,
    "sanitize": 90,
}  # fmt: skip  seconds of a process
RETRIES = 3
HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "lossless_gpu.py"


class Session:
    """Collects rows of all parts, and writes them whenever there is one more."""

    def __init__(self, options: argparse.Namespace) -> None:
        from tcw import __version__
        from tcw.bench.rows import commit_of, driver_version
        from tcw.device import cpu_name

        self.options, self.red = options, set()
        self.end = time.monotonic() + options.limit if options.limit else float("inf")
        gpu = options.device != "cpu"
        today = datetime.date.today().isoformat()
        self.path = options.out or (HERE / "results" / f"lossless-gpu-{today}.json" if gpu else None)
        self.report: dict[str, Any] = {
            "date": today, "options": {k: v for k, v in vars(options).items() if k not in ("out", "work")},
            "rehearsal": not gpu,
            "device": torch.cuda.get_device_name(options.device) if gpu else cpu_name(), "driver": driver_version(),
            "torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0],
            "tcw": __version__, "commit": commit_of(HERE.parent if (HERE.parent / ".git").exists() else None),
            "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "rows": [], "failures": [], "seconds": {},
        }  # fmt: skip

    def write(self) -> None:
        """Replace the file of results."""
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(json.dumps({**self.report, "summary": summary(self.report["rows"])}, indent=1) + "\n")
            partial.replace(self.path)

    def add(self, row: dict[str, Any]) -> None:
        self.report["rows"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        self.write()

    def fail(self, part: str, why: str) -> None:
        self.report["failures"].append({"part": part, "why": why})
        print(f"FAILED {part}: {why}", file=sys.stderr, flush=True)
        self.write()

    # the parts

    def check(self, work: Path) -> None:
        """Each kernel against its reference; what is wrong takes no part in `decode` and `encode`."""
        for op in OPS:
            code, out, err = self.run(f"check {op}", self.bench(op, "--check", "--json"), LONGEST["check"])
            row = {"what": "check", **first(out, "checks"), "op": op}
            if code not in (0, 1):
                row["left_out"] = err[-300:].strip() or f"exit code {code}"
                if not self.report["rehearsal"]:
                    self.fail(f"check {op}", row["left_out"])
            elif row["wrong"]:
                self.red.add(f"tcw {op}")
                self.fail(f"check {op}", "; ".join(f"{k}: {v}" for k, v in row["wrong"].items())[:600])
            self.add(row)

    def ops(self, work: Path) -> None:
        """`tcw bench` of each kernel."""
        for op in OPS:
            seconds = "0.01" if self.options.tiny else str(self.options.seconds)
            command = self.bench(op, "--no-save", "--json", "--seconds", seconds)
            code, out, err = self.run(f"ops {op}", command, LONGEST["ops"])
            if code:
                self.add({"what": "op", "op": op, "left_out": err[-300:].strip() or f"exit code {code}"})
            for row in json.loads(out)["rows"] if code == 0 else []:
                kept = ("op", "case", "way", "bytes") if self.report["rehearsal"] else tuple(row)
                self.add({"what": "op", **{key: row[key] for key in kept}})

    def bench(self, op: str, *options: str) -> list[str]:
        return [sys.executable, "-m", "tcw", "bench", op, "--device", self.options.device, *options]

    def decode(self, work: Path) -> None:
        self.part("decode", work, LONGEST["decode"])

    def encode(self, work: Path) -> None:
        self.part("encode", work, LONGEST["encode"])

    def model(self, work: Path) -> None:
        if self.part("prepare", work, LONGEST["prepare"]):
            for way in self.options.ways:
                self.part(way, work, LONGEST["load"])

    def sanitize(self, work: Path) -> None:
        tool = shutil.which("compute-sanitizer")
        if not tool or self.options.device == "cpu":
            self.add({"what": "sanitize", "left_out": "no compute-sanitizer, or no GPU"})
            return
        os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else a buffer's neighbours belong to torch, too
        for op in OPS:
            for kind in ("memcheck", "racecheck"):
                command = [tool, "--tool", kind, "--error-exitcode", "86", *self.bench(op, "--check")]
                code, out, err = self.run(f"{kind} {op}", command, LONGEST["sanitize"])
                found = [line for line in (out + err).splitlines() if line.startswith("=========")]
                self.add({"what": "sanitize", "tool": kind, "op": op, "code": code, "said": found[-3:]})
                if code:
                    self.fail(f"{kind} {op}", " ".join(found[-1:]) or f"exit code {code}: {err[-300:]}")

    # processes

    def part(self, name: str, work: Path, longest: float) -> bool:
        """Run a part; where it ends badly, again without the decoder that it was trying. Says whether it ended well."""
        kept = list(self.report["rows"])
        for _ in range(RETRIES):
            trying: list[str] = []

            def take(line: str, trying: list[str] = trying) -> None:
                if not line.startswith("{"):  # some library prints
                    print(line, end="", file=sys.stderr)
                    return
                row = json.loads(line)
                if "trying" in row:
                    trying.append(row["trying"])
                else:
                    self.add(row)

            options = [*sys.argv[1:], "--part", name, "--work", work, "--red", ",".join(sorted(self.red))]
            command = [sys.executable, str(SCRIPT), *map(str, options)]
            code, _, err = self.run(name, command, longest, take)
            if code == 0:
                return True
            self.fail(name, f"exit code {code}: {' | '.join(err.strip().splitlines()[-3:])[-500:]}")
            if not trying or code == -signal.SIGKILL:
                return False
            self.red.add(trying[-1])
            self.report["rows"] = list(kept)
        return False

    def run(
        self, name: str, command: list[str], longest: float, take: Callable[[str], None] | None = None
    ) -> tuple[int, str, str]:
        """Run a command no longer than `longest` and what is left in all; `take` is given its lines as they come."""
        longest = min(longest, self.end - time.monotonic())
        if longest < 1:
            return -signal.SIGKILL, "", "no time is left"
        start, lines, said_there = time.monotonic(), [], []
        places = [os.environ.get("PYTHONPATH", ""), str(HERE.parent)]  # tcw, where it is not installed
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
        ) as child:  # fmt: skip
            assert child.stdout
            assert child.stderr
            late = threading.Timer(longest, lambda: os.killpg(child.pid, signal.SIGKILL))
            errors = threading.Thread(target=lambda: said_there.extend(child.stderr))
            late.start()
            errors.start()
            for line in child.stdout:
                lines.append(line)
                if take:
                    take(line)
            code = child.wait()
            late.cancel()
            errors.join()
        self.report["seconds"][name] = round(time.monotonic() - start, 1)
        return code, "".join(lines), "".join(said_there)

    def table(self) -> list[str]:
        """What was found, for a person."""
        found = summary(self.report["rows"])
        lines = [f"{self.report['device']}, {'rehearsal: nothing timed' if self.report['rehearsal'] else 'measured'}"]
        for rows in found.values():
            lines += ["", *(", ".join(f"{k} {v}" for k, v in row.items() if v is not None) for row in rows)]
        return lines + [f"FAILED {failure['part']}: {failure['why']}" for failure in self.report["failures"]]


def first(out: str, key: str) -> dict[str, Any]:
    """The first entry of a list in what a command printed; nothing is wrong where it printed none."""
    try:
        return json.loads(out)[key][0]
    except (ValueError, LookupError):
        return {"cases": 0, "wrong": {}}


def summary(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Ratios: of decoders to the official one and to a copy, of ways to load a model to BF16."""
    decoded = [row for row in rows if row["what"] in ("decode", "encode")]
    speeds = {(row["sample"], row["way"]): row.get("gbps") for row in decoded}
    steps = [row for row in rows if row["what"] == "step"]
    rates = {(row["way"], row["batch"]): row.get("tokens_per_second") for row in steps}
    held = {row["way"]: row.get("weight_bytes") for row in rows if row["what"] == "load"}
    return {
        "tensors": [
            {
                "what": row["what"], "sample": row["sample"], "way": row["way"], "gbps": _digits(row.get("gbps")),
                "bytes_ratio": _digits(row.get("ratio")),
                "times_official": _over(row.get("gbps"), speeds.get((row["sample"], "official decode.ptx"))),
                "of_copy": _over(row.get("gbps"), speeds.get((row["sample"], "copy"))),
                "wrong": row.get("wrong") or None, "left_out": row.get("left_out"),
            } for row in decoded
        ],
        "model": [
            {
                "way": row["way"], "batch": row["batch"],
                "tokens_per_second": _digits(row.get("tokens_per_second")),
                "times_bf16": _over(row.get("tokens_per_second"), rates.get(("bf16", row["batch"]))),
                "weight_bytes_ratio": _over(held.get(row["way"]), held.get("bf16")),
                "bit_identical": (row.get("logits") or {}).get("bit_identical"), "graph": row.get("graph"),
            } for row in steps
        ],
    }  # fmt: skip


def _over(value: float | None, base: float | None) -> float | None:
    return _digits(value / base) if value and base else None


def _digits(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
