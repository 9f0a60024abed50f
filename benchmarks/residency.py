"""What the residencies of a loaded model cost: seconds to load, peak memory, tokens per second. On the CPU.

    python benchmarks/residency.py                       # a synthetic Llama of 1 GB, and demo:smollm2
    python benchmarks/residency.py --model demo:smollm2
    python benchmarks/residency.py --gigabytes 4 --rounds 3

Each figure is of a process of its own; rounds take turns, and the median counts. Memory is resident memory: "base" with
transformers imported and nothing loaded, "compiler" what Numba adds, which artifacts are decoded with, then the highest
so far after loading and after generating. OpenMP has a thread
for each core and OMP_WAIT_POLICY=PASSIVE, so that its threads do not spin while weights are decoded. All ways must
give the same tokens. The synthetic model has the shapes of TinyLlama-1.1B, as many layers as fit, and Gaussian BF16
weights. Writes benchmarks/results/residency-DATE.json.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tcw.safetensors_file import StreamWriter, header_bound
from tcw.tensor import TensorInfo

HIDDEN, MLP, KV, VOCABULARY = 2048, 5632, 256, 32000
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (MLP, HIDDEN), "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
}  # fmt: skip
WAYS = ("folder, transformers", "folder", "artifact bf16", "artifact huffman")
TOKENS = 16
PROMPT = list(range(3, 35))
RESULTS = Path(__file__).parent / "results"


def write_model(folder: Path, limit: int) -> str:
    """Write a model of at most `limit` bytes into `folder`; returns what it is."""
    outer = [TensorInfo(f"{name}.weight", "BF16", (VOCABULARY, HIDDEN)) for name in ("model.embed_tokens", "lm_head")]
    outer.append(TensorInfo("model.norm.weight", "BF16", (HIDDEN,)))
    layer_bytes = sum(TensorInfo(name, "BF16", shape).nbytes for name, shape in LAYER.items())
    layers = max(1, (limit - sum(i.nbytes for i in outer)) // layer_bytes)
    infos = [
        *outer,
        *(TensorInfo(f"model.layers.{n}.{k}.weight", "BF16", s) for n in range(layers) for k, s in LAYER.items()),
    ]
    rng = np.random.default_rng(0)
    with StreamWriter(folder / "model.safetensors", header_bound(infos), {"format": "pt"}) as writer:
        for info in infos:
            values = rng.normal(0, 0.02, info.numel) if len(info.shape) > 1 else np.ones(info.numel)
            writer.append(info, (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": VOCABULARY,
        "tie_word_embeddings": False, "dtype": "bfloat16", "max_position_embeddings": 2048,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return f"Llama, {layers} layers, {sum(i.nbytes for i in infos) / 1e9:.2f} GB, Gaussian"


class Times:
    """A streamer that notes when each token came; the first call is the prompt's."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def measure(way: str, folder: str, artifact: str) -> dict[str, Any]:
    """Load and generate in this process."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  all decoders here are Llamas
    from transformers.utils import logging

    import tcw
    import tcw.runtime.load
    from tcw.memory import peak_memory

    logging.disable_progress_bar()
    base = peak_memory()
    if way.startswith("artifact"):
        import tcw.codecs.lanes  # the compiler
    compiler, start = peak_memory() - base, time.perf_counter()
    if way == "folder, transformers":
        model = AutoModelForCausalLM.from_pretrained(folder)
    elif way == "folder":
        model = tcw.load(folder, residency="bf16", device="cpu")
    else:
        model = tcw.load(artifact, residency=way.split()[1], device="cpu")
    seconds, loaded = time.perf_counter() - start, peak_memory()
    ids = torch.tensor([PROMPT])
    times = Times()
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS,
            temperature=None, top_p=None, top_k=None, pad_token_id=0, streamer=times,
        )  # fmt: skip
    steps = times.times[1:]
    return {
        "load_seconds": seconds,
        "base_bytes": base,
        "compiler_bytes": compiler,
        "peak_loaded_bytes": loaded,
        "peak_generated_bytes": peak_memory(),
        "tokens_per_second": (len(steps) - 1) / (steps[-1] - steps[0]),
        "tokens": output[0, len(PROMPT) :].tolist(),
    }


def rounds_of(folder: Path, artifact: Path, rounds: int) -> list[dict[str, Any]]:
    """Median figures of each way; raises SystemExit when their tokens differ."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(cores()), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            command = [sys.executable, __file__, "--measure", way, str(folder), str(artifact)]
            run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if run.returncode:
                raise SystemExit(run.stderr)
            found[way].append(json.loads(run.stdout.splitlines()[-1]))
    if len({tuple(one["tokens"]) for many in found.values() for one in many}) != 1:
        raise SystemExit("the tokens differ")
    keys = [key for key in found[WAYS[0]][0] if key != "tokens"]
    return [
        {"way": w, **{key: statistics.median(one[key] for one in many) for key in keys}} for w, many in found.items()
    ]


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """The machine, without its name."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numba", "numpy")}
    return {"cpu": model, "cores": cores(), "python": platform.python_version(), **packages}


def run_model(model: str, scratch: Path, limit: int, rounds: int) -> dict[str, Any]:
    """Make or find the model, compress it, measure all ways; prints a table."""
    import tcw
    from tcw.recipe import from_specs

    folder, artifact = scratch / "model", scratch / "model.tcw"
    if model == "synthetic":
        folder.mkdir()
        name = write_model(folder, limit)
    else:
        name = model
        folder = tcw.open_model(model).path
    report = tcw.compress(tcw.open_model(folder), from_specs(["dfloat11"]), artifact)
    rows = rounds_of(folder, artifact, rounds)
    print(f"\n{name}: {report.bytes_original / 1e6:.0f} MB of weights, {report.bytes_compressed / 1e6:.0f} compressed")
    print(f"{'MB, resident':22}  load s    base  compiler  loaded    peak  peak - base   tok/s")
    for row in rows:
        base, compiler, loaded, peak = (
            row[k] / 1e6 for k in ("base_bytes", "compiler_bytes", "peak_loaded_bytes", "peak_generated_bytes")
        )
        print(
            f"{row['way']:22}{row['load_seconds']:8.2f}{base:8.0f}{compiler:10.0f}{loaded:8.0f}{peak:8.0f}"
            f"{peak - base:13.0f}{row['tokens_per_second']:8.2f}"
        )
    return {
        "model": name,
        "weight_bytes": report.bytes_original,
        "compressed_bytes": report.bytes_compressed,
        "rows": rows,
    }


def main() -> None:
    """Measure, print, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", action="append", help="what tcw takes as MODEL, or `synthetic`; may be repeated")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    results = []
    for model in options.model or ["synthetic", "demo:smollm2"]:
        with tempfile.TemporaryDirectory() as scratch:
            results.append(run_model(model, Path(scratch), int(options.gigabytes * 1e9), options.rounds))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    RESULTS.mkdir(exist_ok=True)
    report = {"date": today, "machine": machine(), "rounds": options.rounds, "new_tokens": TOKENS, "models": results}
    (RESULTS / f"residency-{today}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
