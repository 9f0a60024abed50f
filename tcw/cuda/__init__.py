"""Kernels in CUDA C++: compiled at first use, kept on disk, and launched on torch's current stream.

    module = cuda.module("lanes_decode", codes.device)
    module.launch("decode_bf16", blocks, 128, [codes, out, np.uint32(chunks)], shared=4096)

Importing this costs nothing: torch, cuda-core and NVRTC are loaded at the first kernel. Nothing here waits for the
device, and all memory is torch's, so a launch can be part of a CUDA graph once a kernel has run before.
"""

from typing import TYPE_CHECKING

from tcw.cuda import build
from tcw.cuda.errors import NoGpu

if TYPE_CHECKING:
    import torch

    from tcw.cuda.launch import Module

__all__ = ["NoGpu", "build", "module"]


def module(op: str, device: "torch.device") -> "Module":
    """Return kernels/<op>/kernel.cu, ready to launch on `device`; the first call for an op and a device compiles it.

    Raises NoGpu where kernels cannot be compiled or cannot run, and ValueError for a device that is not CUDA's.
    """
    from tcw.cuda import launch

    return launch.module(op, device)
