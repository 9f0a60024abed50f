"""A folder of kernels of its own, a cache of its own, and stand-ins for the compiler and the GPU."""

from pathlib import Path

import pytest
import torch

from tcw.cuda import build, driver, launch, packages, resources

from .fakes import Compiler, Gpu

SOURCE = """#include "tcw.cuh"
extern "C" __global__ void one(u32* a, u32 n) { a[threadIdx.x] = n; }
extern "C" __global__ void two(float* a, const u32* p) { __shared__ float s[512]; s[p[0]] = *a; *a = s[p[1]]; }
"""


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with the op `toy` and one header; the cache of compiled kernels is empty."""
    folder = tmp_path / "kernels"
    (folder / "toy").mkdir(parents=True)
    (folder / "toy" / "kernel.cu").write_text(SOURCE)
    (folder / "include").mkdir()
    (folder / "include" / "tcw.cuh").write_text("#pragma once\nusing u32 = unsigned int;\n")
    for module in (build, resources):
        monkeypatch.setattr(module, "folder", lambda name: tmp_path / name)
    monkeypatch.setenv("TCW_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def compiler(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """A stand-in for NVRTC 13.5."""
    fake = Compiler()
    monkeypatch.setattr(packages, "core", lambda: fake)
    monkeypatch.setattr(packages, "nvrtc_version", lambda: (13, 5))
    monkeypatch.setattr(packages, "nvrtc_architectures", lambda: (75, 80, 86, 87, 89, 90, 100, 120))
    return fake


@pytest.fixture
def gpu(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Two stand-ins for GPUs of compute capability 9.0, and kernels `one` (pointer, 32 bits) and `two` (2 pointers)."""
    fake = Gpu({"one": (8, 4), "two": (8, 8)})
    for name in ("LaunchConfig", "launch", "ObjectCode", "Stream"):
        monkeypatch.setattr(compiler, name, getattr(fake, name), raising=False)
    monkeypatch.setattr(driver, "_bindings", lambda: fake)
    monkeypatch.setattr(launch, "_modules", {})
    monkeypatch.setattr(launch, "_thread", launch._Thread())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in (
        "init", "device_count", "current_device", "current_stream", "is_current_stream_capturing",
        "get_device_capability", "device",
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake
