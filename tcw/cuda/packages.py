"""The packages of NVIDIA that are asked for at first use: cuda-core under either of its names, and NVRTC.

cuda-core 0.5 moved from `cuda.core.experimental` to `cuda.core`; what tcw uses has the same names in both.
"""

import functools
import threading
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

from tcw.cuda.errors import NoGpu

_INSTALL = "pip install 'tcw[gpu]'"
_lock = threading.Lock()  # two threads that import cuda.core at once may find it half made


@functools.cache
def core() -> ModuleType:
    """`cuda.core`. Raises NoGpu where it is not installed or does not import."""
    with _lock:
        for name in ("cuda.core", "cuda.core.experimental"):
            try:
                found = import_module(name)
            except ModuleNotFoundError as error:
                raise NoGpu(f"`cuda-core` is not installed: {error}", _INSTALL) from error
            except ImportError as error:
                raise NoGpu(f"`cuda-core` cannot be imported: {error}", _INSTALL) from error
            if hasattr(found, "Program"):
                return found
    raise NoGpu(f"`cuda-core` {version_of('cuda-core')} has no compiler in it", _INSTALL)


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Major and minor version of NVRTC, the compiler. Raises NoGpu where its library cannot be loaded."""
    status, major, minor = _nvrtc("nvrtcVersion")
    if int(status):
        raise NoGpu(f"NVRTC does not say its version: {status.name}", _INSTALL)
    return major, minor


@functools.cache
def nvrtc_architectures() -> tuple[int, ...]:
    """What NVRTC compiles for, in ascending order: 75 is compute capability 7.5."""
    status, architectures = _nvrtc("nvrtcGetSupportedArchs")
    if int(status):
        raise NoGpu(f"NVRTC does not say what it compiles for: {status.name}", _INSTALL)
    return tuple(sorted(architectures))


def _nvrtc(function: str) -> Any:
    core()
    try:
        return getattr(import_module("cuda.bindings.nvrtc"), function)()
    except Exception as error:  # each release of cuda-bindings has its own error for a library that is not there
        raise NoGpu("NVRTC, the compiler of CUDA, cannot be loaded", _INSTALL) from error


def version_of(package: str) -> str:
    """Version of an installed package; "unknown" where nothing says so."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
