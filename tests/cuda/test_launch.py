"""What is handed to cuda.core at a launch, and what is refused before it."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from tcw import cuda
from tcw.errors import UsageError

from .fakes import Compiler, Gpu, on_gpu

CUDA = torch.device("cuda", 0)


def words(index: int = 0) -> torch.Tensor:
    return on_gpu(torch.arange(6, dtype=torch.int32), index)


def test_a_launch(gpu: Gpu) -> None:
    module = cuda.module("toy", CUDA)
    tensor = words()
    module.launch("one", (3, 2), 128, [tensor, np.uint32(7)], shared=4096)
    ((stream, device, config, kernel, arguments),) = gpu.launches
    assert stream == "stream 0x0"
    assert (device, config, kernel) == (0, ((3, 2), 128, 4096), "one")
    assert arguments == (tensor.data_ptr(), 7)
    assert type(arguments[0]) is int  # cuda.core takes it for an address
    assert type(arguments[1]) is np.uint32
    assert (module.multiprocessors, module.shared_limit) == (132, 232448)


def test_the_stream_is_torch_s_current_one_at_each_launch(gpu: Gpu) -> None:
    module = cuda.module("toy", CUDA)
    for address in (0x40, 0, 0x80, 0x40):
        gpu.streams = [address, 0xBAD]
        module.launch("two", 1, 32, [words(), None])
    assert [launch[0] for launch in gpu.launches] == ["stream 0x40", "stream 0x0", "stream 0x80", "stream 0x40"]
    assert gpu.launches[0][-1][1] == 0  # None is the null pointer


def test_another_gpu_is_made_the_current_one_and_then_left(gpu: Gpu) -> None:
    module = cuda.module("toy", torch.device("cuda", 1))
    assert [call for call in gpu.asked if call[0] == "load"] == [
        ("load", ("kernel", "one"), 1), ("load", ("kernel", "two"), 1),
    ]  # fmt: skip
    gpu.streams = [0xBAD, 0x70]
    module.launch("two", 5, 64, [words(1), words(1)])
    assert gpu.launches[0][:3] == ("stream 0x70", 1, (5, 64, 0))
    assert gpu.here == 0


def test_compiled_and_loaded_once_for_each_device(gpu: Gpu, compiler: Compiler) -> None:
    first = cuda.module("toy", CUDA)
    assert cuda.module("toy", CUDA) is first
    assert cuda.module("toy", torch.device("cuda")) is first
    gpu.here = 1
    other = cuda.module("toy", torch.device("cuda"))
    assert other.device == torch.device("cuda", 1)
    assert len(gpu.loaded) == 2
    assert len(compiler.compiled) == 1


def test_threads_share_a_module(gpu: Gpu) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(cuda.module("toy", CUDA))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == len(gpu.loaded) == 1


def test_a_thread_that_has_not_used_cuda_is_given_the_device_s_context(gpu: Gpu) -> None:
    module, here = cuda.module("toy", CUDA), threading.get_ident()
    assert gpu.contexts == {here: 100}
    threads: list[int | None] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: [module.launch("two", 1, 32, [None, None]) for _ in range(2)])
        thread.start()
        thread.join()
        threads.append(thread.ident)
    assert len(gpu.launches) == 4
    assert set(gpu.contexts.values()) == {100}
    assert set(gpu.contexts) == {here, *threads}


def test_a_context_of_the_user_stays(gpu: Gpu) -> None:
    gpu.contexts[threading.get_ident()] = 7
    cuda.module("toy", CUDA).launch("two", 1, 32, [None, None])
    assert gpu.contexts == {threading.get_ident(): 7}


@pytest.mark.parametrize("grid", [0, (0,), (4, 0), (0, 3, 2)])
def test_an_empty_grid_launches_nothing(gpu: Gpu, grid: int | tuple[int, ...]) -> None:
    cuda.module("toy", CUDA).launch("one", grid, 128, [words(), np.uint32(0)])
    assert gpu.launches == []


def test_the_limit_of_shared_memory_is_raised_when_needed_and_once(gpu: Gpu) -> None:
    module = cuda.module("toy", torch.device("cuda", 1))
    arguments = [words(1), words(1)]
    gpu.asked.clear()
    static = 2048  # that `two` has, by the compiler's log
    module.launch("two", 1, 32, arguments, shared=48 * 1024 - static)
    assert gpu.asked == []
    for shared in (60_000, 60_000, 50_000, 70_000):
        module.launch("two", 1, 32, arguments, shared=shared)
    assert gpu.asked == [("shared", n, ("kernel", "two"), "device 1") for n in (60_000, 70_000)]
    module.launch("one", 1, 32, [words(1), np.int32(1)], shared=50_000)
    assert gpu.asked[2:] == [("shared", 50_000, ("kernel", "one"), "device 1")]
    with pytest.raises(ValueError, match="`two` asks for 232449 bytes of shared memory, a block may have 232448"):
        module.launch("two", 1, 32, arguments, shared=232_449)
    assert len(gpu.launches) == 6


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ([torch.zeros(2), np.uint32(1)], ValueError, "argument 0 is on `cpu`, the kernel runs on `cuda:0`"),
        ([on_gpu(torch.zeros(2), 1), np.uint32(1)], ValueError, "argument 0 is on `cuda:1`"),
        ([on_gpu(torch.zeros(2, 3).t()), np.uint32(1)], ValueError, "argument 0 is not contiguous"),
        ([on_gpu(torch.zeros(2))], ValueError, "1 arguments for a kernel with 2 parameters"),
        ([on_gpu(torch.zeros(2)), np.uint32(1), np.uint32(1)], ValueError, "3 arguments"),
        ([on_gpu(torch.zeros(2)), 1], TypeError, "argument 1 is 1 of type int"),
        ([on_gpu(torch.zeros(2)), 1.0], TypeError, "of type float"),
        ([on_gpu(torch.zeros(2)), True], TypeError, "of type bool"),
        ([on_gpu(torch.zeros(2)), np.float64(1)], TypeError, "of type float64"),
        ([on_gpu(torch.zeros(2)), np.uint64(1)], TypeError, "the parameter has 4 bytes"),
        ([on_gpu(torch.zeros(2)), on_gpu(torch.zeros(2))], TypeError, r"a tensor of shape \[2\], the parameter has 4"),
        ([np.uint32(1), np.uint32(1)], TypeError, "argument 0 .* the parameter has 8 bytes"),
        ([on_gpu(torch.zeros(2)), None], TypeError, "argument 1 is None"),
        ([on_gpu(torch.zeros(2)), "n"], TypeError, "argument 1 is 'n'"),
        ([0x7F00_0000_0000, np.uint32(1)], TypeError, "argument 0 is .* of type int, where numpy's int32"),
    ],
)
def test_wrong_arguments(gpu: Gpu, arguments: list[Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        cuda.module("toy", CUDA).launch("one", 1, 32, arguments)
    assert gpu.launches == []


@pytest.mark.parametrize("number", [np.int32(-1), np.uint32(1), np.float32(0.5)])
def test_numbers_of_four_bytes(gpu: Gpu, number: np.generic) -> None:
    cuda.module("toy", CUDA).launch("one", 1, 32, [words(), number])
    assert gpu.launches[0][-1][1] is number


@pytest.mark.parametrize("number", [np.int64(-1), np.uint64(1)])
def test_numbers_of_eight_bytes(gpu: Gpu, number: np.generic) -> None:
    cuda.module("toy", CUDA).launch("two", 1, 32, [words(), number])
    assert gpu.launches[0][-1][1] is number


def test_nothing_is_loaded_while_a_graph_is_captured(gpu: Gpu) -> None:
    gpu.capturing = True
    with pytest.raises(UsageError, match="used for the first time while a CUDA graph is captured") as caught:
        cuda.module("toy", CUDA)
    assert caught.value.hint == "run the model once before the capture"
    gpu.capturing = False
    module = cuda.module("toy", CUDA)
    gpu.capturing = True
    assert cuda.module("toy", CUDA) is module
    module.launch("one", 1, 32, [words(), np.uint32(1)])
    assert len(gpu.launches) == 1


def test_a_launch_asks_the_driver_for_nothing(gpu: Gpu) -> None:
    module = cuda.module("toy", CUDA)
    gpu.asked.clear()
    module.launch("two", 1, 32, [words(), None])
    assert gpu.asked == []


def test_a_kernel_that_the_log_does_not_name(gpu: Gpu, compiler: Compiler) -> None:
    compiler.log = "ptxas says nothing that is understood"
    module = cuda.module("toy", CUDA)
    module.launch("one", 1, 32, [words(), np.uint32(1)], shared=100)
    module.launch("one", 1, 32, [words(), np.uint32(1)])
    assert gpu.asked == [("load", ("kernel", "one"), 0), ("shared", 100, ("kernel", "one"), "device 0")]
    assert len(gpu.launches) == 2


def test_a_kernel_that_is_not_there(gpu: Gpu) -> None:
    with pytest.raises(cuda.NoGpu, match="does not load the kernel `toy`"):
        cuda.module("toy", CUDA).launch("three", 1, 32, [])


def test_only_on_cuda() -> None:
    with pytest.raises(ValueError, match="not on `cpu`"):
        cuda.module("toy", torch.device("cpu"))


def test_an_op_without_a_kernel(gpu: Gpu) -> None:
    with pytest.raises(FileNotFoundError):
        cuda.module("no_such_op", CUDA)
