"""HostModule: the processor's counterpart of tcw.cuda.Module."""

import ctypes
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from . import build, sanitized
from .build import HostError

LOCK = threading.Lock()
STACKS: list[int] = []
MESSAGE = 1024
Size = tuple[int, ...] | int
Argument = torch.Tensor | np.generic | None
VALUES = (np.int32, np.uint32, np.int64, np.uint64, np.float32)
MOST_BLOCKS = (2**31 - 1, 65535, 65535)


class Parameter(ctypes.Structure):
    """Parameter of launch.h."""

    _fields_ = (("kind", ctypes.c_char), ("size", ctypes.c_uint8), ("alignment", ctypes.c_uint8))


class Launch(ctypes.Structure):
    """Launch of launch.h."""

    _fields_ = (
        ("blocks", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("milliseconds", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("stacks", ctypes.c_void_p),
    )


class HostModule:
    """The kernels of one op, or of one .cu file, compiled for this processor.

    `order` is "forward", "reverse" or the seed of a shuffle: which thread runs first between two collectives. Kernels
    are watched by AddressSanitizer (`sanitize`) or by ThreadSanitizer (`races`: memory that threads share without a
    barrier) in a process of its own, on copies of the tensors. `seconds` is the time of the processor that a launch may
    take. TCW_HOST_ORDER and TCW_HOST_WATCH ("memory", "races") speak where the caller is silent; see __main__.py.

    Raises HostError where the source does not compile, and in `launch` where a kernel does what it must not do.
    """

    multiprocessors = 2
    shared_limit = 99 * 1024

    def __init__(
        self,
        op: str | Path,
        *,
        sanitize: bool = False,
        races: bool = False,
        order: str | int | None = None,
        seconds: float = 60,
    ):
        if order is None:
            asked = os.environ.get("TCW_HOST_ORDER", "forward")
            order = int(asked) if asked.isdigit() else asked
        if not isinstance(order, int) and order not in ("forward", "reverse"):
            raise ValueError(f"order {order!r}: forward, reverse or a seed")
        source = op if isinstance(op, Path) else build.KERNELS / op / "kernel.cu"
        self.order, self.seconds = order, seconds
        self.watch = "memory" if sanitize else "races" if races else os.environ.get("TCW_HOST_WATCH", "")
        self.built, self.names = build.library(source)
        self.library = build.load(self.built)
        if self.watch:
            self.built, _ = build.library(source, self.watch)

    def launch(self, name: str, grid: Size, block: Size, args: Sequence[Argument], shared: int = 0) -> None:
        """Run a kernel to its end. TypeError where the arguments are not what the kernel takes.

        ValueError where a tensor is not on the CPU, not contiguous, or not aligned to what the kernel reads there.
        """
        if name not in self.names:
            raise HostError(f"there is no kernel {name}, but: {', '.join(self.names)}")
        launch = self.describe(grid, block, shared)
        values = self.values(name, args)
        if 0 in launch.blocks:
            return
        with LOCK:
            failed = self.run(name, launch, values, args)
        if failed:
            raise HostError(failed)

    def run(self, name: str, launch: Launch, values: list[ctypes.Array], args: Sequence[Argument]) -> str:
        """Run a launch that is right in itself. Returns what went wrong, or nothing."""
        if self.watch:
            return sanitized.run(self.watch, self.built, name, launch, values, list(args))
        launch.stacks = stacks(self.library)
        pointers = (ctypes.c_void_p * (len(values) + 1))(*(ctypes.addressof(v) for v in values))
        message = ctypes.create_string_buffer(MESSAGE)
        self.library[f"tcw_run_{name}"](ctypes.byref(launch), pointers, message, ctypes.c_size_t(MESSAGE))
        return message.value.decode()

    def describe(self, grid: Size, block: Size, shared: int) -> Launch:
        """Check the sizes of a launch."""
        blocks, threads = three(grid), three(block)
        if any(n > most for n, most in zip(blocks, MOST_BLOCKS, strict=True)):
            raise HostError(f"a grid of {blocks} blocks is too large")
        if not 1 <= threads[0] * threads[1] * threads[2] <= 1024:
            raise HostError(f"a block of {threads} threads: 1 to 1024 can be")
        if not 0 <= shared <= self.shared_limit:
            raise HostError(f"{shared} bytes of shared memory: 0 to {self.shared_limit} can be")
        order = {"forward": 0, "reverse": 1}.get(str(self.order), 2)
        seed = self.order if isinstance(self.order, int) else 0
        return Launch(blocks, threads, shared, order, int(self.seconds * 1000), 0, seed, None)

    def values(self, name: str, args: Sequence[Argument]) -> list[ctypes.Array]:
        """The arguments as bytes, each checked against the parameter it is for."""
        entry = self.library[f"tcw_parameters_{name}"]
        entry.restype = ctypes.POINTER(Parameter)
        parameters, count = entry(), 0
        while parameters[count].size:
            count += 1
        if count != len(args):
            raise TypeError(f"{name} takes {count} arguments, got {len(args)}")
        return [value(f"argument {i} of {name}", arg, parameters[i]) for i, arg in enumerate(args)]


def stacks(library: ctypes.CDLL) -> int:
    """Where the stacks of a block's threads are: one set for all libraries, made at the first launch."""
    if not STACKS:
        library.tcw_stacks.restype = ctypes.c_void_p
        made = library.tcw_stacks()
        if not made:
            raise HostError("no memory for the stacks of a block's threads")
        STACKS.append(made)
    return STACKS[0]


def three(size: Size) -> tuple[int, int, int]:
    """Fill up with ones to (x, y, z)."""
    sizes = tuple(size) if isinstance(size, tuple | list) else (size,)
    if not 1 <= len(sizes) <= 3 or any(n < 0 for n in sizes):
        raise HostError(f"{size} is no size of a grid or a block")
    return (*sizes, 1, 1)[:3]


def value(what: str, arg: Argument, parameter: Parameter) -> ctypes.Array:
    """One argument as the bytes that the kernel gets. TypeError where kind or size differ."""
    kind = parameter.kind.decode()
    if arg is None or isinstance(arg, torch.Tensor):
        if kind != "p":
            raise TypeError(f"{what} is a pointer, but the kernel takes {parameter.size} bytes of kind {kind}")
        return ctypes.create_string_buffer(address(what, arg, parameter.alignment).to_bytes(8, "little"), 8)
    if not isinstance(arg, VALUES):
        names = ", ".join(v.__name__ for v in VALUES)
        raise TypeError(f"{what} is a {type(arg).__name__}: neither a tensor, nor None, nor a NumPy number ({names})")
    given = "f" if isinstance(arg, np.floating) else "i"
    if (given, arg.nbytes) != (kind, parameter.size):
        raise TypeError(
            f"{what} is {arg.nbytes} bytes of kind {given}, the kernel takes {parameter.size} of kind {kind}"
        )
    return ctypes.create_string_buffer(arg.tobytes(), arg.nbytes)


def address(what: str, arg: torch.Tensor | None, alignment: int) -> int:
    """Where a tensor's data is; 0 for None."""
    if arg is None:
        return 0
    if arg.device.type != "cpu" or not arg.is_contiguous():
        raise ValueError(f"{what} is not a contiguous tensor on the CPU")
    if arg.data_ptr() % alignment:
        raise ValueError(f"{what} must be aligned to {alignment} bytes")
    return arg.data_ptr()
