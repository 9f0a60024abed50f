"""How the codecs' inner loops are compiled, reach memory, and spread over cores.

A kernel is a plain loop that Numba compiles without the interpreter lock; `spread` runs it over ranges of work on one
shared pool of threads. Compiled code is cached on disk, so only the first run after an install waits for it.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from tcw.cores import cores

# numba fills these registries at the first compilation, and two threads that do so at once break each other; here the
# import lock lets one thread through
cpu_target.typing_context.refresh()
cpu_target.target_context.refresh()

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_threads = 0


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a loop at its first call; the result is cached on disk where any cache folder can be written."""
    try:
        return njit(function, nogil=True, cache=True, error_model="numpy")
    except RuntimeError:  # neither the package nor the user's cache folder is writable: compile for this process only
        return njit(function, nogil=True, error_model="numpy")


def inline(function: Callable[..., Any]) -> Any:
    """Compile a small function into the kernels that call it."""
    return njit(function, nogil=True, error_model="numpy", inline="never")


def _unaligned(bits: int, write: bool) -> Any:
    """Make an intrinsic that loads or stores `bits` little-endian bits at any byte offset of an array."""
    unsigned = types.uint64 if bits == 64 else types.uint32

    def address(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
        return builder.bitcast(builder.gep(start, [args[1]]), ir.IntType(bits).as_pointer())

    def load(typing: Any, array: Any, offset: Any) -> Any:
        """Read at `array`'s byte `offset`; the caller has made sure that it lies inside."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(address(context, builder, signature, args), align=1)

        return unsigned(array, types.int64), generate

    def store(typing: Any, array: Any, offset: Any, value: Any) -> Any:
        """Write at `array`'s byte `offset`; the caller has made sure that it lies inside."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[2], address(context, builder, signature, args), align=1)
            return context.get_dummy_value()

        return types.void(array, types.int64, unsigned), generate

    return intrinsic(store if write else load)


load_u32 = _unaligned(32, write=False)
load_u64 = _unaligned(64, write=False)
store_u32 = _unaligned(32, write=True)
store_u64 = _unaligned(64, write=True)


@intrinsic
def prefetch(typing: Any, array: Any, offset: Any) -> Any:
    """Ask for the cache line at `array`'s byte `offset` ahead of its use; any offset is harmless."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.gep(builder.bitcast(data, ir.IntType(8).as_pointer()), [args[1]])
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, number(0), number(3), number(1)])  # to read, keep in all caches, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@inline
def prefetch_range(array, first, end):  # type: ignore[no-untyped-def]
    """Ask for bytes first..end of an array: their loads, or stores, will then not wait for memory."""
    for line in range(first, end, 64):
        prefetch(array, line)


def readonly(array: np.ndarray) -> np.ndarray:
    """A contiguous view that kernels cannot write to. Numba compiles writable arrays apart: inputs are always this."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def threads() -> int:
    """How many threads `spread` uses: what `set_threads` said, else the cores this process may run on."""
    return _threads or cores()


def set_threads(count: int) -> None:
    """Use `count` threads from now on; 0 means one for each core. For processes that share a machine."""
    global _pool, _threads
    with _lock:
        _threads = max(0, count)
        _pool = None  # running work keeps the old pool alive until it is done


def _shared_pool() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(threads(), thread_name_prefix="tcw-codec")
        return _pool


def _forget_pool() -> None:
    """A forked child has the parent's pool but none of its threads."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def spread(work: Callable[[int, int], Any], items: int) -> list[Any]:
    """Call `work(first, last)` over ranges that cover 0..items, on all cores; results in order of the ranges.

    Small inputs (one item, or one thread) run in the caller. `work` must not call `spread`.
    """
    count = min(items, 1 if threads() == 1 else 4 * threads())
    if count <= 1:
        return [work(0, items)] if items else []
    edges = [items * k // count for k in range(count + 1)]
    return list(_shared_pool().map(work, edges[:-1], edges[1:]))
