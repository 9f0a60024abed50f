"""The processor's stand-in for a GPU does what CUDA's words say; everything else about kernels is tested on it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.kernels.host import HostModule

WORDS = r"""
#include "tcw.cuh"

extern "C" __global__ void words(const u32* x, const u32* y, const u32* s, u32* out) {
    const u32 i = threadIdx.x, a = x[i], b = y[i], c = s[i];
    u32* o = out + 16 * i;
    o[0] = __byte_perm(a, b, c);
    o[1] = __funnelshift_l(a, b, c);
    o[2] = __funnelshift_r(a, b, c);
    o[3] = __funnelshift_lc(a, b, c);
    o[4] = __funnelshift_rc(a, b, c);
    o[5] = __popc(a);
    o[6] = __clz(a);
    o[7] = __ffs(a);
    o[8] = __brev(a);
    o[9] = __popcll(static_cast<u64>(a) << 32 | b);
    o[10] = min(a, b);
    o[11] = static_cast<u32>(max(static_cast<i32>(a), static_cast<i32>(b)));
    o[12] = __float_as_uint(__uint_as_float(a));
    o[13] = __ldg(y + i);
    o[14] = min(static_cast<i32>(a), static_cast<i32>(b));
    o[15] = a & 1 ? 0x7FC0u : to_bf16(from_bf16(a >> 16));
}

extern "C" __global__ void lanes(const u32* in, u32* out) {
    const u32 i = threadIdx.x, v = in[i];
    u32* o = out + 12 * i;
    o[0] = __shfl_sync(ALL, v, i * 7 + 3);
    o[1] = __shfl_up_sync(ALL, v, 5);
    o[2] = __shfl_down_sync(ALL, v, 5);
    o[3] = __shfl_xor_sync(ALL, v, 9);
    o[4] = __ballot_sync(ALL, v & 1);
    o[5] = __any_sync(ALL, v == 0);
    o[6] = __all_sync(ALL, v != 0);
    o[7] = warp_exclusive_sum(v);
    o[8] = __float_as_uint(__shfl_down_sync(ALL, __uint_as_float(v), 1));
    const u32 half = lane_id() < 16 ? 0xFFFFu : 0xFFFF0000u;
    o[9] = __ballot_sync(half, v & 1);
    o[10] = lane_id() % 3 ? 0 : __shfl_sync(0x49249249u, v, 30);
    o[11] = warp_id();
}

extern "C" __global__ void product(const u32* a, const u32* b, float* d, i32 by_shuffles) {
    const u32 i = threadIdx.x;
    const u32 left[4] = {a[4 * i], a[4 * i + 1], a[4 * i + 2], a[4 * i + 3]}, right[2] = {b[2 * i], b[2 * i + 1]};
    float sum[4] = {d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]};
    if (by_shuffles) {
        mma_bf16_by_shuffles(sum, left, right);
    } else {
        mma_bf16(sum, left, right);
    }
    for (u32 k = 0; k < 4; ++k) d[4 * i + k] = sum[k];
}

extern __shared__ __align__(16) u8 shared[];

template <int N>
DEVICE u32 left_by_others(u32 mine) {
    __shared__ u32 place[N];
    const u32 found = place[threadIdx.x % N];
    place[threadIdx.x % N] = mine;
    return found;
}

extern "C" __global__ void __launch_bounds__(64) leftovers(u32* out) {
    u32* dynamic = reinterpret_cast<u32*>(shared);
    u32* o = out + 2 * (blockIdx.x * blockDim.x + threadIdx.x);
    o[0] = left_by_others<64>(1);
    o[1] = dynamic[threadIdx.x];
    dynamic[threadIdx.x] = 2;
}

extern "C" __global__ void copies(const uint4* in, uint4* out, i32 wait) {
    uint4* place = reinterpret_cast<uint4*>(shared);
    const u32 i = threadIdx.x;
    copy_async(place + i, in + i);
    copy_commit();
    copy_async(place + 32 + i, in + 32 + i);
    copy_commit();
    if (wait) copy_wait<1>();
    __syncwarp();
    out[i] = place[31 - i];
    copy_wait<0>();
    __syncwarp();
    out[32 + i] = place[63 - i];
}

