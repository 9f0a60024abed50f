"""Every kernel in CUDA C++ compiles for every architecture, without a warning, and takes what is recorded.

After a change of a kernel `python -m tcw.cuda.resources --record` writes the tables anew.
"""

import functools

import pytest

from tcw import cuda
from tcw.cuda import build, packages, resources
from tcw.cuda.build import ARCHITECTURES, Built


@functools.cache
def compiled() -> dict[str, list[Built]]:
    """All of them at once, on all cores: ops, each in the order of ARCHITECTURES."""
    ops = build.operations()
    made = list(resources.compile_all(ops))
    return {op: made[i * len(ARCHITECTURES) : (i + 1) * len(ARCHITECTURES)] for i, op in enumerate(ops)}


@pytest.fixture(autouse=True, scope="module")
def compiler() -> None:
    """NVRTC; it needs neither a GPU nor a driver."""
    try:
        packages.nvrtc_version()
    except cuda.NoGpu as error:
        pytest.skip(f"{error.message}: {error.hint}")


@pytest.mark.parametrize("op", build.operations())
def test_kernel(op: str) -> None:
    built = compiled()[op]
    assert [one.arch for one in built] == list(ARCHITECTURES)
    assert [(one.arch, one.warnings) for one in built if one.warnings] == []
    assert resources.differences(op, built) == []


def test_there_are_kernels() -> None:
    assert build.operations()
