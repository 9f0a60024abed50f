"""Hold the kernels against the reference: on a GPU, or anywhere in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tcw.kernels.kv_dequant_attention.check

The variable must stand before Triton is first imported, so this runs in a process of its own. Writes a JSON object:
the name of each case -> its largest error as a share of what is allowed; a right kernel has none above 1.
"""

import json
import sys

import torch
from tcw.kernels.kv_dequant_attention import launch
from tcw.kernels.kv_dequant_attention.cases import CASES, SUMS, UNIT, Case, make_inputs, on
from tcw.kernels.kv_dequant_attention.reference import Expected, attend
from torch import Tensor


def error_of(case: Case, device: str) -> float:
    """The largest error of a case, as a share of what is allowed; infinite where a result has a NaN."""
    inputs = make_inputs(case)
    expected = attend(inputs)
    there = on(inputs, device)
    arguments = (there.queries, there.keys, there.values, there.scaling, there.real, there.bias, case.multiprocessors)
    out, lse = launch.attend(*arguments)
    if device != "cpu" and not all(map(torch.equal, (out, lse), launch.attend(*arguments))):
        return float("inf")  # not the same bits at each run
    # the interpreter cuts BF16 off instead of rounding it
    return compare(out, lse, expected, UNIT[case.dtype] * (2 if device == "cpu" and case.dtype == "BF16" else 1))


def compare(out: Tensor, lse: Tensor, expected: Expected, unit: float) -> float:
    """The largest error, as a share of what is allowed where keys, values and weights lose `unit` each."""
    if out.dtype != torch.float32 or lse.dtype != torch.float32 or out.shape != expected.out.shape:
        return float("inf")
    there = expected.lse > -torch.inf
    if not torch.equal(there, lse.cpu() > -torch.inf) or bool(out.cpu()[~there].any()):
        return float("inf")
    logit = unit * expected.rounded + SUMS * (expected.summed + expected.lse.abs().masked_fill(~there, 0.0) + 1)
    # weights are wrong by a factor between e^-2·logit and its inverse, and no weighted mean is farther than 2·far
    drift = torch.minimum(torch.expm1(2 * logit)[..., None] * expected.spread, 2 * expected.far)
    allowed = drift + (2 * unit + SUMS) * (expected.size + expected.far * unit) + 1e-30
    errors = (out.double().cpu() - expected.out).abs() / allowed
    errors_lse = ((lse.double().cpu() - expected.lse) / logit)[there].abs()
    found = torch.cat([errors.flatten(), errors_lse.flatten()]).nan_to_num(nan=float("inf"))
    return float(found.max()) if len(found) else 0.0


def main() -> None:
    """Check all cases and write what was found."""
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN: what no kernel writes shows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sys.stdout.write(json.dumps({case.name: error_of(case, device) for case in CASES}, indent=1) + "\n")


if __name__ == "__main__":
    main()
