"""Run by test_real_core.py in a process of its own: tcw.cuda and the real cuda-core, over driver_stub.c."""

import os
import sys

import numpy as np
import torch

from tcw import cuda
from tcw.cuda import build, log
from tests.cuda.fakes import Gpu, on_gpu

gpu = Gpu({}, streams=[0, 0xABC0])
for name in (
    "init", "device_count", "current_device", "current_stream", "is_current_stream_capturing",
    "get_device_capability", "device",
):  # fmt: skip
    setattr(torch.cuda, name, getattr(gpu, name))
torch.version.cuda = "13.0"
row = log.Resources(registers=8, shared_bytes=2048, spill_stores=0, spill_loads=0, stack=0)
build.compile_op = lambda op, arch: build.Built(op, arch, b"\x7fELF", {"one": row, "two": row}, "13.0")


def main() -> None:
    """Every kind of argument, stream, device and limit."""
    first = cuda.module("toy", torch.device("cuda", 0))
    tensor = on_gpu(torch.zeros(4))
    sys.stdout.write(f"{tensor.data_ptr():x}\n")
    first.launch("one", (3, 2), 128, [tensor, np.uint32(0xDEADBEEF)], shared=100)
    first.launch("one", 7, 128, [None, np.int32(-2)], shared=60_000)
    first.launch("one", 7, 128, [None, np.float32(1)], shared=60_000)
    first.launch("two", 7, 128, [np.int64(-1), np.uint64(5)])
    second = cuda.module("toy", torch.device("cuda", 1))
    second.launch("two", (1, 2, 3), 64, [None, on_gpu(torch.zeros(0), 1)])
    sys.stdout.write(f"{second.multiprocessors} {first.shared_limit}\n")
    os.environ["STUB_NO_MEMORY"] = "1"
    try:
        cuda.module("other", torch.device("cuda", 0))
    except cuda.NoGpu as error:
        sys.stdout.write(f"{error.message}\n")


if __name__ == "__main__":
    main()
