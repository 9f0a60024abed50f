"""Time the products with quantised weights against cuBLAS on a GPU: under CUDA graphs, and only after a check.

    python benchmarks/int_matmul_gpu.py                    # W2, W4 and W8 x FP16 against FP16, and FP8 against BF16
    python benchmarks/int_matmul_gpu.py --bits 2 --rows 1 16
    python benchmarks/int_matmul_gpu.py --check            # the checks alone; without a GPU in Triton's interpreter

Each way gets as many copies of its weight as fill the L2 cache four times over, and a graph runs through all of them:
weights come from memory, as in a model. Reports microseconds a product (20th, 50th and 80th percentile over replays).
Writes benchmarks/results/int_matmul-DATE.json with the GPU's name. Says so, and times nothing, where there is no GPU.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SHAPES = ((8192, 8192), (4096, 14336), (14336, 4096))  # [N, K]
ROWS = (1, 4, 16, 64, 256)
FP8_ROWS = (256, 1024, 4096)
REPLAYS = 60


def main() -> int:
    """Check, then measure if there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check only")
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 4, 8], help="of weights")
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS), help="of activations")
    parser.add_argument("--group", type=int, default=64, help="columns that share a scale")
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
    rows = [measure_integers(*shape, bits, m, options.group)
            for shape in SHAPES for bits in options.bits for m in options.rows]  # fmt: skip
    if torch.cuda.get_device_capability() >= (8, 9):
        rows += [measure_fp8(*shape, m) for shape in SHAPES for m in FP8_ROWS]
    write(rows)
    return 0


def check() -> bool:
    """Hold every case against the reference, and FP8 against float64; says which fail."""
    import torch
    from tcw.kernels.int_matmul.cases import CASES
    from tcw.kernels.int_matmul.check import error_of

    device = "cuda" if torch.cuda.is_available() else "cpu"
    errors = {case.name: error_of(case, device) for case in CASES} | {"fp8": fp8_error(device)}
    wrong = {name: error for name, error in errors.items() if not error <= 1.0}
    for name, error in wrong.items():
        print(f"WRONG {name}: {error:.3g} times the error allowed", file=sys.stderr)
    print(f"{len(errors) - len(wrong)} of {len(errors)} cases are right on {device}")
    return not wrong


def fp8_error(device: str) -> float:
    """The error of an FP8 product as a share of what is allowed: half a step of BF16, and sums in few bits."""
    import torch

    x, w = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((48, 256), (64, 256)))
    weight = fp8_weight(w.bfloat16()).to(device)
    x = x.bfloat16().to(device)
    q, scale = weight._rounded(x)
    exact = (q.double() * scale.double()) @ (weight.codes.double() * weight.scale.double()).T
    size = (q.double() * scale.double()).abs() @ (weight.codes.double() * weight.scale.double()).abs().T
    error = (weight.linear(x, None).double() - exact).abs() / (2**-8 * exact.abs() + 2**-12 * size)
    return float(error.max())


def fp8_weight(w: Any) -> Any:
    """A BF16 matrix as the runtime keeps what the method fp8 made of it."""
    import torch

    from tcw.runtime.packed import Store, from_torch
    from tcw.runtime.quantized import Fp8Weight
    from tcw.weights.fp8 import Fp8

    data = from_torch("w.weight", w)
    return Fp8Weight(Store(data.info, Fp8, Fp8().encode(data)), torch.bfloat16)


def measure_integers(n: int, k: int, bits: int, m: int, group: int) -> dict[str, Any]:
    """W of `bits` against FP16: times, and their ratio."""
    import torch
    from tcw.kernels.int_matmul import int_matmul
    from tcw.kernels.int_matmul.cases import Case, make_inputs
    from tcw.kernels.int_matmul.check import weight_of

    case = Case("timed", bits, m, n, k, group, "zero" if bits < 8 else "symmetric", "F16")
    inputs = make_inputs(case)
    x = inputs.x.cuda()
    weight = weight_of(inputs, "cuda")
    dense = weight.dequantize().T.to(torch.float16).contiguous()
    size = (int_matmul(x, weight).double() - x.double() @ dense.double().T).abs().max() / dense.double().norm()
    if not size < 0.01:
        raise SystemExit(f"the result for {case} is wrong: {size}")
    ours = timed(
        lambda w: int_matmul(x, w),
        copies(weight, lambda: replace(weight, words=weight.words.clone()), weight.words.nbytes),
    )
    theirs = timed(lambda w: torch.nn.functional.linear(x, w), copies(dense, dense.clone, dense.nbytes))
    row = {"what": f"W{bits}A16", "n": n, "k": k, "m": m, "group": group, "grid": case.grid}
    return row | report(ours, "fp16", theirs)


def measure_fp8(n: int, k: int, m: int) -> dict[str, Any]:
    """FP8 weights and inputs, the rounding of inputs counted, against BF16."""
    import torch

    dense = torch.randn(n, k, dtype=torch.bfloat16)
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    weight = fp8_weight(dense).cuda()
    dense = dense.cuda()
    ours = timed(lambda w: w.linear(x, None), copies(weight, lambda: copy.deepcopy(weight), weight.nbytes))
    theirs = timed(lambda w: torch.nn.functional.linear(x, w), copies(dense, dense.clone, dense.nbytes))
    return {"what": "FP8", "n": n, "k": k, "m": m} | report(ours, "bf16", theirs)


def report(ours: list[float], name: str, theirs: list[float]) -> dict[str, Any]:
    """Microseconds of both, and how many times faster ours is at the median."""
    row = {"us": ours, f"{name}_us": theirs, "speedup": theirs[1] / ours[1]}
    print(json.dumps(row))
    return row


def copies(first: Any, make: Callable[[], Any], nbytes: int) -> list[Any]:
    """As many copies as fill the L2 cache four times over."""
    import torch

    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [first, *(make() for _ in range(min(4 * cache // nbytes, 64)))]


def timed(product: Callable[[Any], Any], weights: list[Any]) -> list[float]:
    """Microseconds a product, from replays of a graph of one product for each weight: p20, p50, p80."""
    import torch

    for weight in weights[:2]:
        product(weight)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            product(weight)
    found = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(1000 * start.elapsed_time(end) / len(weights))
    found.sort()
    return [round(found[len(found) * p // 100], 2) for p in (20, 50, 80)]


def write(rows: list[dict[str, Any]]) -> None:
    """Write the results with what they were measured on."""
    import torch
    import triton

    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    today = time.strftime("%Y-%m-%d")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"int_matmul-{today}.json"
    path.write_text(json.dumps({"date": today, **facts, "rows": rows}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    sys.exit(main())
