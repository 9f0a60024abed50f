"""What a kernel must not do is an error that names it, the block and the thread: never a hang, never a crash."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.kernels.host import HostError, HostModule

WRONG = r"""
#include "tcw.cuh"
extern __shared__ __align__(16) u8 shared[];

extern "C" __global__ void some_leave() {
    if (threadIdx.x >= 5) return;
    __syncwarp();
}
extern "C" __global__ void two_places() {
    if (threadIdx.x < 16) {
        __syncwarp();
    } else {
        __ballot_sync(ALL, 1);
    }
}
extern "C" __global__ void not_in_mask() { __syncwarp(0xFF00u); }
extern "C" __global__ void reads_outside_mask() {
    if (threadIdx.x < 16) __shfl_down_sync(0xFFFFu, threadIdx.x, 1);
}
extern "C" __global__ void half_barrier() {
    if (threadIdx.x < 32) __syncthreads();
}
extern "C" __global__ void two_barriers() {
    if (threadIdx.x == 3) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}
extern "C" __global__ void small_block() { __syncwarp(); }
extern "C" __global__ void endless(const volatile u32* flag) {
    while (*flag == 0) continue;
}
extern "C" __global__ void nowhere(u32* to) {
    if (threadIdx.x == 7) to[0] = 1;
}
extern "C" __global__ void by_zero(u32* n) { n[0] = 7 / n[0]; }
extern "C" __global__ void deep(u32* out) {
    volatile u8 much[1 << 20];
    for (u32 i = 0; i < 1 << 20; i += 64) much[i] = 1;
    out[0] = much[0];
}

