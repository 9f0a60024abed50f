"""The process in which kernels run under a sanitizer: reads launches from its input until that ends.

A message is its length in 8 bytes, a JSON header, and the bytes of the buffers that the header counts. Each buffer gets
memory of its own, of exactly its size, so that what is before and after it is forbidden. This file imports nothing of
the package: what is loaded under the sanitizer starts slowly.
"""

import ctypes
import json
import sys
from typing import Any, BinaryIO

LINE = 64  # bytes: memory is given out at multiples of it


def read(stream: BinaryIO) -> tuple[dict[str, Any], list[bytes]] | None:
    """One message: (header, buffers); None at the end."""
    size = stream.read(8)
    if len(size) < 8:
        return None
    header = json.loads(stream.read(int.from_bytes(size, "little")))
    return header, [stream.read(n) for n in header["sizes"]]


def write(stream: BinaryIO, header: dict[str, Any], buffers: list[bytes]) -> None:
    """Send one message."""
    text = json.dumps({**header, "sizes": [len(b) for b in buffers]}).encode()
    stream.write(len(text).to_bytes(8, "little") + text)
    for b in buffers:
        stream.write(b)
    stream.flush()


class Memory:
    """Buffers as the sanitizer sees them."""

    def __init__(self) -> None:
        self.c = ctypes.CDLL(None)
        self.given: list[ctypes.c_void_p] = []

    def put(self, data: bytes, offset: int) -> int:
        """Copy to new memory whose address is `offset` past a multiple of LINE. Returns the address."""
        block = ctypes.c_void_p()
        if self.c.posix_memalign(ctypes.byref(block), ctypes.c_size_t(LINE), ctypes.c_size_t(offset + len(data))):
            raise MemoryError
        self.given.append(block)
        address = int(block.value or 0) + offset
        ctypes.memmove(address, data, len(data))
        if hasattr(self.c, "__asan_poison_memory_region"):
            self.c["__asan_poison_memory_region"](block, ctypes.c_size_t(offset))
        return address

    def free(self) -> None:
        """Give all of it back."""
        for block in self.given:
            self.c.free(block)
        self.given.clear()


def library(path: str, table: bytes) -> ctypes.CDLL:
    """Load a library and tell it where its shared variables are."""
    loaded = ctypes.CDLL(path)
    ctypes.memmove(ctypes.addressof(ctypes.c_char.in_dll(loaded, "tcw_variables")), table, len(table))
    return loaded


def serve(request: dict[str, Any], buffers: list[bytes], loaded: ctypes.CDLL, stacks: int) -> tuple[str, list[bytes]]:
    """Run one launch. Returns (what went wrong, the buffers as the kernel left them)."""
    memory = Memory()
    addresses = [memory.put(data, offset) for data, offset in zip(buffers, request["offsets"], strict=True)]
    values = []
    for given in request["values"]:
        raw = bytes.fromhex(given) if isinstance(given, str) else (addresses[given[0]] + given[1]).to_bytes(8, "little")
        values.append(ctypes.create_string_buffer(raw, len(raw)))
    pointers = (ctypes.c_void_p * (len(values) + 1))(*(ctypes.addressof(v) for v in values))
    launch = bytearray.fromhex(request["launch"])
    launch[-8:] = stacks.to_bytes(8, "little")
    message = ctypes.create_string_buffer(1024)
    run = loaded["tcw_run_" + request["kernel"]]
    run(ctypes.create_string_buffer(bytes(launch), len(launch)), pointers, message, ctypes.c_size_t(1024))
    left = [ctypes.string_at(a, len(b)) for a, b in zip(addresses, buffers, strict=True)]
    memory.free()
    return message.value.decode(), left


def main() -> None:
    """Serve until the input ends, or until a kernel fails: its threads are left where they were."""
    loaded: dict[str, ctypes.CDLL] = {}
    stacks = 0
    while (message := read(sys.stdin.buffer)) is not None:
        request, buffers = message
        path = request["library"]
        if path not in loaded:
            loaded[path] = library(path, bytes.fromhex(request["table"]))
        if not stacks:
            loaded[path].tcw_stacks.restype = ctypes.c_void_p
            stacks = loaded[path].tcw_stacks() or 0
        failed, left = serve(request, buffers, loaded[path], stacks)
        write(sys.stdout.buffer, {"failed": failed}, left)
        if failed:
            return


if __name__ == "__main__":
    main()
