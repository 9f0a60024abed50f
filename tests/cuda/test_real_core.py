"""What the real cuda-core asks a driver for, when tcw launches kernels through it: driver_stub.c stands for the driver.

That shows that names, arguments and order of calls are right, not that a kernel runs.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stub as libcuda.so.1."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the stub of the driver is for Linux")
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-core is not installed")
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("driver")
    options = ["-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(HERE / "driver_stub.c"), "-ldl"]
    subprocess.run([compiler, *options], check=True, timeout=60)
    return folder


def test_what_the_driver_is_asked_for(driver: Path) -> None:
    environment = os.environ | {"LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, "-W", "error", "-P", str(HERE / "on_a_stub.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    address, attributes, refused = done.stdout.splitlines()
    assert attributes == "16001 97000"  # attribute 16 of device 1, 97 of device 0
    assert refused == "no memory is left on the GPU to load the kernel `other`"
    loading = ["library ELF", "function one", "function two"]
    assert [line.removeprefix("cu: ") for line in done.stderr.splitlines()] == [
        "context 100",
        *loading,
        f"launch one grid 3 2 1 block 128 1 1 shared 100 stream 0 attributes 0 values {address} deadbeef",
        "attribute 8 of one = 60000 on 0",
        "launch one grid 7 1 1 block 128 1 1 shared 60000 stream 0 attributes 0 values 0 fffffffe",
        "launch one grid 7 1 1 block 128 1 1 shared 60000 stream 0 attributes 0 values 0 3f800000",
        "launch two grid 7 1 1 block 128 1 1 shared 0 stream 0 attributes 0 values ffffffffffffffff 5",
        *loading,
        "launch two grid 1 2 3 block 64 1 1 shared 0 stream abc0 attributes 0 values 0 0",
    ]