extern "C" __global__ void move(const u32* in, u32* out, i32 by, i32 to) {
    const i32 i = static_cast<i32>(threadIdx.x);
    out[i + to] = in[i + by];
}
extern "C" __global__ void own(u32* out, i32 at, i32 writes) {
    if (threadIdx.x) return;
    u8* place = shared + at;
    if (writes) place[0] = 1;
    out[0] = place[0];
}
extern "C" __global__ void fixed(u32* out, i32 at) {
    __shared__ u32 place[8];
    place[threadIdx.x] = 5;
    __syncwarp(0xFFu);
    out[0] = place[at];
}
extern "C" __global__ void wide(const u8* in, u32* out, i32 at) {
    out[0] = reinterpret_cast<const uint4*>(in + at)->x;
}
extern "C" __global__ void shift(u32* out, u32 by) { out[0] = 1u << by; }
"""

WORD = torch.zeros(4, dtype=torch.int32)
NUMBERS = torch.arange(64, dtype=torch.int32)
Load = Callable[..., HostModule]


@pytest.fixture(scope="module")
def load(host: Load, tmp_path_factory: pytest.TempPathFactory) -> Load:
    source = tmp_path_factory.mktemp("wrong") / "kernel.cu"
    source.write_text(WRONG)
    return lambda **options: host(source, **options)


@pytest.fixture
def wrong(load: Load) -> HostModule:
    return load(seconds=0.2)


@pytest.fixture
def watched(load: Load) -> HostModule:
    return load(sanitize=True)


@pytest.mark.parametrize(
    ("name", "threads", "says"),
    [
        ("some_leave", 32, r"\(0, 0, 0\): waits at __syncwarp \(kernel.cu:7.* \(5, 0, 0\), which has ended"),
        ("two_places", 32, r"waits at __syncwarp .*:11, mask ffffffff.* \(16, 0, 0\), which waits at __ballot_sync"),
        ("not_in_mask", 32, r"mask 0000ff00 lacks lane 0"),
        ("reads_outside_mask", 32, r"thread \(15, 0, 0\): __shfl_down_sync .* lane 16, which mask 0000ffff lacks"),
        ("half_barrier", 64, r"thread \(0, 0, 0\): waits at __syncthreads .* for thread \(32, 0, 0\), which has ended"),
        ("two_barriers", 32, r"kernel.cu:27\) for thread \(3, 0, 0\), which waits at __syncthreads \(kernel.cu:25"),
        ("small_block", 20, r"mask ffffffff names lanes that the block lacks"),
    ],
)  # fmt: skip
def test_threads_that_do_not_meet(wrong: HostModule, name: str, threads: int, says: str) -> None:
    with pytest.raises(HostError, match=rf"kernel {name}, block \(0, 0, 0\).*{says}"):
        wrong.launch(name, 2, threads, [])


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("endless", [WORD], r"thread \(0, 0, 0\): is still running"),
        ("nowhere", [None], r"thread \(7, 0, 0\): reads or writes at"),
        ("by_zero", [WORD], "divides by zero"),
        ("deep", [WORD], "reads or writes at"),
        ("own", [WORD, np.int32(16), np.int32(1)], "writes past its 16 bytes of dynamic shared memory"),
        ("own", [WORD, np.int32(-1), np.int32(1)], "writes before its dynamic shared memory"),
        ("own", [WORD, np.int32(500_000), np.int32(1)], r"thread \(0, 0, 0\): reads or writes at"),
        ("own", [WORD, np.int32(-500_000), np.int32(1)], r"thread \(0, 0, 0\): reads or writes at"),
    ],
)
def test_the_process_lives_on(wrong: HostModule, name: str, args: list[object], says: str) -> None:
    for _ in range(2):
        with pytest.raises(HostError, match=says):
            wrong.launch(name, 1, 32, args, shared=16)
    out = torch.zeros(32, dtype=torch.int32)
    wrong.launch("move", 1, 32, [torch.arange(32, dtype=torch.int32), out, np.int32(0), np.int32(0)])
    assert torch.equal(out, torch.arange(32, dtype=torch.int32))


@pytest.mark.parametrize("by", [-1, 1, 17])
@pytest.mark.parametrize("writes", [False, True])
def test_next_to_a_tensor(watched: HostModule, by: int, writes: bool) -> None:
    """The tensors lie inside others, so that for the process there is something to read and to overwrite."""
    out = torch.zeros(64, dtype=torch.int32)
    moves = [np.int32(0 if writes else by), np.int32(by if writes else 0)]
    what = rf"(?s)AddressSanitizer.*{'WRITE' if writes else 'READ'} of size 4.*kernel move, block .*stopped"
    with pytest.raises(HostError, match=what):
        watched.launch("move", 1, 16, [NUMBERS[16:32], out[16:32], *moves])
    assert out.sum() == 0


def test_watched_kernels_give_the_same(watched: HostModule) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    watched.launch("move", 1, 16, [NUMBERS[3:19], out[5:21], np.int32(0), np.int32(0)])
    assert torch.equal(out[5:21], NUMBERS[3:19])
    assert out.sum() == NUMBERS[3:19].sum()
    watched.launch("move", 1, 8, [out[5:13], out[9:17], np.int32(0), np.int32(0)])  # what it writes it reads again
    assert torch.equal(out[5:21], torch.cat([NUMBERS[3:7], NUMBERS[3:7], NUMBERS[3:7], NUMBERS[15:19]]))


def test_threads_that_do_not_meet_are_told_from_afar(watched: HostModule) -> None:
    with pytest.raises(
        HostError, match=r"kernel some_leave, block \(0, 0, 0\), thread \(0, 0, 0\): waits at __syncwarp"
    ):
        watched.launch("some_leave", 1, 32, [])


@pytest.mark.parametrize("at", [-1, 16, 17])
@pytest.mark.parametrize("writes", [False, True])
def test_next_to_shared_memory(watched: HostModule, at: int, writes: bool) -> None:
    with pytest.raises(HostError, match=rf"(?s){'WRITE' if writes else 'READ'} of size 1.*kernel own"):
        watched.launch("own", 1, 32, [WORD, np.int32(at), np.int32(writes)], shared=16)


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("fixed", [np.int32(8)], "out of bounds|global-buffer-overflow"),
        ("wide", [np.int32(8)], "misaligned address .*requires 16 byte alignment"),
        ("shift", [np.uint32(32)], "shift exponent 32 is too large"),
    ],
)
def test_other_undefined_behaviour(watched: HostModule, name: str, args: list[object], says: str) -> None:
    right = [type(args[0])(0)]
    inputs = [torch.zeros(64, dtype=torch.uint8)] if name == "wide" else []
    out = torch.zeros(1, dtype=torch.int32)
    watched.launch(name, 1, 8, [*inputs, out, *right])
    with pytest.raises(HostError, match=says):
        watched.launch(name, 1, 8, [*inputs, out, *args])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([WORD, WORD, np.int32(0)], "takes 4 arguments, got 3"),
        ([WORD, WORD, np.int32(0), np.int64(0)], "argument 3 of move is 8 bytes of kind i, the kernel takes 4"),
        ([WORD, WORD, np.int32(0), np.float32(0)], "argument 3 of move is 4 bytes of kind f"),
        ([WORD, np.uint64(0), np.int32(0), np.int32(0)], "argument 1 of move is 8 bytes of kind i, .* of kind p"),
        ([WORD, WORD, WORD, np.int32(0)], "argument 2 of move is a pointer"),
        ([WORD, WORD, None, np.int32(0)], "argument 2 of move is a pointer"),
        ([WORD, WORD, 0, np.int32(0)], "argument 2 of move is a int: neither a tensor"),
        ([WORD, WORD, np.int16(0), np.int32(0)], "argument 2 of move is a int16"),
    ],
)
def test_wrong_arguments(wrong: HostModule, args: list[object], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        wrong.launch("move", 1, 4, args)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.zeros(4, 4, dtype=torch.int32).T, "contiguous"),
        (WORD.to("meta"), "CPU"),
        (torch.zeros(17, dtype=torch.uint8)[1:], "aligned to 4 bytes"),
    ],
)
def test_wrong_tensors(wrong: HostModule, tensor: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrong.launch("move", 1, 4, [tensor, WORD, np.int32(0), np.int32(0)])


@pytest.mark.parametrize(
    ("grid", "block", "shared", "says"),
    [
        (1, 1025, 0, "1 to 1024"),
        (1, (32, 33), 0, "1 to 1024"),
        (1, 0, 0, "1 to 1024"),
        (1, 32, 99 * 1024 + 1, "shared memory"),
        ((1, 65536), 32, 0, "too large"),
        (-1, 32, 0, "no size"),
        ((1, 1, 1, 1), 32, 0, "no size"),
    ],
)
def test_wrong_sizes(wrong: HostModule, grid: int, block: int, shared: int, says: str) -> None:
    with pytest.raises(HostError, match=says):
        wrong.launch("some_leave", grid, block, [], shared=shared)


def test_wrong_names(wrong: HostModule, host: Load, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no kernel nothing, but: some_leave, two_places"):
        wrong.launch("nothing", 1, 32, [])
    with pytest.raises(ValueError, match="forward, reverse or a seed"):
        host("any", order="sideways")
    source = tmp_path / "kernel.cu"
    source.write_text('// extern "C" __global__ void hidden()\n')
    with pytest.raises(HostError, match=r"kernel\.cu has no extern"):
        host(source)
    source.write_text('extern "C" __global__ void k() { no_such_word(); }\n')
    with pytest.raises(HostError, match=r"(?s)cannot compile.*kernel.cu:1:.*no_such_word"):
        host(source)
