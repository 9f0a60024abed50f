"""Kernels on the processor: the very source of kernels/<op>/kernel.cu, its threads run in lock step.

    module = HostModule("lanes_decode")
    module.launch("decode", grid, block, [tensor, np.int32(5), None], shared=1024)

has the signature of `tcw.cuda.Module.launch`. `order` says which thread runs first between two collectives: "forward",
"reverse" or the seed of a shuffle. A kernel that lacks a barrier gives different results. With `sanitize=True`
AddressSanitizer watches what is read and written, with `races=True` ThreadSanitizer what is shared without a barrier.
"""

from .build import HostError, compiler, sanitizer
from .module import HostModule

__all__ = ["HostError", "HostModule", "compiler", "sanitizer"]
