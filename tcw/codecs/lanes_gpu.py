"""Words to a `lanes` stream on a GPU, and on the processor where there is none, or it fails: the same bytes."""

import ctypes
import logging
import sys
import threading
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tcw.codecs import lanes

CPU = "cpu"
_log = logging.getLogger("tcw")
_turns = threading.BoundedSemaphore(2)  # one tensor is copied while another is encoded; more would only take memory
_said: set[tuple[str, str]] = set()
_saying = threading.Lock()


def place(device: str) -> str:
    """Where a run that was asked to use `device` encodes: "cuda:0", another GPU of CUDA, or "cpu".

    "auto" takes the first GPU; torch, whose import takes seconds, is asked only where NVIDIA's driver is installed.
    Raises UsageError for a device that is not here.
    """
    asked = device.strip().lower()
    if asked in (CPU, "mps") or (asked == "auto" and not _driver_is_here()):
        return CPU
    from tcw.device import pick

    found = pick(asked)
    return found.torch_name if found.kind == "cuda" else CPU


def encode(words: np.ndarray, split: str, device: str) -> "lanes.Stream":
    """Code an array on the device that `place` named, as tcw.codecs.lanes.encode does.

    What goes wrong on a GPU (no memory, no compiler, an old driver) is logged, once for each reason, and the array is
    coded on the processor.

    Args:
        words: [n], of the split's word, in the processor's memory.
        split: "bf16", "f16", "f32", "u8" or "u16".
        device: "cpu" or a GPU.

    Raises:
        NotCodable: There are more than 4,096 different symbols, or the codes reach 4 GiB.
    """
    from tcw.codecs import lanes  # compiles its loops: `place` does not need them

    if device != CPU:
        try:
            with _turns:
                return _encode_on_gpu(words, split, device)
        except (lanes.NotCodable, MemoryError):
            raise
        except Exception as error:  # torch, the driver and each release of cuda-core have errors of their own
            _say(device, " ".join(str(error).split()).partition(". ")[0] or type(error).__name__)
    return lanes.encode(words, split)


def _encode_on_gpu(words: np.ndarray, split: str, device: str) -> "lanes.Stream":
    import torch

    from tcw import cuda
    from tcw.kernels.lanes_encode import encode as encode_tensor

    module = cuda.module("lanes_encode", torch.device(device))
    array = words if words.flags.writeable else words.copy()  # torch takes no others
    return encode_tensor(torch.from_numpy(array).to(module.device), split, module=module).numpy()


def _say(device: str, reason: str) -> None:
    with _saying:
        if (device, reason) in _said:
            return
        _said.add((device, reason))
    _log.warning("`%s` cannot encode, the processor does: %s", device, reason)


def _driver_is_here() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True
