"""Kernels on the processor: `host` compiles the source of an op for it."""

from collections.abc import Callable

import pytest

from tests.kernels.host import HostModule, compiler


@pytest.fixture(scope="session")
def host() -> Callable[..., HostModule]:
    """host(op, sanitize=False, order="forward") -> HostModule. Skips where there is no C++ compiler."""
    if compiler() is None:
        pytest.skip("no C++ compiler: kernels cannot be run on the processor")
    return HostModule
