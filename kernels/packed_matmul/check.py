"""Hold packing, unpacking and the products against the reference, on any device."""

from dataclasses import dataclass
from typing import Any

import torch
from tcw.kernels.packed_matmul import launch
from tcw.kernels.packed_matmul.cases import SUMS, UNIT, Case, Inputs, make_inputs
from tcw.kernels.packed_matmul.layout import CODES, PackedWeight, pack
from tcw.kernels.packed_matmul.reference import matmul

from tcw.kernels import packed_matmul as op


@dataclass(frozen=True)
class _At:
    """Another module of kernels, with as many multiprocessors as a case asks for."""

    module: Any
    multiprocessors: int

    def launch(self, *args: Any) -> None:
        self.module.launch(*args)


def fault(case: Case, device: torch.device, module: Any = None) -> str:
    """What is wrong in a case: "" if nothing is.

    Args:
        case: of cases.py.
        device: where it runs.
        module: the kernels; None for the operations of torch.
    """
    inputs = make_inputs(case, device)
    at = None if module is None else _At(module, case.multiprocessors)
    raw = _product(at, inputs, inputs.weight)
    if not torch.equal(_bits(raw), _bits(_product(at, inputs, inputs.weight))):
        return "two runs differ"
    if case.kind != "any_bits" and (found := _far(raw, inputs)):
        return found
    for form in CODES:
        weight = pack(inputs.weight, form, most=float("inf"))
        assert weight is not None
        if not torch.equal(_bits(_unpacked(at, weight)), _bits(inputs.weight)):
            return f"{form}: unpacking does not give the weights back"
        if not torch.equal(_bits(_product(at, inputs, weight)), _bits(raw)):
            return f"{form}: not the bits of the product with plain weights"
    return ""


def _product(at: _At | None, inputs: Inputs, weight: launch.Weight) -> torch.Tensor:
    if at is not None:
        return launch.matmul(at, inputs.x, weight, inputs.bias)
    if isinstance(weight, PackedWeight):
        return op.packed_matmul(inputs.x, weight, inputs.bias)
    return op.raw_matmul(inputs.x, weight, inputs.bias)


def _unpacked(at: _At | None, weight: PackedWeight) -> torch.Tensor:
    if at is None:
        return op.unpack(weight)
    out = torch.full(weight.shape, float("nan"), dtype=torch.bfloat16, device=weight.device)
    launch.unpack(at, weight, out)
    return out


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def _far(y: torch.Tensor, inputs: Inputs) -> str:
    """Say by how much a product misses the reference, or which of its values should not be finite; "" for neither."""
    moved = Inputs(inputs.x.cpu(), inputs.weight.cpu(), None if inputs.bias is None else inputs.bias.cpu())
    expected, found = matmul(moved), y.double().cpu()
    finite = expected.y.isfinite()
    if not torch.equal(expected.y[~finite].nan_to_num(nan=1.0), found[~finite].nan_to_num(nan=1.0)):
        return "infinities or NaNs are not where they should be"
    error = (found - expected.y).abs() / (UNIT * expected.y.abs() + SUMS * expected.size + 2.0**-133)
    worst = float(error[finite].nan_to_num(nan=float("inf")).max()) if bool(finite.any()) else 0.0
    return "" if worst <= 1.0 else f"{worst:.3g} times the error allowed"
