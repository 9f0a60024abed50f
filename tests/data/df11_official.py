"""The loader of the package dfloat11 0.5.0 on the CPU: its own code, and the slow kernel in place of CuPy's."""

import contextlib
import ctypes
import importlib
import sys
import types
import warnings
from pathlib import Path

import numpy as np


def import_official(reference):
    """Import `dfloat11.dfloat11` with stubs for the modules it lacks here, and leave no stub behind."""

    def kernel(grid, block, shared_mem, args):
        luts, codes, rest, positions, gaps, out, rows, n_bytes, n = args
        blocks = -(-n_bytes // 4096)

        def array(pointer, size, dtype=np.uint8):
            return np.frombuffer(ctypes.string_at(pointer, size * np.dtype(dtype).itemsize), dtype)

        assert grid == (blocks,)
        assert block == (512,)
        assert shared_mem <= 48 * 1024
        words = reference.decode(
            array(luts, 256 * rows).reshape(rows, 256), array(codes, n_bytes), array(rest, n),
            array(positions, blocks + 1, np.uint32), array(gaps, 320 * blocks),
        )  # fmt: skip
        ctypes.memmove(out, words.ctypes.data, 2 * n)

    cupy = types.ModuleType("cupy")
    cupy.RawModule = lambda path: types.SimpleNamespace(get_function=lambda name: kernel)
    cupy.cuda = types.SimpleNamespace(Device=lambda index: contextlib.nullcontext())
    resources = types.ModuleType("pkg_resources")
    resources.resource_filename = lambda package, name: str(Path(package) / name)
    stubs = {"cupy": cupy, "pkg_resources": resources}
    kept = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("dfloat11.dfloat11")
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
        for name in [n for n in sys.modules if n.partition(".")[0] == "dfloat11"]:
            del sys.modules[name]
