"""cuda-core under its old and its new name, and what is said where it or NVRTC is missing."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tcw import cuda
from tcw.cuda import packages


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Nothing is remembered of other tests, and nothing of these."""
    functions = (packages.core, packages.nvrtc_version, packages.nvrtc_architectures)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


def importing(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> None:
    """Only these modules can be imported; an exception is raised."""

    def import_module(name: str) -> Any:
        module = found.get(name, ModuleNotFoundError(f"No module named '{name}'"))
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(packages, "import_module", import_module)


def nvrtc(status: int = 0) -> Any:
    class Status(int):
        name = "NVRTC_ERROR"

    return SimpleNamespace(
        nvrtcVersion=lambda: (Status(status), 13, 1),
        nvrtcGetSupportedArchs=lambda: (Status(status), [90, 75, 80]),
    )


def test_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    empty, full = ModuleType("cuda.core"), SimpleNamespace(Program=1)
    importing(monkeypatch, {"cuda.core": empty, "cuda.core.experimental": full})
    assert packages.core() is full  # before 0.5
    packages.core.cache_clear()
    importing(monkeypatch, {"cuda.core": full})
    assert packages.core() is full  # since then


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    importing(monkeypatch, {})
    with pytest.raises(cuda.NoGpu, match=r"`cuda-core` is not installed: No module named 'cuda\.core'") as caught:
        packages.core()
    assert caught.value.hint == "pip install 'tcw[gpu]'"


def test_bindings_missing_or_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    importing(monkeypatch, {"cuda.core": ImportError("cuda.bindings 12.x or 13.x must be installed")})
    with pytest.raises(cuda.NoGpu, match=r"cannot be imported: cuda\.bindings 12\.x or") as caught:
        packages.core()
    assert caught.value.hint == "pip install 'tcw[gpu]'"


def test_a_release_without_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    importing(monkeypatch, {"cuda.core": ModuleType("a"), "cuda.core.experimental": ModuleType("b")})
    with pytest.raises(cuda.NoGpu, match="has no compiler in it"):
        packages.core()


def test_nvrtc_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    importing(monkeypatch, {"cuda.core": SimpleNamespace(Program=1), "cuda.bindings.nvrtc": nvrtc()})
    assert packages.nvrtc_version() == (13, 1)
    assert packages.nvrtc_architectures() == (75, 80, 90)


@pytest.mark.parametrize("ask", [packages.nvrtc_version, packages.nvrtc_architectures])
def test_nvrtc_fails(monkeypatch: pytest.MonkeyPatch, ask: Callable[[], Any]) -> None:
    importing(monkeypatch, {"cuda.core": SimpleNamespace(Program=1), "cuda.bindings.nvrtc": nvrtc(1)})
    with pytest.raises(cuda.NoGpu, match=r"NVRTC does not say .*NVRTC_ERROR"):
        ask()


def test_nvrtc_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file")

    bindings = SimpleNamespace(nvrtcVersion=missing)
    importing(monkeypatch, {"cuda.core": SimpleNamespace(Program=1), "cuda.bindings.nvrtc": bindings})
    with pytest.raises(cuda.NoGpu, match="NVRTC, the compiler of CUDA, cannot be loaded") as caught:
        packages.nvrtc_version()
    assert caught.value.hint == "pip install 'tcw[gpu]'"


def test_the_version_of_something_that_is_not_installed() -> None:
    assert packages.version_of("no-such-package") == "unknown"
    assert packages.version_of("pytest") == pytest.__version__


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, tcw.cuda; print([m for m in ('torch', 'cuda', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


def test_the_real_one() -> None:
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-core is not installed")
    assert isinstance(packages.core(), ModuleType)
    assert packages.nvrtc_version() >= (12, 0)
    assert 90 in packages.nvrtc_architectures()
