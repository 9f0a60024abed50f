"""Lossless BF16 weights on a GPU, one run: decoders and encoders on the same tensors, and whole models beside BF16.

    python benchmarks/lossless_gpu.py --all --limit 540 --out results.json   # everything, within nine minutes
    python benchmarks/lossless_gpu.py --check --decode --encode --ops        # tensors only
    python benchmarks/lossless_gpu.py --model --layers 8                     # a smaller model
    python benchmarks/lossless_gpu.py --all --tiny                           # rehearsal, without a GPU: times nothing

    check      `tcw bench OP --check` for each kernel; what is wrong takes no part in what follows
    decode     ours, the official decode.ptx, nvCOMP's ANS and a copy, on the shapes of Llama-3.1-8B with exponents of
               2.60 bits, and on SmolLM2; each gives back every bit before it is timed. GB/s of BF16 written
    encode     on the GPU and on the processor, to the same bytes. GB/s of BF16 read
    model      a Llama-8B of random weights, compressed, then loaded in each way: tokens a second of a step in a
               CUDA graph at batch 1, 4, 16 and 64, memory of weights from the allocator, logits against BF16
    ops        `tcw bench OP` for each kernel
    sanitize   compute-sanitizer (memcheck, racecheck) on the checks, where it is on PATH; last, as it is slow

Kernels are timed by CUDA events with a flushed L2 cache (tcw/bench/clock.py). Each part is a process of its own: one
that fails, crashes the device or takes too long costs the others nothing, and results are written as they come.
Writes benchmarks/results/lossless-gpu-DATE.json; without a GPU only where --out says.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # also where PYTHONSAFEPATH is set
sys.path.append(str(HERE.parent))  # tcw, where it is not installed

import lossless_inputs  # noqa: E402
import lossless_model  # noqa: E402
import lossless_session  # noqa: E402
import lossless_ways  # noqa: E402
import torch  # noqa: E402

PARTS = ("check", "decode", "encode", "model", "ops", "sanitize")


def main() -> int:
    """Run the parts that are asked for, each in a process of its own; or one part, in this process."""
    options = parsed()
    if options.part:
        for row in run_part(options):
            print(json.dumps(row), flush=True)
        return 0
    wanted = [part for part in PARTS if options.all or getattr(options, part)]
    if not wanted:
        raise SystemExit(f"nothing to do: --all, or some of --{' --'.join(PARTS)}")
    session = lossless_session.Session(options)
    work = Path(tempfile.mkdtemp(prefix="tcw-bench-", dir=roomy(options)))
    try:
        for part in wanted:
            getattr(session, part)(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        session.write()
    print("\n".join(session.table()))
    return 1 if session.report["failures"] else 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("all", *PARTS):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small tensors and a small model, to rehearse")
    parser.add_argument("--real", type=Path, help="a safetensors file to take real matrices from, not SmolLM2")
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    parser.add_argument("--batches", type=int, nargs="*", default=list(lossless_model.BATCHES))
    parser.add_argument("--ways", nargs="*", default=list(lossless_model.WAYS), help="to load the model")
    parser.add_argument("--seconds", type=float, default=0.3, help="on each decoder and tensor")
    parser.add_argument("--limit", type=float, default=0, help="seconds for all; parts that do not fit are left out")
    parser.add_argument("--out", type=Path, help="file for the results; replaced")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--red", default="", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("no GPU: only --tiny, a rehearsal, runs on a processor")
    return options


def roomy(options: argparse.Namespace) -> Path | None:
    """A folder in memory if a model fits there twice, else None: the usual place."""
    shared = Path("/dev/shm")
    need = 0 if options.tiny else 40 << 30
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > need else None


# ---- one part, in a process of its own: rows of JSON on stdout


def run_part(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(options.device)
    red = set(filter(None, options.red.split(",")))
    if options.part == "decode":
        yield from decode(options, device, red)
    elif options.part == "encode":
        yield from encode(options, device, red)
    elif options.part == "prepare":
        sizes = lossless_inputs.TINY_LLAMA if options.tiny else lossless_inputs.LLAMA_8B
        layers = sizes["num_hidden_layers"] if options.tiny else options.layers
        yield from lossless_model.prepare(options.work, {**sizes, "num_hidden_layers": layers}, device)
    else:
        yield from lossless_model.measure(options.work, options.part, device, tuple(options.batches))


def decode(options: argparse.Namespace, device: torch.device, red: set[str]) -> Iterator[dict[str, Any]]:
    """Every decoder on every sample; names what it tries first, so that a crash tells who it was."""
    from tcw.bench.clock import CpuClock, GpuClock

    gpu = device.type == "cuda"
    clocks = {graph: GpuClock(device, graph) if gpu else CpuClock(1 << 20) for graph in (True, False)}
    # some decoders work on a stream that they are told: the default one has no number of its own
    with torch.cuda.stream(torch.cuda.Stream(device)) if gpu else contextlib.nullcontext():
        for name, make in lossless_inputs.samples(options.tiny, device, options.real):
            try:
                sample = make()
            except Exception as error:  # SmolLM2 may not be installed
                yield {"what": "decode", "sample": name, "way": "all", "left_out": said(error)}
                continue
            yield from _decode_sample(name, sample, options, red, clocks)


def _decode_sample(
    name: str, sample: list[torch.Tensor], options: argparse.Namespace, red: set[str], clocks: dict[bool, Any]
) -> Iterator[dict[str, Any]]:
    from tcw.bench.clock import percentile

    gpu = sample[0].device.type == "cuda"
    words = lossless_ways.flat(sample)
    entropy = lossless_inputs.exponent_entropy(words)
    known = {"what": "decode", "sample": name, "weights": words.numel(), "entropy_bits": round(entropy, 4)}
    for way_name, make in lossless_ways.decoders(sample):
        yield {"trying": way_name}
        row = {**known, "way": way_name}
        try:
            if way_name in red:
                raise lossless_ways.LeftOut("its check is red, or it crashed")
            way = make()
            row |= {"bytes": way.nbytes, "ratio": way.nbytes / words.nbytes}
            row["wrong"] = lossless_ways.wrong(way, sample)
            if not row["wrong"]:
                times = clocks[way.graph].measure(way.run, None if gpu else 2, options.seconds)
                row |= _speed([percentile(times.ms, p) for p in (20, 50, 80)], words.nbytes, gpu)
                row |= {"runs": len(times.ms), "graph": times.graph}
        except Exception as error:
            row["left_out"] = said(error)
            if gpu:
                torch.cuda.synchronize()  # raises when the device is lost: then this process ends
        way = None
        yield row


def encode(options: argparse.Namespace, device: torch.device, red: set[str]) -> Iterator[dict[str, Any]]:
    """The codec of the processor, and lanes_encode; both must give the same bytes."""
    import numpy as np

    from tcw.codecs import lanes

    gpu = device.type == "cuda"
    rows, columns = (lossless_inputs.TINY_SHAPES if options.tiny else lossless_inputs.SHAPES)[2 * gpu]
    matrix = lossless_inputs.weights(rows, columns, device, 2)
    host = lossless_ways.host_words(matrix)
    known = {"what": "encode", "sample": f"{rows}x{columns}", "weights": matrix.numel()}
    stream = lanes.encode(host, "bf16")
    row = {**known, "way": "tcw codec, processor", "cores": len(os.sched_getaffinity(0)), "bytes": stream.nbytes}
    yield row | _speed(_walls(lambda: lanes.encode(host, "bf16"), 5), host.nbytes, gpu)
    if "tcw lanes_encode" in red:
        return
    from tcw.kernels import lanes_encode

    yield {"trying": "tcw lanes_encode"}
    made = lanes_encode.encode(matrix, "bf16")
    same = made.params == stream.params and all(
        np.array_equal(part.cpu().numpy().view(stream.parts[name].dtype), stream.parts[name])
        for name, part in made.parts.items()
    )
    row = {**known, "way": "tcw lanes_encode", "wrong": "" if same else "other bytes than the codec's"}
    if same:
        row |= _speed(_walls(lambda: lanes_encode.encode(matrix, "bf16"), 20), host.nbytes, gpu)
    yield row


def _walls(work: Any, count: int) -> list[float]:
    """Milliseconds of wall time, the device waited for: 20th, 50th and 80th percentile."""
    from tcw.bench.clock import percentile

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    found = []
    for _ in range(count):
        wait()
        start = time.perf_counter()
        work()
        wait()
        found.append(1000 * (time.perf_counter() - start))
    return [percentile(sorted(found), p) for p in (20, 50, 80)]


def _speed(ms: list[float], nbytes: int, gpu: bool) -> dict[str, Any]:
    """Times and GB/s of BF16; a rehearsal on a processor reports none."""
    if not gpu:
        return {"rehearsed": True}
    return {"ms_p20": ms[0], "ms_p50": ms[1], "ms_p80": ms[2], "gbps": nbytes / ms[1] / 1e6}


def said(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(getattr(error, "message", error)).split())
    return f"{text[:300]} ({type(error).__name__})"


if __name__ == "__main__":
    sys.exit(main())
