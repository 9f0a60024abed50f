"""How many warps a block has and what shared memory they take, and starting the kernel: nothing waits for a device.

The defaults are reasoned (README.md) and not tuned on a GPU yet; `bench.py` times the others beside them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from tcw.codecs.lanes_layout import LONGEST

if TYPE_CHECKING:
    from tcw.cuda import Module

TABLE_BYTES = 4 << LONGEST


@dataclass(frozen=True)
class Plan:
    """A way to launch the kernel.

    Attributes:
        chunks: That a warp decodes side by side: 1, or 2 of BF16.
        warps: Of a block, at most 16.
        buffers: 2 where a warp copies its next chunks while it decodes, else 1.
    """

    chunks: int = 1
    warps: int = 8
    buffers: int = 1

    def shared(self, stage: int) -> int:
        """Bytes of shared memory of a block, where a chunk takes `stage` bytes."""
        return TABLE_BYTES + self.warps * self.chunks * self.buffers * stage


def fitted(plan: Plan, stage: int, limit: int) -> Plan:
    """The plan, or the nearest one whose block fits `limit` bytes of shared memory."""
    while plan.shared(stage) > limit:
        if plan.buffers > 1:
            plan = replace(plan, buffers=1)
        elif plan.chunks > 1:
            plan = replace(plan, chunks=1)
        else:
            plan = replace(plan, warps=plan.warps // 2)
    return plan


def decode(
    module: "Module", tensors: Sequence[torch.Tensor], split: str, stage: int, out: torch.Tensor,
    status: torch.Tensor | None, plan: Plan | None = None,
) -> None:  # fmt: skip
    """Decode the tensors of a group, by its units.

    Args:
        module: The compiled kernel; every tensor is on its device.
        tensors: Of a `Group`, in the order of `Group.tensors`.
        split: Of its words.
        stage: Its `shared`.
        out: Of the split's dtype, contiguous, on a 16-byte boundary, [numel] or more.
        status: int32 [1], or None: see `lanes_decode.decode`.
        plan: None for the default; what does not fit the device's shared memory is made smaller.
    """
    codes, lane_bytes, chunk_base, units, tables, raw, low = (*tensors, None, None)[:7]
    if any(tensor is not None and tensor.data_ptr() % 16 for tensor in (codes, tables, raw, low, out)):
        raise ValueError("the tensors of a group, and what it is decoded into, begin on 16-byte boundaries")
    if not out.is_contiguous():
        raise ValueError("`out` is not contiguous")
    plan = fitted(plan or Plan(), stage, module.shared_limit)
    module.launch(
        f"lanes_decode_{split}" + ("_by_2" if plan.chunks == 2 else ""),
        units.shape[0],
        32 * plan.warps,
        (
            codes, lane_bytes, chunk_base, units, tables, raw, low, out, status,
            np.uint32(units.shape[1]), np.uint32(stage), np.uint32(plan.buffers),
        ),
        shared=plan.shared(stage),
    )  # fmt: skip