extern "C" __global__ void places(u32* out, u32* total) {
    const u32 thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const u32 block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
    atomicAdd(total, 1);
    atomicMax(total + 1, thread);
    atomicOr(total + 2, 1u << (thread % 32));
}

extern "C" __global__ void numbers(i32 a, u64 b, float c, const u8* none, u64* out) {
    out[0] = a;
    out[1] = b;
    out[2] = __float_as_uint(c);
    out[3] = none == nullptr;
}
"""

Load = Callable[..., HostModule]


@pytest.fixture(scope="module")
def load(host: Load, tmp_path_factory: pytest.TempPathFactory) -> Load:
    source = tmp_path_factory.mktemp("words") / "kernel.cu"
    source.write_text(WORDS)
    return lambda **options: host(source, **options)


def words(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.uint32).view(np.int32))


def back(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().view(np.uint32).astype(object)


def byte_perm(a: int, b: int, select: int) -> int:
    data = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    chosen = []
    for k in range(4):
        nibble = select >> 4 * k & 15
        byte = data[nibble & 7]
        chosen.append(0xFF * (byte >> 7) if nibble & 8 else byte)
    return int.from_bytes(bytes(chosen), "little")


def signed(a: int) -> int:
    return a - (a >> 31 << 32)


def by_the_book(a: int, b: int, c: int) -> list[int]:
    both, ones = b << 32 | a, 0xFFFF_FFFF
    return [
        byte_perm(a, b, c),
        both << (c & 31) >> 32 & ones,
        both >> (c & 31) & ones,
        both << min(c, 32) >> 32 & ones,
        both >> min(c, 32) & ones,
        a.bit_count(),
        32 - a.bit_length(),
        (a & -a).bit_length(),
        int(f"{a:032b}"[::-1], 2),
        both.bit_count(),
        min(a, b),
        max(signed(a), signed(b)) & ones,
        a,
        b,
        min(signed(a), signed(b)) & ones,
        0x7FC0 if a & 1 else a >> 16,
    ]


def test_words_of_arithmetic(load: Load) -> None:
    rng = np.random.default_rng(1)
    x, y, s = rng.integers(0, 1 << 32, (3, 256), dtype=np.uint32)
    x[:8] = 0, 0xFFFF_FFFF, 0x8000_0000, 1, 2, 0x7F80_0000, 0x7FC1_0000, 0xFF81_0000
    x[8:] &= ~np.uint32(0x0080_0000)  # no NaN: to_bf16 makes them quiet
    x[7] |= 0x0040_0000
    s[:40] = np.arange(40)
    out = torch.zeros(256, 16, dtype=torch.int32)
    load().launch("words", 1, 256, [words(x), words(y), words(s), out])
    expected = [by_the_book(*map(int, row)) for row in zip(x, y, s, strict=True)]
    np.testing.assert_array_equal(back(out), np.array(expected, dtype=object))


@pytest.mark.parametrize("order", ["forward", "reverse", 1])
def test_shuffles_and_votes(load: Load, order: str | int) -> None:
    values = np.random.default_rng(2).integers(0, 1 << 20, 64, dtype=np.uint32)
    values[40] = 0
    out = torch.zeros(64, 12, dtype=torch.int32)
    load(order=order).launch("lanes", 1, 64, [words(values), out])
    got = back(out)
    for warp in range(2):
        v = values[32 * warp : 32 * warp + 32].tolist()
        odd = sum((x & 1) << i for i, x in enumerate(v))
        for i in range(32):
            expected = [
                v[(i * 7 + 3) % 32],
                v[i - 5] if i >= 5 else v[i],
                v[i + 5] if i + 5 < 32 else v[i],
                v[i ^ 9],
                odd,
                int(0 in v),
                int(0 not in v),
                sum(v[:i]),
                v[min(i + 1, 31)],
                odd & (0xFFFF if i < 16 else 0xFFFF_0000),
                0 if i % 3 else v[30],
                warp,
            ]
            np.testing.assert_array_equal(got[32 * warp + i], np.array(expected, dtype=object), f"lane {i}")


def fragments(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each lane holds (tcw.cuh) of a [16, 16] and b [16, 8], both the bits of BF16: words [32, 4] and [32, 2]."""

    def pair(low: np.uint16, high: np.uint16) -> int:
        return int(low) | int(high) << 16

    left, right = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            row, k = g + 8 * (i % 2), 2 * t + 8 * (i // 2)
            left[lane, i] = pair(a[row, k], a[row, k + 1])
        for i in range(2):
            right[lane, i] = pair(b[2 * t + 8 * i, g], b[2 * t + 8 * i + 1, g])
    return left, right


@pytest.mark.parametrize("by_shuffles", [0, 1])
def test_matrix_product(load: Load, by_shuffles: int) -> None:
    rng = np.random.default_rng(3)
    a, b = (
        (rng.standard_normal(s).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) for s in ((16, 16), (16, 8))
    )
    start = rng.standard_normal((32, 4)).astype(np.float32)
    left, right = fragments(a, b)
    d = torch.from_numpy(start.copy())
    load(order=5).launch("product", 1, 32, [words(left), words(right), d, np.int32(by_shuffles)])
    exact = np.matmul(*((m.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for m in (a, b)))
    for lane in range(32):
        g, t = divmod(lane, 4)
        wanted = exact[[g, g, g + 8, g + 8], [2 * t, 2 * t + 1] * 2] + start[lane]
        np.testing.assert_allclose(d[lane].numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_matrix_product_is_the_same_in_both_ways(load: Load) -> None:
    rng = np.random.default_rng(4)
    left, right = (words(rng.integers(0, 1 << 32, s, dtype=np.uint32) & 0xBFFF_BFFF) for s in ((32, 4), (32, 2)))
    results = []
    for by_shuffles in (0, 1):
        d = torch.ones(32, 4)
        load().launch("product", 1, 32, [left, right, d, np.int32(by_shuffles)])
        results.append(d.view(torch.int32))
    assert torch.equal(*results)


def test_shared_memory_is_poisoned_before_each_block(load: Load) -> None:
    out = torch.zeros(3, 64, 2, dtype=torch.int32)
    load().launch("leftovers", 3, 64, [out], shared=256)
    assert set(back(out).ravel()) == {0xA5A5A5A5}


ORDERS = ["forward", "reverse", 0, 1]


def test_copies_come_when_they_are_waited_for(load: Load) -> None:
    source = torch.arange(256, dtype=torch.int32)
    wanted = torch.cat([source[:128].view(32, 4).flip(0), source[128:].view(32, 4).flip(0)])
    got = [torch.zeros(64, 4, dtype=torch.int32) for _ in range(2)]
    for wait in (0, 1):
        load().launch("copies", 1, 32, [source, got[wait], np.int32(wait)], shared=1024)
    assert torch.equal(got[1], wanted)
    assert set(back(got[0][:16]).ravel()) == {0xA5A5A5A5}  # what comes from threads that have not run yet
    assert torch.equal(got[0][32:], wanted[32:])


@pytest.mark.parametrize("order", ORDERS)
def test_grids_and_atomics(load: Load, order: str | int) -> None:
    out, total = torch.zeros(24, 60, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    load(order=order).launch("places", (2, 3, 4), (5, 4, 3), [out, total])
    assert torch.equal(out, torch.arange(24, dtype=torch.int32)[:, None] * 1000 + torch.arange(60, dtype=torch.int32))
    assert total.tolist() == [24 * 60, 59, -1]


def test_nothing_is_launched_without_blocks(load: Load) -> None:
    out, total = torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    load().launch("places", 0, 32, [out, total])
    load().launch("places", (1, 0, 1), 32, [out, total])
    assert total.tolist() == [0, 0, 0]


def test_numbers_by_value(load: Load) -> None:
    out = torch.zeros(4, dtype=torch.int64)
    load().launch("numbers", 1, 1, [np.int32(-5), np.uint64(1 << 63), np.float32(1.5), None, out])
    assert out.tolist() == [-5, -(1 << 63), 0x3FC00000, 1]
