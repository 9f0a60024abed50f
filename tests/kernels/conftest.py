"""Kernels on the processor: `host` compiles the source of an op for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.host import HostModule, compiler, sanitizer


@pytest.fixture(scope="session")
def host() -> Callable[..., HostModule]:
    """host(op, sanitize=False, races=False, order="forward") -> HostModule. Skips where there is no C++ compiler."""
    if compiler() is None:
        pytest.skip("no C++ compiler: kernels cannot be run on the processor")

    def make(op: str | Path, *, sanitize: bool = False, races: bool = False, **options: Any) -> HostModule:
        for watch, wanted in (("memory", sanitize), ("races", races)):
            if wanted and sanitizer(watch) is None:
                pytest.skip(f"the C++ compiler has no sanitizer of {watch} that works here")
        return HostModule(op, sanitize=sanitize, races=races, **options)

    return make
