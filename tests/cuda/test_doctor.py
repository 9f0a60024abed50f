"""What `tcw doctor` says of kernels in CUDA C++, with and without a GPU, a compiler and its package."""

import importlib.util
from typing import Any

import pytest
import torch

from tcw import cuda, doctor
from tcw.cuda import cache, packages
from tcw.doctor import Check

from .fakes import Compiler, Gpu


def check() -> Check:
    return doctor._cuda_kernels()


def test_with_a_gpu(gpu: Gpu) -> None:
    found = check()
    assert found == Check(
        "cuda kernels", True, f"compiled with NVRTC 13.5 for sm_90, cache {cache.place()}", required=False
    )
    assert len(gpu.loaded) == 1


def test_without_a_gpu_they_are_compiled_all_the_same(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    found = check()
    assert (found.state, compiler.compiled) == ("-", [("toy.cu", "sm_90")])
    assert found.detail == f"NVRTC 13.5 compiles them, but torch {torch.__version__} is built without CUDA"


def test_without_the_package(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise cuda.NoGpu("`cuda-core` is not installed", "pip install 'tcw[gpu]'")

    monkeypatch.setattr(packages, "nvrtc_version", missing)
    found = check()
    assert (found.state, found.detail) == ("-", "`cuda-core` is not installed; pip install 'tcw[gpu]'")


def test_a_kernel_that_does_not_compile(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    compiler.error = RuntimeError("compilation log:\ntoy.cu(2): error: no `x`")
    found = check()
    assert found.state == "-"
    assert "does not compile for sm_90 with NVRTC 13.5: toy.cu(2): error: no `x`" in found.detail


def test_a_kernel_that_does_not_load(gpu: Gpu) -> None:
    gpu.memory = False
    found = check()
    assert found.state == "-"
    assert "no memory is left on the GPU" in found.detail


def test_the_extra_where_even_the_namespace_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str) -> Any:
        return real(name.replace("cuda", "no_such_package_at_all"))

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert doctor._extra("gpu", doctor.EXTRAS["gpu"]) == Check(
        "[gpu]", False, "no cuda.core: pip install 'tcw[gpu]'", required=False
    )
