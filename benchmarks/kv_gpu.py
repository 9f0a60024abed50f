"""Decode throughput and memory under KV-cache policies, at the shapes of Llama-3.1-8B. On a CUDA device.

    python benchmarks/kv_gpu.py                       # 32k tokens of context, batches of 1, 8 and 32
    python benchmarks/kv_gpu.py --only full "kivi:bits=4" --batches 1 --context 8192
    python benchmarks/kv_gpu.py --tiny                # a small model and short texts, on any device: that it runs

Weights are random, in bfloat16: speed and bytes do not depend on what they say. First a contract: on this device the
engine gives the logits of transformers' own cache, and every policy's plan is what its cache takes. A cache is filled
layer by layer with random keys, values and queries, as a prefill would, so that a batch need not fit through the MLPs;
`--prefill` runs the model over the context instead.

`bytes` is the cache by its storages and `ratio` its share of dense keys and values; `peak` is the most that PyTorch
had allocated while decoding, weights included; what does not fit is a row that says so. Writes
results/kv_gpu-DATE.json.
"""

import argparse
import datetime
import gc
import importlib.metadata
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tcw.errors import TcwError
from tcw.kv.cache import PolicyCache
from tcw.kv.policy import Policy
from tcw.kv.shapes import shapes_of
from tcw.verify.kv_tasks import cache_bytes, full_cache

POLICIES = {
    "full": [],
    "kivi 4": ["kivi:bits=4"],
    "kivi 2": ["kivi:bits=2"],
    "zipcache": ["zipcache"],
    "hadamard 4, 3": ["hadamard:key_bits=4,value_bits=3"],
    "kvtc 2": ["kvtc:bits=2"],
    "keydiff 0.5": ["keydiff:ratio=0.5"],
    "snapkv 0.25": ["snapkv:ratio=0.25"],
    "snapkv 0.25 + kivi 4": ["snapkv:ratio=0.25", "kivi:bits=4"],
    "triattention 0.25": ["triattention:ratio=0.25"],
    "razorattention 0.27": ["razorattention:ratio=0.27"],
    "streaming-llm 1024": ["streaming-llm:tokens=1024"],
}
LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
TINY = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # of logits whose spread is about 1
RESULTS = Path(__file__).parent / "results"


def make_model(tiny: bool, dtype: torch.dtype, device: torch.device) -> Any:
    """A Llama of random weights, made on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(LlamaConfig(**(TINY if tiny else LLAMA))).eval()
    finally:
        torch.set_default_dtype(before)


def contract(model: Any, policies: dict[str, Policy]) -> None:
    """The engine changes nothing by itself, and plans are what caches take. Raises AssertionError."""
    tokens = torch.randint(model.config.vocab_size, (2, 300), device=model.device)
    logits = []
    for cache in (full_cache(model), Policy.make(["knorm"], model).everything().new_cache(model)):
        model(input_ids=tokens[:, :290], past_key_values=cache)
        logits.append(model(input_ids=tokens[:, 290:], past_key_values=cache).logits.float())
    error, spread = float((logits[0] - logits[1]).abs().max()), float(logits[0].std())
    assert error <= TOLERANCE[model.dtype] * spread, f"the engine moves logits by {error}, their spread is {spread}"
    for name, policy in policies.items():
        cache = policy.new_cache(model)
        model(input_ids=tokens, past_key_values=cache)
        plan = policy.plan(300, batch=2)
        held = cache.nbytes()
        assert held <= plan.bytes if plan.bounded else held == plan.bytes, f"{name}: {held} bytes, planned {plan.bytes}"


def filled(model: Any, policy: Policy | None, batch: int, context: int, by_model: bool) -> Any:
    """A cache of `context` tokens."""
    cache = policy.new_cache(model) if policy else full_cache(model)
    if by_model:
        tokens = torch.randint(model.config.vocab_size, (batch, context), device=model.device)
        model(input_ids=tokens, past_key_values=cache, logits_to_keep=1)
        return cache
    for shape in shapes_of(model):
        options = {"dtype": model.dtype, "device": model.device}
        keys = torch.randn(batch, shape.kv_heads, context, shape.head_dim, **options)
        values = torch.randn(batch, shape.kv_heads, context, shape.value_dim, **options)
        layer = cache.layers[shape.index]
        layer.update(keys, values)
        if isinstance(cache, PolicyCache):
            query = torch.randn(batch, shape.heads, context, shape.head_dim, **options)
            layer.attend(_no_attention, torch.nn.Module(), query, None)
    return cache


def _no_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    return query.new_empty(1).expand(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def measure(model: Any, policy: Policy | None, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Fill a cache and decode; what fits no memory says so."""
    _free(model.device)
    row: dict[str, Any] = {"batch": batch, "context": options.context}
    try:
        with torch.inference_mode():
            start = time.perf_counter()
            cache = filled(model, policy, batch, options.context, options.prefill)
            _wait(model.device)
            row["seconds_fill"] = time.perf_counter() - start
            row["peak_fill"] = _peak(model.device)
            row["bytes"] = cache_bytes(cache)
            dense = sum(2 * batch * options.context * s.kv_heads * s.head_dim for s in shapes_of(model))
            row["ratio"] = row["bytes"] / (dense * model.dtype.itemsize)
            _free(model.device)
            row |= decode(model, cache, batch, options)
            row["peak"] = _peak(model.device)
    except torch.cuda.OutOfMemoryError:
        row["error"] = "does not fit"
    return row


