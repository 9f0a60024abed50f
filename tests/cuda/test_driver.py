"""Why a GPU cannot be used: one clear error each, with what to do about it."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tcw import cuda
from tcw.cuda import driver
from tcw.errors import UsageError

from .fakes import Gpu, Status

CUDA = torch.device("cuda", 0)


def refused(said: str, hint: str, device: torch.device = CUDA) -> None:
    with pytest.raises(cuda.NoGpu) as caught:
        cuda.module("toy", device)
    assert said in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message


def test_torch_without_cuda(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    refused(f"torch {torch.__version__} is built without CUDA", "https://pytorch.org/get-started")
    refused("is built without CUDA", "--device cpu", torch.device("cuda"))


@pytest.mark.parametrize(
    ("torch_says", "said", "hint"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver ...",
            "the NVIDIA driver (CUDA 12.8) is too old for torch's CUDA 13.0",
            "580",
        ),
        ("The NVIDIA driver on your system is too old.", "the NVIDIA driver is too old", "580"),
        (
            "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver",
            "no NVIDIA driver is installed, or no GPU is here",
            "install the driver",
        ),
        ("No CUDA GPUs are available", "the NVIDIA driver shows no GPU", "CUDA_VISIBLE_DEVICES"),
        ("CUDA error: out of memory", "no memory is left on the GPU", "close other programs"),
        ("CUDA unknown\nerror 999", "CUDA does not start: CUDA unknown error 999", "nvidia-smi"),
    ],
)
def test_cuda_that_does_not_start(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, torch_says: str, said: str, hint: str
) -> None:
    def init() -> None:
        raise RuntimeError(torch_says)

    monkeypatch.setattr(torch.cuda, "init", init)
    refused(said, hint)


def test_a_device_that_is_not_here(gpu: Gpu) -> None:
    refused("there is no GPU `cuda:2`", "cuda:0 to cuda:1", torch.device("cuda", 2))


def test_a_driver_before_the_compiler_s_cuda(gpu: Gpu) -> None:
    gpu.version = 12080
    refused("the NVIDIA driver is for CUDA 12.8, kernels are compiled for CUDA 13", "580")


def test_an_older_driver_of_the_same_cuda_will_do(gpu: Gpu) -> None:
    gpu.version = 13000  # NVRTC is 13.5
    assert driver.driver_version() == (13, 0)
    assert driver.architecture(CUDA) == "sm_90"


def test_a_gpu_below_compute_capability_7_5(gpu: Gpu) -> None:
    gpu.capability = (7, 0)
    refused("compute capability 7.0 is below 7.5", "--device cpu")


def test_no_memory_for_a_kernel(gpu: Gpu) -> None:
    gpu.memory = False
    refused("no memory is left on the GPU to load the kernel `toy`", "CUDA_VISIBLE_DEVICES")
    gpu.memory = True
    assert cuda.module("toy", CUDA).multiprocessors == 132  # a failure is not kept


def test_what_else_the_driver_says(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cuKernelGetFunction", lambda kernel: (Status.CUDA_ERROR_INVALID_VALUE, None))
    refused("does not load the kernel `toy`: CUDA_ERROR_INVALID_VALUE from cuKernelGetFunction", "580")


def test_a_driver_that_cannot_be_loaded(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise RuntimeError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(gpu, "cuDriverGetVersion", missing)
    refused("the NVIDIA driver cannot be loaded", "install the driver")


def test_handles_of_old_and_new_releases() -> None:
    assert driver._handle(SimpleNamespace(handle=3, _handle=4)) == 3
    assert driver._handle(SimpleNamespace(_handle=4)) == 4


def test_the_error_crosses_processes_with_its_hint() -> None:
    again = pickle.loads(pickle.dumps(cuda.NoGpu("no driver", "install it")))
    assert (type(again), again.message, again.hint) == (cuda.NoGpu, "no driver", "install it")
    assert isinstance(again, UsageError)
