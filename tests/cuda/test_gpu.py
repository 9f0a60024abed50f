"""On a GPU: compiled, loaded and launched for real. Skipped by default; `pytest -m gpu` runs it."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tcw import cuda
from tcw.cuda import launch

pytestmark = pytest.mark.gpu

SOURCE = """#include "tcw.cuh"
extern __shared__ __align__(16) unsigned char shared[];

// out[i] = in[n - 1 - i] + value, by way of shared memory; in may be null
extern "C" __global__ void turn(u32* out, const u32* in, u32 n, u64 value) {
    u32* staged = reinterpret_cast<u32*>(shared);
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) staged[i] = in == nullptr ? 0 : in[i];
    __syncthreads();
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) out[i] = staged[n - 1 - i] + static_cast<u32>(value);
}
"""


@pytest.fixture(autouse=True)
def _source(kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    (kernels / "toy" / "kernel.cu").write_text(SOURCE)
    (kernels / "include" / "tcw.cuh").write_text("using u32 = unsigned int;\nusing u64 = unsigned long long;\n")
    monkeypatch.setattr(launch, "_modules", {})


def turn(into: torch.Tensor, words: torch.Tensor | None, value: int) -> None:
    n = into.numel()
    arguments = [into, words, np.uint32(n), np.uint64(value)]
    cuda.module("toy", into.device).launch("turn", 1, 256, arguments, shared=4 * n)


def numbers(n: int, index: int = 0) -> torch.Tensor:
    return torch.arange(n, dtype=torch.int32, device=f"cuda:{index}")


@pytest.mark.parametrize("n", [1, 1000, 12_288, 12_289, 16_000])
def test_a_launch_with_more_and_more_shared_memory(n: int) -> None:
    words = numbers(n)
    out = torch.empty_like(words)
    turn(out, words, 5)
    assert torch.equal(out, words.flip(0) + 5)
    turn(out, None, 7)
    assert torch.equal(out, torch.full_like(words, 7))


def test_on_the_current_stream() -> None:
    words, side = numbers(4000), torch.cuda.Stream()
    out = torch.empty_like(words)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        words += 1
        turn(out, words, 0)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(out, words.flip(0))


def test_in_a_graph() -> None:
    words = numbers(3000)
    out = torch.empty_like(words)
    turn(out, words, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        turn(out, words, 3)
    words.mul_(2)
    graph.replay()
    assert torch.equal(out, words.flip(0) + 3)


def test_in_a_new_thread() -> None:
    words = numbers(100)
    out = torch.empty_like(words)
    turn(out, words, 0)
    thread = threading.Thread(target=turn, args=(out, words, 9))
    thread.start()
    thread.join()
    assert torch.equal(out, words.flip(0) + 9)


def test_on_another_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    words = numbers(100, 1)
    out = torch.empty_like(words)
    turn(out, words, 1)
    assert torch.equal(out, words.flip(0) + 1)
    assert torch.cuda.current_device() == 0