def decode(model: Any, cache: Any, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of the whole batch: the median and the slowest of single steps, after warming up."""
    token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    seconds = []
    for step in range(options.warmup + options.steps):
        _wait(model.device)
        start = time.perf_counter()
        positions = torch.full((batch, 1), options.context + step, device=model.device)
        logits = model(input_ids=token, past_key_values=cache, position_ids=positions, use_cache=True).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        _wait(model.device)
        seconds.append(time.perf_counter() - start)
    timed = seconds[options.warmup :]
    return {
        "tokens_a_second": batch * len(timed) / sum(timed), "ms_step": 1000 * statistics.median(timed),
        "ms_slowest_step": 1000 * max(timed),
    }  # fmt: skip


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def show(name: str, row: dict[str, Any]) -> None:
    if "error" in row:
        print(f"| {name:28} | {row['batch']:3} | {row['error']} |", flush=True)
        return
    peak = f"{row['peak'] / 1e9:6.1f}" if row["peak"] else "     -"
    cells = [f"{name:28}", f"{row['batch']:3}", f"{row['bytes'] / 1e9:7.3f}", f"{row['ratio']:.3f}", peak]
    cells += [f"{row['tokens_a_second']:8.1f}", f"{row['ms_step']:8.2f}", f"{row['ms_slowest_step']:8.2f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="rows of the table, or SPECs joined by +")
    parser.add_argument("--batches", nargs="+", type=int, help="default: 1 8 32")
    parser.add_argument("--context", type=int, help="tokens; default: 32768")
    parser.add_argument("--steps", type=int, default=32, help="tokens to time; a multiple of the policies' interval")
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--prefill", action="store_true", help="fill caches by running the model over the context")
    parser.add_argument("--tiny", action="store_true", help="a small model in float32, on the CPU if there is no GPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    options = parser.parse_args()
    options.context = options.context or (256 if options.tiny else 32768)
    options.batches = options.batches or ([1, 2] if options.tiny else [1, 8, 32])
    return options


def main() -> None:
    """Check, measure, print, write the results."""
    options = arguments()
    if not torch.cuda.is_available() and not options.tiny:
        raise SystemExit("needs a CUDA device; `--tiny` shows that the benchmark runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(options.tiny, torch.float32 if options.tiny else torch.bfloat16, device)
    text = torch.randint(model.config.vocab_size, (4, 256), generator=torch.Generator().manual_seed(0))
    policies: dict[str, Policy] = {}
    for name in options.only or POLICIES:
        specs = POLICIES.get(name, [part.strip() for part in name.split("+")])
        try:
            if specs:
                policies[name] = Policy.make(specs, model, text)
        except TcwError as error:
            print(f"{name}: {error}", flush=True)
    with torch.inference_mode():
        contract(model, policies)
    print("| policy                       | batch | GB cache | ratio | GB peak | tokens/s | ms a step | slowest |")
    print("|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    report = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine(device), "rows": rows}
    for batch in options.batches:
        for name in ["full", *policies]:
            rows.append({"name": name, **measure(model, policies.get(name), batch, options)})
            show(name, rows[-1])
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kv_gpu-{report['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


def machine(device: torch.device) -> dict[str, Any]:
    """The device's kind and the versions that matter."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    packages = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    return {"device": name, "python": platform.python_version(), **packages}


if __name__ == "__main__":
    main()
