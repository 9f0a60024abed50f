"""What is asked of torch and of NVIDIA's driver: is there a GPU that can run a kernel, and what keeps one from loading.

Every reason why not is one NoGpu with a hint.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from tcw.cuda import build, packages
from tcw.cuda.errors import NoGpu

_ON_CPU = "`--device cpu` works without a GPU"
_NEWER_DRIVER = "install a newer NVIDIA driver; the one for CUDA 13 is 580 or later"


def architecture(device: torch.device) -> str:
    """What to compile for on `device`. Raises NoGpu where torch, the driver or the device cannot run kernels."""
    _start(device)
    packages.core()
    supported, compiler = driver_version(), packages.nvrtc_version()
    if supported[0] < compiler[0]:
        raise NoGpu(
            f"the NVIDIA driver is for CUDA {supported[0]}.{supported[1]}, kernels are compiled for CUDA {compiler[0]}",
            _NEWER_DRIVER,
        )
    return build.architecture(*torch.cuda.get_device_capability(device))


def current(device: torch.device) -> int:
    """Index of torch's current CUDA device, for a `device` without an index. Raises NoGpu as `architecture` does."""
    _start(device)
    return torch.cuda.current_device()


def driver_version() -> tuple[int, int]:
    """Major and minor version of CUDA that the driver supports."""
    number = int(_call("cuDriverGetVersion"))
    return number // 1000, number % 1000 // 10


def attribute(index: int, name: str) -> int:
    """What the driver says of the device `index`, by the end of the attribute's name."""
    asked = getattr(_bindings().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(_call("cuDeviceGetAttribute", asked, _call("cuDeviceGet", index)))


def ensure_context(index: int) -> None:
    """Have the calling thread use the context of the device `index`, torch's current one, as torch does.

    A thread that has not called CUDA's runtime yet uses none, and the driver would refuse a launch on stream 0.
    """
    if int(_call("cuCtxGetCurrent")) == 0:
        _call("cuCtxSetCurrent", _call("cuDevicePrimaryCtxRetain", _call("cuDeviceGet", index)))


def load_now(kernel: Any) -> None:
    """Load a kernel onto the current device: the driver would do it at the first launch, maybe within a capture."""
    _call("cuKernelGetFunction", _handle(kernel))


def allow_shared(kernel: Any, index: int, shared: int) -> None:
    """Let blocks of `kernel` have `shared` bytes of dynamic shared memory on the device `index`."""
    attribute = _bindings().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _call("cuKernelSetAttribute", attribute, shared, _handle(kernel), _call("cuDeviceGet", index))


@contextmanager
def loading(op: str) -> Iterator[None]:
    """Turn what the driver says while `op` is loaded into NoGpu."""
    try:
        yield
    except NoGpu:
        raise
    except Exception as error:  # cuda.core's own class is not public in every release
        said = " ".join(str(error).split())
        if "OUT_OF_MEMORY" in said:
            raise NoGpu(
                f"no memory is left on the GPU to load the kernel `{op}`",
                "close other programs that use the GPU, or take another one (CUDA_VISIBLE_DEVICES)",
            ) from error
        raise NoGpu(f"the driver does not load the kernel `{op}`: {said}", _NEWER_DRIVER) from error


def _start(device: torch.device) -> None:
    """Start CUDA in torch, and put into words why it does not."""
    if torch.version.cuda is None:
        raise NoGpu(
            f"torch {torch.__version__} is built without CUDA",
            f"install a build with CUDA (https://pytorch.org/get-started); {_ON_CPU}",
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise _no_start(str(error)) from error
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise NoGpu(f"there is no GPU `{device}`", f"choose from cuda:0 to cuda:{torch.cuda.device_count() - 1}")


def _no_start(said: str) -> NoGpu:
    said = " ".join(said.split())
    if "too old" in said:
        found = re.search(r"found version (\d+)", said)
        version = int(found[1]) if found else 0
        has = f" (CUDA {version // 1000}.{version % 1000 // 10})" if version else ""
        return NoGpu(f"the NVIDIA driver{has} is too old for torch's CUDA {torch.version.cuda}", _NEWER_DRIVER)
    if "no NVIDIA driver" in said:
        return NoGpu("no NVIDIA driver is installed, or no GPU is here", f"install the driver; {_ON_CPU}")
    if "No CUDA GPUs" in said:
        return NoGpu("the NVIDIA driver shows no GPU", f"look at CUDA_VISIBLE_DEVICES and `nvidia-smi`; {_ON_CPU}")
    if "out of memory" in said:
        return NoGpu("no memory is left on the GPU", "close other programs that use the GPU")
    return NoGpu(f"CUDA does not start: {said}", f"`nvidia-smi` may say why; {_ON_CPU}")


def _bindings() -> Any:
    return import_module("cuda.bindings.driver")


def _call(function: str, *arguments: Any) -> Any:
    """Call the driver; what it returns after its status. Raises NoGpu where it refuses."""
    try:
        status, *result = getattr(_bindings(), function)(*arguments)
    except Exception as error:  # each release of cuda-bindings has its own error for a library that is not there
        raise NoGpu("the NVIDIA driver cannot be loaded", f"install the driver; {_ON_CPU}") from error
    if int(status):
        raise RuntimeError(f"{status.name} from {function}")
    return result[0] if result else None


def _handle(kernel: Any) -> Any:
    return kernel.handle if hasattr(kernel, "handle") else kernel._handle  # cuda-core before 0.5
