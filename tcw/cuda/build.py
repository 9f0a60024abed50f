"""Compile a kernel with NVRTC for one architecture, or take what was compiled before.

What comes out is a cubin, machine code: one of a newer CUDA 13.x loads on an older driver of CUDA 13, PTX would not.
Compiling needs no GPU, no driver and no CUDA toolkit.
"""

import hashlib
import io
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcw.cuda import cache, log, packages
from tcw.cuda.errors import NoGpu
from tcw.cuda.log import Resources
from tcw.folders import folder

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
STANDARD = "c++17"
_PTXAS = ["-v"]
_FORMAT = 1  # of the files in the cache
_RELEASE = re.compile(rb"release \d+\.\d+, V(\d+\.\d+\.\d+)")
_log = logging.getLogger("tcw")


@dataclass(frozen=True)
class Built:
    """One op, compiled: `resources` by the kernel's name; `compiler` is the version of CUDA, such as "13.5.37"."""

    op: str
    arch: str
    cubin: bytes
    resources: dict[str, Resources]
    compiler: str
    warnings: tuple[str, ...] = ()


def operations() -> list[str]:
    """Ops that have a kernel in CUDA C++."""
    return sorted(path.parent.name for path in folder("kernels").glob("*/kernel.cu"))


def compile_op(op: str, arch: str) -> Built:
    """Return kernels/<op>/kernel.cu compiled for `arch`, such as "sm_90", from the disk cache where that has it.

    Raises NoGpu where cuda-core or NVRTC is missing, and where the source does not compile.
    """
    text = _source(op).read_text(encoding="utf-8")
    key = key_of(op, arch, text)
    name = f"{op}-{arch}-{key[:32]}"
    if (stored := cache.read(name)) is not None:
        return _unpacked(op, arch, *stored)
    built = _compile(op, arch, text)
    cache.write(name, _header(built), built.cubin)
    return built


def key_of(op: str, arch: str, text: str) -> str:
    """SHA-256 in hexadecimal over all that decides what comes out of compiling `text`."""
    headers = {path.name: _digest(path.read_bytes()) for path in sorted(_include().iterdir()) if path.is_file()}
    parts = [_FORMAT, op, arch, STANDARD, _PTXAS, packages.nvrtc_version(), text, headers]
    return _digest(json.dumps(parts).encode())


def architecture(major: int, minor: int) -> str:
    """What to compile for on a GPU of compute capability major.minor.

    That itself, or where this NVRTC does not know it yet, the nearest lower one of the same generation, whose machine
    code runs there too. Raises NoGpu where there is none.
    """
    known = packages.nvrtc_architectures()
    fits = [number for number in known if number // 10 == major and number % 10 <= minor]
    if (major, minor) < (7, 5):
        raise NoGpu(f"compute capability {major}.{minor} is below 7.5 (Turing, 2018)", "use `--device cpu`")
    if not fits:
        version = ".".join(map(str, packages.nvrtc_version()))
        raise NoGpu(
            f"NVRTC {version} does not compile for compute capability {major}.{minor}",
            "pip install -U 'cuda-core[cu13]' nvidia-cuda-nvrtc",
        )
    return f"sm_{fits[-1]}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _source(op: str) -> Path:
    return folder("kernels") / op / "kernel.cu"


def _include() -> Path:
    return folder("kernels") / "include"


def _compile(op: str, arch: str, text: str) -> Built:
    core, said = packages.core(), io.StringIO()
    options = core.ProgramOptions(
        name=f"{op}.cu", std=STANDARD, arch=arch, include_path=str(_include()), ptxas_options=list(_PTXAS)
    )
    try:
        cubin = _machine_code(core.Program(text, "c++", options), said)
    except Exception as error:  # the class for what NVRTC refuses is not public in every release
        raise _refused(op, arch, error) from error
    heard = said.getvalue().replace("\0", "")
    release = _RELEASE.search(cubin)
    compiler = release[1].decode() if release else ".".join(map(str, packages.nvrtc_version()))
    return Built(op, arch, cubin, log.resources(heard), compiler, log.warnings(heard))


def _machine_code(program: Any, said: io.StringIO) -> bytes:
    try:
        return bytes(program.compile("cubin", logs=said).code)
    finally:
        program.close()
        del program  # an error's traceback would keep it, and cuda-core 1.2 complains when it goes late


def _refused(op: str, arch: str, error: Exception) -> NoGpu:
    text, version = str(error), ".".join(map(str, packages.nvrtc_version()))
    if type(error).__name__ == "DynamicLibNotFoundError":
        name = f"cuda-core {packages.version_of('cuda-core')}"
        return NoGpu(f"{name} compiles only where an NVIDIA driver is installed", "pip install -U cuda-core")
    _log.debug("NVRTC %s on kernels/%s/kernel.cu for %s: %s", version, op, arch, text)
    first = next(iter(log.errors(text)), " ".join(text.split()))
    return NoGpu(
        f"the kernel `{op}` does not compile for {arch} with NVRTC {version}: {first}",
        "this is a bug in tcw: set `TCW_DEBUG=1`, run it again, and report what the compiler said",
    )


def _header(built: Built) -> dict[str, object]:
    table = {name: vars(resources) for name, resources in built.resources.items()}
    return {"compiler": built.compiler, "warnings": built.warnings, "resources": table}


def _unpacked(op: str, arch: str, header: dict[str, object], cubin: bytes) -> Built:
    table = {name: Resources(**row) for name, row in header["resources"].items()}  # type: ignore[attr-defined]
    return Built(op, arch, cubin, table, str(header["compiler"]), tuple(header["warnings"]))  # type: ignore[arg-type]
