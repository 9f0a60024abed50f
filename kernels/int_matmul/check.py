"""Hold every kernel against the reference: on a GPU, or anywhere in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tcw.kernels.int_matmul.check

The variable must stand before Triton is first imported, so this runs in a process of its own. Writes a JSON object:
the name of each case -> its largest error as a share of what is allowed; a right kernel has none above 1.
"""

import json
import sys

import torch
from tcw.kernels.int_matmul import launch
from tcw.kernels.int_matmul.cases import CASES, SUMS, UNIT, Case, Inputs, make_inputs
from tcw.kernels.int_matmul.layout import Weight, layout_of, repack, turned
from tcw.kernels.int_matmul.reference import Expected, matmul


def weight_of(inputs: Inputs, device: str = "cpu") -> Weight:
    """The kernel's weight from the stored one."""
    layout = layout_of(inputs.bits, inputs.x.shape[1], inputs.group_size)
    zero = None if inputs.zero is None else turned(inputs.zero).to(device)
    return Weight(repack(inputs.codes, layout).to(device), turned(inputs.scale).to(device), zero, layout, inputs.grid)


def error_of(case: Case, device: str) -> float:
    """The largest error of a case, as a share of what is allowed; infinite where the result has a NaN."""
    inputs = make_inputs(case)
    expected = matmul(inputs)
    path = launch.path_of(case.m)
    bias = None if inputs.bias is None else inputs.bias.to(device)
    weight, x = weight_of(inputs, device), inputs.x.to(device)
    found = launch.matmul(x, weight, bias, path, case.multiprocessors)
    if device != "cpu" and not torch.equal(found, launch.matmul(x, weight, bias, path, case.multiprocessors)):
        return float("inf")  # not the same bits at each run
    if found.dtype != x.dtype:
        return float("inf")
    error = (found.double().cpu() - expected.y).abs() / _limit(case, expected, path, device)
    return float(error.nan_to_num(nan=float("inf")).max())


def _limit(case: Case, expected: Expected, path: str, device: str) -> torch.Tensor:
    """The error that a right result may have."""
    cut = device == "cpu" and case.dtype == "BF16"  # the interpreter cuts BF16 off instead of rounding it
    unit = UNIT[case.dtype] * (2 if cut else 1)
    weights = unit * expected.size if path == "dequantize" else 0.0  # which are rounded to the dtype of x first
    return unit * expected.y.abs() + SUMS * expected.span + weights + 1e-30


def main() -> None:
    """Check all cases and write what was found."""
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN: what no kernel writes shows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sys.stdout.write(json.dumps({case.name: error_of(case, device) for case in CASES}, indent=1) + "\n")


if __name__ == "__main__":
    main()
