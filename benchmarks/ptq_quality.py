"""What post-training quantisation costs and keeps: real bits, perplexity, KL, top-1, time, memory. On the CPU.

    python benchmarks/ptq_quality.py                                   # all rows, on the bundled texts
    python benchmarks/ptq_quality.py --methods fp8 int4:algo=rtn       # some rows, by name or as SPECs
    python benchmarks/ptq_quality.py --split articles.txt              # one text for both, see below
    python benchmarks/ptq_quality.py --calibration a.txt --evaluation b.txt --windows 40

Every row is one SPEC, run through `tcw.compress` in a process of its own, so that time (wall, and CPU of all threads)
and peak memory are its own, and loaded with `tcw.load`. Only linear layers are quantised; embedding and head are left
as they are. Bits are those of the artifact's files: everything that the quantised tensors take, over their weights.

Calibration: 32 windows of 512 tokens. Evaluation: `--windows` windows of 512 tokens spread evenly over the text,
float32 arithmetic on the decoded weights; perplexity over all tokens, mean KL to the original model in nats at every
position, and how often both have the same most likely token. `--split` takes a text of one article a line: of the
lines above 500 characters the first half calibrates and the second evaluates. Writes
results/ptq_quality-DATE-TEXT.json.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH, SAMPLES = 512, 32
ROWS = {
    "fp8": "fp8",
    "fp8 coded": "fp8:entropy=on",
    "fp8 gptq": "fp8:algo=gptq",
    "int8 rtn": "int8:algo=rtn",
    "int8 gptq": "int8:algo=gptq",
    "int4 rtn g64": "int4:algo=rtn,group_size=64",
    "int4 awq g64": "int4:algo=awq,group_size=64",
    "int4 gptq g64": "int4:algo=gptq,group_size=64",
    "gptq 2 bits g64": "int2:rotate=off,grid=zero,group_size=64,tune=0",
    "int2": "int2",
    "int2 rotate=off": "int2:rotate=off",
    "int2 grid=zero": "int2:grid=zero",
    "int2 tune=0": "int2:tune=0",
    "mixed 2.5": "mixed:bits=2.5",
    "mixed 3": "mixed:bits=3",
    "ecq 2.1 core": "ecq:bits=2.1,allocate=equal,trellis=0",  # WaterSIC's core: rounding, equal bits
    "ecq 2.1 equal": "ecq:bits=2.1,allocate=equal",
    "ecq 2.1": "ecq:bits=2.1",
    "ecq 2.6": "ecq:bits=2.6",
    "ecq 3.1 core": "ecq:bits=3.1,allocate=equal,trellis=0",
    "ecq 3.1 equal": "ecq:bits=3.1,allocate=equal",
    "ecq 3.1": "ecq:bits=3.1",
    "ecq 4.1": "ecq:bits=4.1",
}
RESULTS = Path(__file__).parent / "results"


def compress(spec: str, model: str, out: str, calibration: str) -> dict[str, Any]:
    """Run one SPEC in this process; what it took, and what is in the artifact's files."""
    import tcw
    from tcw.calibration import Settings
    from tcw.recipe import from_specs

    recipe = from_specs([spec])
    settings = Settings(text=Path(calibration) if calibration else None, samples=SAMPLES, length=LENGTH, device="cpu")
    start, cpu = time.perf_counter(), time.process_time()
    report = tcw.compress(tcw.open_model(model), recipe, Path(out), calibration=settings)
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    artifact = tcw.open_model(out)
    coded = [e for e in artifact.entries.values() if e.method == recipe.steps[0].method]
    weights = sum(e.info.numel for e in coded)
    return {
        "bits_per_weight": 8 * sum(artifact.tensor_bytes(e.name) for e in coded) / weights,
        "quantised_weights": weights,
        "quantised_tensors": len(coded),
        "file_bytes": report.bytes_compressed,
        "original_bytes": report.bytes_original,
        "seconds": wall,
        "cpu_seconds": cpu,
        "peak_memory_bytes": report.peak_memory_bytes,
        "notes": list(report.notes),
    }


