"""Is the product with packed weights right here, and how fast is it beside a plain one? `tcw bench int_matmul`."""

from collections.abc import Iterator

import torch
from tcw.kernels.int_matmul import Weight, int_matmul, layout_of, repack, turned
from tcw.kernels.int_matmul.cases import CASES, SUMS, UNIT, Case, Inputs, make_inputs
from tcw.kernels.int_matmul.reference import matmul

from tcw.bench import Timed

_SHAPES = ((14336, 4096), (4096, 14336))  # [N, K], of the MLP of a model of 8 billion weights
_SMALL = ((512, 512),)


def check(device: torch.device) -> dict[str, str]:
    """Every case against the reference: the Triton kernels on a GPU, plain torch on the CPU."""
    errors = {case.name: _error(case, device) for case in CASES}
    return {name: "" if error <= 1.0 else f"{error:.3g} times the error allowed" for name, error in errors.items()}


def _error(case: Case, device: torch.device) -> float:
    """The largest error, as a share of what is allowed."""
    if device.type == "cuda":
        from tcw.kernels.int_matmul.check import error_of  # triton is there where CUDA is

        return error_of(case, str(device))
    inputs = make_inputs(case)
    expected = matmul(inputs)
    y = int_matmul(inputs.x, _weight(inputs, device), inputs.bias)
    # weights are rounded to the dtype of x, and how a processor sums float16 is its own business
    allowed = UNIT[case.dtype] * (expected.y.abs() + 2 * expected.size) + SUMS * expected.span + 1e-30
    return float(((y.double() - expected.y).abs() / allowed).nan_to_num(nan=float("inf")).max())


def _weight(inputs: Inputs, device: torch.device) -> Weight:
    layout = layout_of(inputs.bits, inputs.x.shape[1], inputs.group_size)
    zero = None if inputs.zero is None else turned(inputs.zero).to(device)
    return Weight(repack(inputs.codes, layout).to(device), turned(inputs.scale).to(device), zero, layout, inputs.grid)


def timed(device: torch.device) -> Iterator[Timed]:
    """Weights of 2, 4 and 8 bits beside dense ones, for 1 and 16 rows of activations."""
    gpu = device.type == "cuda"
    for n, k in _SHAPES if gpu else _SMALL:
        for bits in (2, 4, 8):
            case = Case("timed", bits, 16, n, k, 64, "zero" if bits < 8 else "symmetric", "F16" if gpu else "F32")
            inputs = make_inputs(case)
            weight = _weight(inputs, device)
            dense = weight.dequantize().T.to(inputs.x.dtype).contiguous()
            for m in (1, 16):
                yield from _ways(f"W{bits} {n}x{k} m={m}", inputs.x[:m].to(device), weight, dense)


def _ways(name: str, x: torch.Tensor, weight: Weight, dense: torch.Tensor) -> Iterator[Timed]:
    around = x.nbytes + len(x) * len(dense) * x.element_size()
    held = [t for t in (weight.words, weight.scale, weight.zero) if t is not None]
    yield Timed(name, "packed", lambda: int_matmul(x, weight), sum(t.nbytes for t in held) + around)
    yield Timed(name, "dense", lambda: torch.nn.functional.linear(x, dense), dense.nbytes + around)
