"""Time attention over packed keys and values against attention over BF16, on a GPU, and only after a check.

    python benchmarks/kv_dequant_attention_gpu.py              # 2, 4 and 8 bits, in the shapes below
    python benchmarks/kv_dequant_attention_gpu.py --bits 4 --tokens 32768
    python benchmarks/kv_dequant_attention_gpu.py --check      # the checks alone; without a GPU in Triton's interpreter

One query a head; keys with a minimum and a step for each channel of 32 tokens, values for each 32 channels of a token.
The L2 cache is overwritten before each call, and a call is a CUDA graph: the kernels' time, not the launches'. Reports
microseconds (20th, 50th and 80th percentile) and, from the median, gigabytes a second of what must be read. Beside it
stand torch's attention over BF16 keys and values, and unpacking the store to BF16 first. Writes
benchmarks/results/kv_dequant_attention-DATE.json with the GPU's name. Without a GPU it times nothing.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHAPES = ((1, 8, 4, 128), (8, 8, 4, 128), (1, 8, 8, 128), (16, 32, 1, 128), (8, 3, 3, 64))  # [B, G, r, D]
TOKENS = (1024, 8192, 32768)
CALLS = 60


def main() -> int:
    """Check, then measure if there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 4, 8], help="of keys and values")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS), help="held")
    options = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    if not check():
        return 1
    if not gpu or options.check:
        print("checked only: nothing timed" if gpu else "no GPU: nothing timed")
        return 0
    write([measure(*shape, n, bits) for shape in SHAPES for n in options.tokens for bits in options.bits])
    return 0


def check() -> bool:
    """Hold every case against the reference; says which fail."""
    import torch
    from tcw.kernels.kv_dequant_attention.cases import CASES
    from tcw.kernels.kv_dequant_attention.check import error_of

    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors = {case.name: error_of(case, device) for case in CASES}
    wrong = {name: error for name, error in errors.items() if not error <= 1.0}
    for name, error in wrong.items():
        print(f"WRONG {name}: {error:.3g} times the error allowed", file=sys.stderr)
    print(f"{len(errors) - len(wrong)} of {len(errors)} cases are right on {device}")
    return not wrong


def measure(batch: int, groups: int, r: int, width: int, n: int, bits: int) -> dict[str, Any]:
    """Times of the kernel, of attention over BF16, and of unpacking with that."""
    import torch
    from tcw.kernels.kv_dequant_attention import kv_dequant_attention
    from tcw.kernels.kv_dequant_attention.cases import Case, make_inputs

    inputs = make_inputs(Case("timed", bits, n, r, width, batch, groups, dtype="BF16", stored="BF16"), "cuda")
    query, scaling = inputs.queries, inputs.scaling

    def unpacked() -> list[torch.Tensor]:
        return [side.dequantize().to(query.dtype) for side in (inputs.keys, inputs.values)]

    def dense(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=r > 1)

    def ours() -> torch.Tensor:
        return kv_dequant_attention(query, inputs.keys, inputs.values, scaling)[0]

    held = unpacked()
    error = (ours() - dense(*held)).abs().max().item()
    if not error < 0.02:
        raise SystemExit(f"the result for {bits} bits, {n} tokens is wrong by {error}")
    packed = [t for side in (inputs.keys, inputs.values) for t in (side.codes, side.minimum, side.step)]
    row: dict[str, Any] = {"batch": batch, "groups": groups, "r": r, "width": width, "n": n, "bits": bits}
    for name, call, read in (
        ("fused", ours, packed),
        ("bf16", lambda: dense(*held), held),
        ("unpack_and_bf16", lambda: dense(*unpacked()), packed),
    ):
        us = timed(call)
        row |= {f"{name}_us": us, f"{name}_gb_per_s": round(sum(t.nbytes for t in read) / us[1] / 1e3, 1)}
    row["speedup"] = round(row["bf16_us"][1] / row["fused_us"][1], 3)
    print(json.dumps(row))
    return row


def timed(call: Callable[[], Any]) -> list[float]:
    """Microseconds of a call with a cold L2 cache, from replays of a graph: p20, p50, p80."""
    import torch

    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    cold = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
    found = []
    for _ in range(CALLS):
        cold.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(1000 * start.elapsed_time(end))
    found.sort()
    return [round(found[len(found) * p // 100], 2) for p in (20, 50, 80)]


def write(rows: list[dict[str, Any]]) -> None:
    """Write the results with what they were measured on."""
    import torch
    import triton

    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    today = time.strftime("%Y-%m-%d")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"kv_dequant_attention-{today}.json"
    path.write_text(json.dumps({"date": today, **facts, "rows": rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    sys.exit(main())
