"""Stand-ins for cuda.core, the driver and torch.cuda: they record what they are asked for."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import torch

LOG = """ptxas info    : 8 bytes gmem
ptxas info    : Compiling entry function 'two' for 'sm_90'
ptxas info    : Function properties for two
ptxas         .     16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 2048 bytes smem
ptxas info    : Compile time = 25.818 ms
ptxas info    : Compiling entry function 'one' for 'sm_90'
ptxas info    : Function properties for one
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 0 barriers
\0\0"""


class Compiler:
    """`cuda.core` as far as compiling goes. `compiled` holds (name, arch) of each program; `error` is raised."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, str]] = []
        self.error: Exception | None = None
        self.log, self.closed = LOG, 0

    def ProgramOptions(self, **options: Any) -> Any:
        return SimpleNamespace(**options)

    def Program(self, text: str, language: str, options: Any) -> Any:
        assert language == "c++"
        assert text
        assert (options.std, options.ptxas_options) == ("c++17", ["-v"])

        def compile_(kind: str, logs: Any) -> Any:
            assert kind == "cubin"
            if self.error:
                raise self.error
            self.compiled.append((options.name, options.arch))
            logs.write(self.log)
            return SimpleNamespace(code=b"\x7fELF release 13.5, V13.5.37 " + f"{options.arch} {text}".encode())

        return SimpleNamespace(compile=compile_, close=self._close)

    def _close(self) -> None:
        self.closed += 1


class Status(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_VALUE = 1


@dataclass
class Gpu:
    """cuda.core's launching half, the driver's functions and torch.cuda, for two devices.

    `launches` holds (stream, current device, config, kernel, arguments); `asked` the driver's calls.
    """

    parameters: dict[str, tuple[int, ...]]
    capability: tuple[int, int] = (9, 0)
    version: int = 13000
    memory: bool = True
    capturing: bool = False
    here: int = 0
    streams: list[int] = field(default_factory=lambda: [0, 0])
    launches: list[tuple[Any, ...]] = field(default_factory=list)
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    loaded: list[bytes] = field(default_factory=list)
    contexts: dict[int, int] = field(default_factory=dict)  # that threads use

    # ---- cuda.core

    def LaunchConfig(self, grid: Any, block: int, shmem_size: int) -> Any:
        return (grid, block, shmem_size)

    def launch(self, stream: Any, config: Any, kernel: Any, *arguments: Any) -> None:
        assert self.contexts[threading.get_ident()]
        self.launches.append((stream, self.here, config, kernel.handle[1], arguments))

    @property
    def Stream(self) -> Any:
        return SimpleNamespace(from_handle=lambda handle: f"stream {handle:#x}")

    @property
    def ObjectCode(self) -> Any:
        return SimpleNamespace(from_cubin=self._from_cubin)

    def _from_cubin(self, cubin: bytes, name: str) -> Any:
        self.loaded.append(cubin)

        def get_kernel(kernel: str) -> Any:
            if not self.memory:
                raise RuntimeError("CUDA_ERROR_OUT_OF_MEMORY: the API call failed")
            sizes = [SimpleNamespace(offset=8 * i, size=size) for i, size in enumerate(self.parameters[kernel])]
            return SimpleNamespace(handle=("kernel", kernel), arguments_info=sizes)

        return SimpleNamespace(get_kernel=get_kernel)

    # ---- cuda.bindings.driver

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared")

    def cuDriverGetVersion(self) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, self.version

    def cuDeviceGet(self, index: int) -> tuple[Status, str]:
        return Status.CUDA_SUCCESS, f"device {index}"

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=132, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN=232448
    )

    def cuDeviceGetAttribute(self, attribute: int, device: str) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, attribute

    def cuCtxGetCurrent(self) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, self.contexts.get(threading.get_ident(), 0)

    def cuDevicePrimaryCtxRetain(self, device: str) -> tuple[Status, int]:
        return Status.CUDA_SUCCESS, 100 + int(device[-1])

    def cuCtxSetCurrent(self, context: int) -> tuple[Status]:
        self.contexts[threading.get_ident()] = context
        return (Status.CUDA_SUCCESS,)

    def cuKernelGetFunction(self, kernel: Any) -> tuple[Status, str]:
        assert self.contexts[threading.get_ident()]
        self.asked.append(("load", kernel, self.here))
        return Status.CUDA_SUCCESS, "function"

    def cuKernelSetAttribute(self, attribute: str, value: int, kernel: Any, device: Any) -> tuple[Status]:
        self.asked.append((attribute, value, kernel, device))
        return (Status.CUDA_SUCCESS,)

    # ---- torch.cuda

    def init(self) -> None:
        pass

    def device_count(self) -> int:
        return 2

    def current_device(self) -> int:
        return self.here

    def current_stream(self, index: int) -> Any:
        return SimpleNamespace(cuda_stream=self.streams[index])

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def get_device_capability(self, device: Any) -> tuple[int, int]:
        return self.capability

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.here = self.here, getattr(device, "index", device)
        yield
        self.here = before


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU; see `on_gpu`."""

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.where)  # type: ignore[attr-defined]

    def get_device(self) -> int:
        return self.where  # type: ignore[attr-defined]


def on_gpu(tensor: torch.Tensor, index: int = 0) -> torch.Tensor:
    """`tensor`, as if it lay on cuda:`index`."""
    found = torch.Tensor._make_subclass(OnGpu, tensor)
    found.where = index  # type: ignore[attr-defined]
    return found
