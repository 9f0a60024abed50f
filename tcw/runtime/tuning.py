"""How a packed layer multiplies on a device, by what was measured there (autotune.py)."""

import logging

import torch

from tcw.kernels.packed_matmul import MOST_ROWS
from tcw.runtime import autotune
from tcw.runtime.linear import Tune

_log = logging.getLogger("tcw")


def tune(form: str, *, mixed: bool) -> Tune:
    """Give what `linear.attach` asks: up to how many rows of x the packed kernel is the faster one.

    With `mixed`, None for a shape that is multiplied faster when it is plain. Asking raises NoGpu where the kernels do
    not run.
    """

    def rows(shape: autotune.Shape, device: torch.device) -> int | None:
        try:
            table = autotune.measured([shape], form, device)
        except torch.OutOfMemoryError:
            _log.info("no memory is left to measure products with weights of %d x %d: they are packed", *shape)
            return MOST_ROWS
        if mixed and not table.pays(shape, form):
            _log.info("weights of %d x %d stay BF16: no product is faster packed", *shape)
            return None
        return table.fused_rows(shape, form)

    return rows
