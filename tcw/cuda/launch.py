"""Load a compiled op onto a device and launch its kernels on torch's current stream of that device."""

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from tcw.cuda import build, driver, packages
from tcw.errors import UsageError

Argument: TypeAlias = "torch.Tensor | np.generic | None"

_BYTES = {np.int32: 4, np.uint32: 4, np.int64: 8, np.uint64: 8, np.float32: 4}
_POINTER = 8
_UNASKED_SHARED = 48 << 10  # what a block gets without asking: static and dynamic together
_modules: dict[tuple[str, torch.device], "Module"] = {}
_lock = threading.Lock()


class _Thread(threading.local):
    """Of the calling thread: devices whose context the driver knows it to use."""

    def __init__(self) -> None:
        self.ready: set[int] = set()


_thread = _Thread()


def module(op: str, device: torch.device) -> "Module":
    """Return the op's Module for `device`, made at the first call; see `tcw.cuda.module`."""
    found = _modules.get((op, device))
    return found if found is not None else _new(op, device)


def _new(op: str, device: torch.device) -> "Module":
    if device.type != "cuda":
        raise ValueError(f"kernels run on CUDA devices, not on `{device}`")
    if device.index is None:  # the current one, which may be another at the next call
        return module(op, torch.device("cuda", driver.current(device)))
    with _lock:
        if (op, device) not in _modules:
            _modules[op, device] = Module(op, device)
        return _modules[op, device]


@dataclass
class _Kernel:
    """A loaded kernel: the bytes of each parameter, and the dynamic shared memory it may have so far."""

    loaded: Any
    parameters: tuple[int, ...]
    shared_limit: int


class Module:
    """The kernels of one op on one device.

    Attributes:
        op: its folder in kernels/.
        device: where it runs, with an index.
        multiprocessors: of the device.
        shared_limit: bytes of dynamic shared memory that a block may ask for.
    """

    def __init__(self, op: str, device: torch.device) -> None:
        """Compile `op` for the device, or read it from the cache, and load it.

        Raises NoGpu where that cannot be done, and UsageError while a CUDA graph is captured.
        """
        architecture = driver.architecture(device)
        if torch.cuda.is_current_stream_capturing():
            raise UsageError(
                f"the kernel `{op}` is used for the first time while a CUDA graph is captured",
                "run the model once before the capture",
            )
        self.op, self.device = op, device
        self.multiprocessors = driver.attribute(device.index, "MULTIPROCESSOR_COUNT")
        self.shared_limit = driver.attribute(device.index, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
        self._index = device.index
        core, built = packages.core(), build.compile_op(op, architecture)
        self._launch = core.launch
        self._stream = functools.lru_cache(256)(core.Stream.from_handle)  # only an address, torch owns the stream
        self._config = functools.lru_cache(1024)(functools.partial(_config, core.LaunchConfig))
        self._resources = built.resources
        self._kernels: dict[str, _Kernel] = {}
        with driver.loading(op):
            self._code = core.ObjectCode.from_cubin(built.cubin, name=op)
        for name in built.resources:  # now, not at the first launch, which may be within a capture
            self._load(name)

    def launch(
        self, name: str, grid: tuple[int, ...] | int, block: int, args: Sequence[Argument], shared: int = 0
    ) -> None:
        """Launch the kernel `name` on torch's current stream of the device; nothing is waited for.

        Args:
            name: of the entry point.
            grid: blocks, in up to three dimensions; none are launched where one of them is 0.
            block: threads a block.
            args: a contiguous tensor of this device for a pointer (None is the null pointer), and a numpy scalar of
                the parameter's size for a number: int32, uint32, int64, uint64 or float32.
            shared: bytes of dynamic shared memory.

        Raises:
            ValueError: for a tensor elsewhere, one that is not contiguous, another number of arguments than the kernel
                has parameters, or more shared memory than there is.
            TypeError: for any other argument, and a number of another size than the parameter's.
        """
        kernel = self._kernels.get(name) or self._load(name)
        values = _values(args, kernel.parameters, self._index)
        if shared > kernel.shared_limit:
            self._allow(name, kernel, shared)
        if grid == 0 or (isinstance(grid, tuple) and 0 in grid):
            return
        stream = self._stream(torch.cuda.current_stream(self._index).cuda_stream)
        config = self._config(grid, block, shared)
        if torch.cuda.current_device() == self._index and self._index in _thread.ready:
            self._launch(stream, config, kernel.loaded, *values)
            return
        with torch.cuda.device(self._index):
            driver.ensure_context(self._index)
            _thread.ready.add(self._index)
            self._launch(stream, config, kernel.loaded, *values)

    def _load(self, name: str) -> _Kernel:
        with torch.cuda.device(self.device), driver.loading(self.op):
            driver.ensure_context(self._index)
            loaded = self._code.get_kernel(name)
            driver.load_now(loaded)
            sizes = tuple(int(info.size) for info in loaded.arguments_info)
        static = self._resources[name].shared_bytes if name in self._resources else _UNASKED_SHARED
        self._kernels[name] = _Kernel(loaded, sizes, _UNASKED_SHARED - static)
        return self._kernels[name]

    def _allow(self, name: str, kernel: _Kernel, shared: int) -> None:
        if shared > self.shared_limit:
            raise ValueError(f"`{name}` asks for {shared} bytes of shared memory, a block may have {self.shared_limit}")
        driver.allow_shared(kernel.loaded, self._index, shared)
        kernel.shared_limit = shared


def _config(make: Any, grid: tuple[int, ...] | int, block: int, shared: int) -> Any:
    return make(grid=grid, block=block, shmem_size=shared)


def _values(args: Sequence[Argument], sizes: tuple[int, ...], index: int) -> list[Any]:
    """What cuda.core takes: a plain int is an address, a numpy scalar is passed by value."""
    if len(args) != len(sizes):
        raise ValueError(f"{len(args)} arguments for a kernel with {len(sizes)} parameters")
    values: list[Any] = []
    for arg, size in zip(args, sizes, strict=True):
        given = _BYTES.get(type(arg))
        if (given or _POINTER) != size:
            raise TypeError(f"argument {len(values)} is {_words(arg)}, the parameter has {size} bytes")
        if given:
            values.append(arg)
        elif arg is None:
            values.append(0)
        else:
            values.append(_address(arg, index, len(values)))
    return values


def _address(tensor: Any, index: int, position: int) -> int:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"argument {position} is {_words(tensor)}")
    if tensor.get_device() != index:
        raise ValueError(f"argument {position} is on `{tensor.device}`, the kernel runs on `cuda:{index}`")
    if not tensor.is_contiguous():
        raise ValueError(f"argument {position} is not contiguous: its strides are {tensor.stride()}")
    return tensor.data_ptr()


def _words(arg: object) -> str:
    if isinstance(arg, torch.Tensor):
        return f"a tensor of shape {list(arg.shape)}"
    return f"{arg!r} of type {type(arg).__name__}, where numpy's int32, uint32, int64, uint64 or float32 would do"