def windows_of(model: str, text: str, count: int) -> Any:
    """int64 [count, LENGTH]: windows spread evenly over the text."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    import tcw

    tokenizer = AutoTokenizer.from_pretrained(tcw.open_model(model).path)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = len(ids) // LENGTH
    if whole < count:
        raise SystemExit(f"the evaluation text has {whole} windows of {LENGTH} tokens, {count} are wanted")
    picks = np.linspace(0, whole - 1, count).round().astype(int)
    return torch.tensor([ids[k * LENGTH : (k + 1) * LENGTH] for k in picks])


def evaluate(model: Any, reference: Any, ids: Any) -> dict[str, float]:
    """Perplexity of both models, and the distance between them, window by window."""
    import torch

    losses, kl, same, count = [0.0, 0.0], 0.0, 0, 0
    with torch.inference_mode():
        for window in ids:
            logs = [torch.log_softmax(m(window[None]).logits[0].float(), dim=-1) for m in (reference, model)]
            for i, log in enumerate(logs):
                losses[i] -= float(log[:-1].gather(1, window[1:, None]).double().sum())
            kl += float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).double().sum())
            same += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
            count += len(window)
    predicted = count - len(ids)
    before, after = (math.exp(loss / predicted) for loss in losses)
    return {
        "reference_perplexity": before, "perplexity": after, "perplexity_ratio": after / before, "kl": kl / count,
        "top1": same / count,
    }  # fmt: skip


def measure(name: str, spec: str, options: argparse.Namespace, reference: Any, ids: Any) -> dict[str, Any]:
    """One row of the table."""
    import torch

    import tcw

    with tempfile.TemporaryDirectory() as scratch:
        out = f"{scratch}/artifact"
        job = [spec, options.model, out, str(options.calibration or "")]
        command = [sys.executable, __file__, "--compress", json.dumps(job)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            error = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"{name}: {error}", file=sys.stderr)
            return {"name": name, "spec": spec, "error": error}
        row = {"name": name, "spec": spec, **json.loads(run.stdout.splitlines()[-1])}
        model = tcw.load(out, residency="bf16", device="cpu", dtype=torch.float32)
        return row | evaluate(model, reference, ids)


def split(path: Path, folder: Path) -> tuple[Path, Path]:
    """Two files: the first and the second half of a text's long lines."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 500]
    halves = folder / "calibration.txt", folder / "evaluation.txt"
    for half, chosen in zip(halves, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        half.write_text("\n".join(chosen), encoding="utf-8")
    return halves


def show(row: dict[str, Any]) -> None:
    if "error" in row:
        return
    cells = (
        f"{row['name']:16}", f"{row['bits_per_weight']:6.3f}", f"{row['file_bytes'] / 1e6:6.1f}",
        f"{row['perplexity']:8.2f}", f"{row['perplexity_ratio']:6.3f}", f"{row['kl']:7.4f}", f"{row['top1']:.3f}",
        f"{row['seconds']:5.0f}", f"{row['cpu_seconds']:5.0f}", f"{row['peak_memory_bytes'] / 1e6:6.0f}",
    )  # fmt: skip
    print(f"| {' | '.join(cells)} |", flush=True)


def machine() -> dict[str, Any]:
    """The machine's kind, without its name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numba", "numpy")}
    return {
        "cpu": names[0] if names else platform.processor(), "cores": cores, "load": os.getloadavg()[0],
        "python": platform.python_version(), **packages,
    }  # fmt: skip


def main() -> None:
    """Measure, print, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2", help="what tcw takes as MODEL")
    parser.add_argument("--methods", nargs="+", help=f"SPECs, or of: {', '.join(ROWS)}")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on; by default the bundled one")
    parser.add_argument("--evaluation", type=Path, help="text to evaluate on; by default the bundled one")
    parser.add_argument("--split", type=Path, help="text of one article a line: half to calibrate, half to evaluate")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--compress", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compress:
        print(json.dumps(compress(*json.loads(options.compress))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        if options.split:
            options.calibration, options.evaluation = split(options.split, Path(scratch))
        run(options)


def run(options: argparse.Namespace) -> None:
    """All rows, printed and written as they come."""
    import torch
    from transformers.utils import logging

    import tcw
    from tcw.data import evaluation_text

    logging.disable_progress_bar()
    text = options.evaluation.read_text(encoding="utf-8") if options.evaluation else evaluation_text()
    ids = windows_of(options.model, text, options.windows)
    reference = tcw.load(options.model, residency="bf16", device="cpu", dtype=torch.float32)
    print("| method           |   bits |     MB |      PPL |  ratio |      KL | top-1 |  wall |   CPU | MB mem |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    report = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine(), "model": options.model,
        "calibration": {"text": _name(options.split or options.calibration), "windows": SAMPLES, "length": LENGTH},
        "evaluation": {"text": _name(options.split or options.evaluation), "windows": len(ids), "length": LENGTH},
        "rows": rows,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"ptq_quality-{report['date']}-{Path(report['evaluation']['text']).stem}.json"
    for name in options.methods or ROWS:
        rows.append(measure(name, ROWS.get(name, name), options, reference, ids))
        show(rows[-1])
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


def _name(path: Path | None) -> str:
    return path.name if path else "bundled"


if __name__ == "__main__":
    main()
