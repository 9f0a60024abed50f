"""Hold the kernels against the reference: on a GPU, or anywhere in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tcw.kernels.kv_dequant_attention.check

The variable must stand before Triton is first imported, so this runs in a process of its own. Writes a JSON object:
the name of each case -> its largest error as a share of what is allowed; a right kernel has none above 1.
"""

import json
import sys

import torch
from tcw.kernels.kv_dequant_attention import launch
from tcw.kernels.kv_dequant_attention.cases import CASES, UNIT, Case, make_inputs, on
from tcw.kernels.kv_dequant_attention.reference import attend, compare


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


def main() -> None:
    """Check all cases and write what was found."""
    torch.use_deterministic_algorithms(True)  # torch.empty is filled with NaN: what no kernel writes shows
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sys.stdout.write(json.dumps({case.name: error_of(case, device) for case in CASES}, indent=1) + "\n")


if __name__ == "__main__":
    main()
