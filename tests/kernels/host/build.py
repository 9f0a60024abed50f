"""Compile a kernel's source for this processor, into a library that runs its blocks one after another."""

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEPT = 7 * 24 * 3600  # seconds
KERNELS = HERE.parents[2] / "kernels"
BOUNDS = r"(?:__launch_bounds__\s*\([^)]*\)\s*)?"
ENTRY = re.compile(rf'extern\s+"C"\s+__global__\s+{BOUNDS}void\s+{BOUNDS}(\w+)\s*\(')
# Most of a test's time is spent in the compiler, so it does little: kernels are tested on small inputs.
OPTIONS = ["-std=c++17", "-Og", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off",
           "-U_FORTIFY_SOURCE", "-DTCW_HOST", "-w"]  # fmt: skip
# What kernels can be watched for, the options for that, and the sanitizer's library.
WATCHES = {
    "memory": (["-O0", "-g1", "-fno-sanitize-recover=all", "-fsanitize=address,alignment,bounds,shift,null",
                "-fsanitize=integer-divide-by-zero,signed-integer-overflow"], "asan"),
    "races": (["-Og", "-g1", "-fsanitize=thread"], "tsan"),
}  # fmt: skip
WATCH_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:redzone=1024:max_redzone=2048",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:report_thread_leaks=0",
}


class HostError(RuntimeError):
    """A kernel did what it must not do, or cannot be compiled. The message says what, and where."""


@cache
def compiler() -> str | None:
    """The C++ compiler of this machine; None where there is none that this package can use."""
    if not sys.platform.startswith("linux"):
        return None
    return next((c for c in (os.environ.get("CXX"), "g++", "c++", "clang++") if c and shutil.which(c)), None)


@cache
def version() -> str:
    """What the compiler says it is."""
    return subprocess.run([str(compiler()), "--version"], capture_output=True, text=True, check=True).stdout


@cache
def sanitizer(watch: str = "memory") -> Path | None:
    """The library of a sanitizer, which a process must load first; None where there is none that works here."""
    short = WATCHES[watch][1]
    name = f"libclang_rt.{short}-{os.uname().machine}.so" if "clang" in version() else f"lib{short}.so"
    asked = subprocess.run([str(compiler()), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(asked.stdout.strip()).resolve()
    if not asked.stdout.startswith("/") or not path.exists():
        return None
    environment = {"LD_PRELOAD": str(path), **WATCH_OPTIONS}
    tried = subprocess.run([sys.executable, "-S", "-E", "-c", ""], env=environment, capture_output=True)
    return path if tried.returncode == 0 else None


@cache
def folder() -> Path:
    """Where libraries are kept between runs; only this user may write there."""
    path = Path(tempfile.gettempdir()) / f"tcw-host-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o022:
        path = Path(tempfile.mkdtemp(prefix="tcw-host-"))
    return path


def library(source: Path, watch: str = "") -> tuple[Path, list[str]]:
    """Compile once per content of the sources, for a watch or none. Returns (the library, the names of its kernels)."""
    text = source.read_text(encoding="utf-8")
    names = ENTRY.findall(re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S))
    if not names:
        raise HostError(f'{source.name} has no extern "C" __global__ void NAME(')
    unit = "\n".join([
        '#include "cuda_on_host.h"',
        f'#line 1 "{source.name}"',
        re.sub(r"\bextern(\s+)__shared__\b", r"extern\1TCW_DYNAMIC_SHARED", text),
        *(f"TCW_HOST_ENTRY({name})" for name in names),
    ])  # fmt: skip
    includes = [HERE, KERNELS / "include", source.resolve().parent]
    options = OPTIONS + (WATCHES[watch][0] if watch else [])
    headers = [f for path in includes for pattern in ("*.h", "*.cuh") for f in sorted(path.glob(pattern))]
    parts = [unit, version(), *options, *(f.read_text(encoding="utf-8") for f in headers)]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    built = folder() / f"{key}.so"  # wherever the source is: a test's own lies elsewhere each time
    if not (built.exists() and built.with_suffix(".shared").exists()):
        build(unit, [*options, *(f"-I{path}" for path in includes)], built)
    return built, names


def build(unit: str, options: list[str], built: Path) -> None:
    """Compile `unit` into `built`, with a list of its shared variables beside it. What is KEPT long enough goes."""
    for old in folder().glob("*.*"):
        with contextlib.suppress(FileNotFoundError):
            if old.stat().st_mtime < time.time() - KEPT:
                old.unlink()
    with tempfile.TemporaryDirectory(dir=folder()) as work:
        code, made, listed = (Path(work) / name for name in ("unit.cpp", "unit.so", "unit.shared"))
        code.write_text(unit, encoding="utf-8")
        run = subprocess.run([str(compiler()), *options, str(code), "-o", str(made)], capture_output=True, text=True)
        if run.returncode:
            raise HostError(f"{compiler()} cannot compile the kernel:\n{run.stderr[:4000]}")
        symbols = subprocess.run(["nm", "-S", str(made)], capture_output=True, text=True, check=True).stdout
        listed.write_text(variables(symbols), encoding="ascii")
        listed.replace(built.with_suffix(".shared"))
        made.replace(built)


def variables(symbols: str) -> str:
    """Lines of "offset size" of the variables static in a kernel's functions: a kernel has none but the shared ones."""
    rows = [line.split() for line in symbols.splitlines()]
    arena = next(int(row[0], 16) for row in rows if row[-1] == "tcw_arena")
    found = [row for row in rows if len(row) == 4 and row[2] in "bBdD" and row[3].startswith("_ZZ")]
    return "".join(f"{int(row[0], 16) - arena} {int(row[1], 16)}\n" for row in found if "8tcw_host" not in row[3])


class Variable(ctypes.Structure):
    """TcwVariable of fibers.h."""

    _fields_ = (("offset", ctypes.c_int64), ("size", ctypes.c_uint64))


def table(built: Path) -> ctypes.Array:
    """What a library's tcw_variables is to hold."""
    lines = built.with_suffix(".shared").read_text(encoding="ascii").splitlines()
    if len(lines) > 256:
        raise HostError("more than 256 shared variables")
    return (Variable * 256)(*(Variable(*map(int, line.split())) for line in lines))


def load(built: Path) -> ctypes.CDLL:
    """Load a library and tell it where its shared variables are."""
    loaded = ctypes.CDLL(str(built))
    filled = table(built)
    ctypes.memmove(ctypes.addressof((Variable * 256).in_dll(loaded, "tcw_variables")), filled, ctypes.sizeof(filled))
    return loaded
