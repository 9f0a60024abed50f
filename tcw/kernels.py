"""Kernels: the top-level kernels/ folder, importable as `tcw.kernels` (in a wheel: tcw/_kernels)."""

from tcw.folders import folder

__path__ = [str(folder("kernels"))]
