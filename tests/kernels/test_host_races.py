"""A missing barrier shows: the result depends on which thread runs first, and a sanitizer names both sides."""

from collections.abc import Callable

import pytest
import torch

from tests.kernels.host import HostError, HostModule

# Each thread hands its number on to the next, round the block.
BARRIERS = r"""
#include "tcw.cuh"
extern __shared__ __align__(16) u8 shared[];

enum Between { NOTHING, VOTE, WARP_BARRIER, BLOCK_BARRIER };

template <Between BETWEEN>
DEVICE void hand_on(u32* out) {
    u32* place = reinterpret_cast<u32*>(shared);
    const u32 i = threadIdx.x, n = blockDim.x;
    for (u32 round = 0; round < 3; ++round) {
        place[n * (round % 2) + i] = i + round;
        if (BETWEEN == VOTE) __ballot_sync(ALL, 1);
        if (BETWEEN == WARP_BARRIER) __syncwarp();
        if (BETWEEN == BLOCK_BARRIER) __syncthreads();
        out[n * blockIdx.x + i] = place[n * (round % 2) + (i + 1) % n] - round;
    }
}
extern "C" __global__ void by_nothing(u32* out) { hand_on<NOTHING>(out); }
extern "C" __global__ void by_vote(u32* out) { hand_on<VOTE>(out); }
extern "C" __global__ void by_warp(u32* out) { hand_on<WARP_BARRIER>(out); }
extern "C" __global__ void by_block(u32* out) { hand_on<BLOCK_BARRIER>(out); }

// The halves of a warp hand on by themselves.
extern "C" __global__ void by_halves(u32* out) {
    u32* place = reinterpret_cast<u32*>(shared);
    const u32 i = threadIdx.x, half = i & 16;
    place[i] = i;
    __syncwarp(0xFFFFu << half);
    out[i] = place[half + (i + 1) % 16];
}
extern "C" __global__ void count(u32* out) {
    atomicAdd(out, 1);
    atomicMax(out + 1, threadIdx.x);
}
extern "C" __global__ void count_badly(u32* out) { out[0] += 1; }
"""

Load = Callable[..., HostModule]


@pytest.fixture(scope="module")
def load(host: Load, tmp_path_factory: pytest.TempPathFactory) -> Load:
    source = tmp_path_factory.mktemp("barriers") / "kernel.cu"
    source.write_text(BARRIERS)
    return lambda **options: host(source, **options)


@pytest.fixture
def watched(load: Load) -> HostModule:
    return load(races=True)


def is_right(module: HostModule, name: str, threads: int) -> bool:
    out = torch.zeros(2, threads, dtype=torch.int32)
    module.launch(name, 2, threads, [out], shared=8 * threads)
    wanted = (torch.arange(threads, dtype=torch.int32) + 1) % threads
    return all(torch.equal(row, wanted) for row in out)


@pytest.mark.parametrize(
    ("name", "threads", "always"),
    [("by_nothing", 32, False), ("by_warp", 32, True), ("by_warp", 96, False), ("by_block", 96, True)],
)
def test_an_order_shows_a_missing_barrier(load: Load, name: str, threads: int, always: bool) -> None:
    right = {is_right(load(order=order), name, threads) for order in ("forward", "reverse", 0, 1)}
    assert right == {True} if always else False in right


@pytest.mark.parametrize(("name", "threads"), [("by_warp", 32), ("by_block", 64)])
def test_what_is_ordered_is_no_race(watched: HostModule, name: str, threads: int) -> None:
    for _ in range(2):
        assert is_right(watched, name, threads)


def test_other_orders_are_no_race(watched: HostModule) -> None:
    out = torch.zeros(32, dtype=torch.int32)
    watched.launch("by_halves", 1, 32, [out], shared=128)
    assert out.tolist() == [*range(1, 16), 0, *range(17, 32), 16]
    out.zero_()
    watched.launch("count", 2, 64, [out])
    assert out[:2].tolist() == [128, 63]


@pytest.mark.parametrize(
    ("name", "threads", "says"),
    [
        ("by_nothing", 32, r"race.*Write of size 4 .*\(1, 0, 0\).*kernel.cu:12.*Previous read .*\(0, 0, 0\).*:16"),
        ("by_vote", 32, r"race.*Read of size 4 .*\(0, 0, 0\).*kernel.cu:16.*Previous write .*\(1, 0, 0\).*:12"),
        ("by_warp", 64, r"race.*\(32, 0, 0\).*kernel by_warp, block \(0, 0, 0\), thread"),
        ("count_badly", 32, r"race.*kernel.cu:36.*kernel count_badly"),
    ],
)  # fmt: skip
def test_a_race_is_named(watched: HostModule, name: str, threads: int, says: str) -> None:
    out = torch.zeros(2 * threads, dtype=torch.int32)
    with pytest.raises(HostError, match=f"(?s){says}"):
        watched.launch(name, 1, threads, [out], shared=8 * threads)
