// What every kernel of tcw includes: names of integers, and the few instructions that CUDA C++ has no words for.
//
// NVRTC compiles this with no other header. With TCW_HOST it is compiled for a processor: the tests run kernels there
// (tests/kernels/host), which define the words of CUDA (threadIdx, __syncwarp, __shfl_sync ...) as functions.
#pragma once

#ifdef TCW_HOST
#include "cuda_on_host.h"
#endif

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

#define DEVICE static __device__ __forceinline__

constexpr u32 WARP = 32;
constexpr u32 ALL = 0xFFFFFFFFu;

DEVICE u32 lane_id() { return threadIdx.x & (WARP - 1); }
DEVICE u32 warp_id() { return threadIdx.x / WARP; }

// Sum of `value` over the lanes before this one; all 32 lanes take part.
DEVICE u32 warp_exclusive_sum(u32 value) {
    u32 sum = value;
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) {
        const u32 other = __shfl_up_sync(ALL, sum, step);
        if (lane_id() >= step) sum += other;
    }
    return sum - value;
}

// 16 bytes that are read once: they do not push others out of the cache. `from` is a multiple of 16.
DEVICE uint4 load_once(const uint4* from) {
#ifdef TCW_HOST
    return *from;
#else
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
#endif
}

DEVICE u32 load_once(const u32* from) {
#ifdef TCW_HOST
    return *from;
#else
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(from));
    return v;
#endif
}

// Copy 16 bytes from global to shared memory in the background; both are multiples of 16.
// The copy is there after copy_wait() in the thread that asked for it, and a barrier for the others.
DEVICE void copy_async(void* to_shared, const void* from_global) {
#if defined(TCW_HOST)
    tcw_host::copy_async(to_shared, from_global);
#elif __CUDA_ARCH__ < 800
    *static_cast<uint4*>(to_shared) = *static_cast<const uint4*>(from_global);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"
                 :
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(to_shared))), "l"(from_global)
                 : "memory");
#endif
}

DEVICE void copy_commit() {
#if defined(TCW_HOST)
    tcw_host::copy_commit();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Wait until at most `PENDING` committed groups of this thread are under way.
template <int PENDING>
DEVICE void copy_wait() {
#if defined(TCW_HOST)
    tcw_host::copy_wait(PENDING);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
#endif
}

// float32 to BF16, to the nearest, ties to even; a NaN stays one.
DEVICE u16 to_bf16(float value) {
    const u32 bits = __float_as_uint(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<u16>((bits >> 16) | 0x40u);
    return static_cast<u16>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

DEVICE float from_bf16(u32 bits) { return __uint_as_float(bits << 16); }

// d += a b for one warp: a is 16 x 16 BF16, b is 16 x 8 BF16, d is 16 x 8 float32.
//
// With g = lane / 4 and t = lane % 4 a thread holds (two BF16 to a word, the lower k in the lower half)
//     a[0] row g      k 2t, 2t+1       a[1] row g + 8  k 2t, 2t+1
//     a[2] row g      k 2t+8, 2t+9     a[3] row g + 8  k 2t+8, 2t+9
//     b[0] column g   k 2t, 2t+1       b[1] column g   k 2t+8, 2t+9
//     d[0], d[1] row g, columns 2t, 2t+1;  d[2], d[3] row g + 8
// mma_bf16_by_shuffles makes the same sum of products and shuffles, in the order of k.
DEVICE void mma_bf16_by_shuffles(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    const u32 row = lane_id() & ~3u, column = (lane_id() & 3u) * 2;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
#pragma unroll
        for (u32 t = 0; t < 4; ++t) {
            const u32 top = __shfl_sync(ALL, a[2 * half], row + t), low = __shfl_sync(ALL, a[2 * half + 1], row + t);
            const u32 left = __shfl_sync(ALL, b[half], column * 4 + t);
            const u32 right = __shfl_sync(ALL, b[half], (column + 1) * 4 + t);
#pragma unroll
            for (u32 k = 0; k < 32; k += 16) {
                const float l = from_bf16((left >> k) & 0xFFFF), r = from_bf16((right >> k) & 0xFFFF);
                const float p = from_bf16((top >> k) & 0xFFFF), q = from_bf16((low >> k) & 0xFFFF);
                d[0] += p * l;
                d[1] += p * r;
                d[2] += q * l;
                d[3] += q * r;
            }
        }
    }
}

// The same with the matrix unit, which compute capability 8.0 brought.
DEVICE void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if defined(TCW_HOST)
    tcw_host::mma_bf16(d, a, b);
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_bf16_by_shuffles(d, a, b);
#endif
}
