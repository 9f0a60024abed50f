"""Move a scale of a layer's inputs into the norm before it: y = W x = (W diag(s)) (x / s)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from tcw.calibration.blocks import BlockModel
from tcw.calibration.store import Result
from tcw.calibration.watch import Watch
from tcw.tensor import TensorData

_NEAR = 1e-3  # of the output's size; float32 keeps far closer where the scale is really taken up


def fold(
    model: BlockModel,
    norm: dict[str, nn.Parameter],
    weights: dict[str, nn.Parameter],
    scale: np.ndarray,
    run: Callable[[], torch.Tensor],
) -> list[Result]:
    """Divide the output of a norm by `scale` and multiply the columns of the `weights` behind it by that.

    Whether this leaves the block's output, which `run` gives, as it was is tried out; where it does not (something else
    uses the norm's output), everything is put back.

    Returns:
        The norm's tensors with their new values, or nothing.
    """
    factor = torch.from_numpy(scale).to(model.device)
    before = run()
    changed = {**norm, **weights}
    saved = {name: p.clone() for name, p in changed.items()}
    for offset in (0.0, 1.0):  # Gemma's norms multiply by 1 + weight
        for name, p in norm.items():
            shift = offset if name.endswith(".weight") else 0.0
            p.copy_((saved[name] + shift) / factor - shift)
        for name, p in weights.items():
            p.copy_(saved[name] * factor)
        if float((run() - before).abs().max()) <= _NEAR * float(before.abs().max()):
            return [_settle(model, name, p) for name, p in norm.items()]
    for name, value in saved.items():
        changed[name].copy_(value)
    return []


def norm_before(
    model: BlockModel, k: int, weights: dict[str, nn.Parameter], run: Callable[[], torch.Tensor]
) -> dict[str, nn.Parameter]:
    """The parameters of the norm in block `k` whose output is the input of all `weights`; none where there is none."""
    root = model.paths[k]
    block = model.model.get_submodule(root)
    outputs: dict[int, tuple[str, nn.Module]] = {}
    kept: list[torch.Tensor] = []  # so that no other tensor takes their place in memory
    inputs: set[int] = set()

    def hook(name: str) -> Any:
        def note(module: nn.Module, _: Any, out: Any) -> None:
            if isinstance(out, torch.Tensor):
                kept.append(out)
                outputs[out.data_ptr()] = name, module

        return note

    norms = [(n, m) for n, m in block.named_modules() if m._parameters and all(p.dim() == 1 for p in m.parameters())]
    hooks = [module.register_forward_hook(hook(name)) for name, module in norms]
    try:
        with Watch(weights, lambda _, x, __: inputs.add(x.data_ptr())):
            run()
    finally:
        for handle in hooks:
            handle.remove()
    found = outputs.get(inputs.pop()) if len(inputs) == 1 else None
    return {f"{root}.{found[0]}.{name}": p for name, p in found[1].named_parameters()} if found else {}


def _settle(model: BlockModel, name: str, parameter: nn.Parameter) -> Result:
    """Round a norm's tensor to the dtype it is stored in, here and in the block."""
    stored = model.places[name][0].tensor
    tensor = TensorData.of_floats(model.source.tensors()[stored], parameter.cpu().numpy())
    parameter.copy_(torch.from_numpy(tensor.floats()))
    return Result(tensor.info, None, tensor.sha256(), values=tensor, rewritten=True)
