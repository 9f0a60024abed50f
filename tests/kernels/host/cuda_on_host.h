// The words of CUDA C++ for a C++17 compiler on a processor, so that tests can run the very source of a kernel.
//
// A block's threads are fibers of one system thread (fibers.h); the collectives below are where they wait for each
// other. Only what the kernels use is here. A word that is missing is a compiler error, never a silent difference.
#pragma once

#include <cstdint>
#include <cstring>

#include "launch.h"

#define __global__ __attribute__((visibility("hidden")))
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// Blocks run one after another, so shared memory is static. It is poisoned before each block (build.py finds it).
#define __shared__ static
// What `extern __shared__` becomes (build.py): the symbol that fibers.h defines.
#define TCW_DYNAMIC_SHARED __attribute__((visibility("hidden")))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static const tcw_host::Index& threadIdx = tcw_host::here.thread;
static const tcw_host::Index& blockIdx = tcw_host::here.block;
static const tcw_host::Index& blockDim = tcw_host::here.threads;
static const tcw_host::Index& gridDim = tcw_host::here.blocks;
static constexpr int warpSize = 32;

// ---- Collectives. `file` and `line` are of the call: all threads of a mask must come by the same one. ----

#define TCW_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(TCW_SITE) { tcw_host::barrier({"__syncthreads", file, line}); }

static inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, TCW_SITE) {
    tcw_host::meet({"__syncwarp", file, line}, mask, nullptr, [](tcw_host::Lanes&) {}, true);
}

namespace tcw_host {

struct Shuffle {
    unsigned bits;
    int source;  // lane, or -1 for the caller's own value
    unsigned result;
    bool stray;  // the source is not in the mask
};

static void give_shuffled(Lanes& lanes) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!lanes.has(lane)) continue;
        auto* mine = static_cast<Shuffle*>(lanes.data[lane]);
        const unsigned from = mine->source < 0 ? lane : static_cast<unsigned>(mine->source);
        if (lanes.has(from)) {
            mine->result = static_cast<Shuffle*>(lanes.data[from])->bits;
        } else {
            mine->stray = true;
        }
    }
}

template <class T>
T shuffle(Site site, unsigned mask, T value, int width, int source) {
    static_assert(sizeof(T) == 4, "shuffles are for 32-bit values");
    if (width != 32) fail("%s with width %d: only 32 is known here", site.word, width);
    Shuffle call = {0, source, 0, false};
    std::memcpy(&call.bits, &value, 4);
    meet(site, mask, &call, give_shuffled);
    if (call.stray)
        fail("%s (%s:%d): reads lane %d, which mask %08x lacks", site.word, base(site.file), site.line, source, mask);
    T result;
    std::memcpy(&result, &call.result, 4);
    return result;
}

struct Vote {
    bool yes;
    unsigned result;
};

static void give_votes(Lanes& lanes) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (lanes.has(lane)) votes |= static_cast<unsigned>(static_cast<Vote*>(lanes.data[lane])->yes) << lane;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (lanes.has(lane)) static_cast<Vote*>(lanes.data[lane])->result = votes;
}

static inline unsigned ballot(Site site, unsigned mask, bool yes) {
    Vote call = {yes, 0};
    meet(site, mask, &call, give_votes);
    return call.result;
}

// What mma_bf16 of tcw.cuh needs of a lane; the sums are made in the order of k.
struct Product {
    float* d;
    const unsigned *a, *b;
};

static inline float bf16(unsigned pair, unsigned upper) {
    const unsigned bits = (upper ? pair >> 16 : pair & 0xFFFF) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void give_products(Lanes& lanes) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = lane & ~3u, column = (lane & 3) * 8 + 4 * (i & 1);
            float sum = static_cast<Product*>(lanes.data[lane])->d[i];
            for (unsigned k = 0; k < 16; ++k) {
                const auto* a = static_cast<const Product*>(lanes.data[row + k / 2 % 4])->a;
                const auto* b = static_cast<const Product*>(lanes.data[column + k / 2 % 4])->b;
                sum += bf16(a[i / 2 + k / 8 * 2], k & 1) * bf16(b[k / 8], k & 1);
            }
            static_cast<Product*>(lanes.data[lane])->d[i] = sum;
        }
    }
}

static inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], TCW_SITE) {
    Product product = {d, a, b};
    meet({"mma_bf16", file, line}, 0xFFFFFFFFu, &product, give_products);
}

// Copies to shared memory come as late as they may: until then the place holds nothing of use.
static inline void copy_async(void* to, const void* from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
        fail("copy_async from %p to %p: not multiples of 16", from, to);
    unsigned char source[16];
    memcpy(source, from, 16);  // where there is nothing to read, this is the line to blame
    asm volatile("" : : "r"(source) : "memory");
    memset(to, POISON, 16);
    current->copies.push_back({to, from, current->groups});
}

static inline void copy_commit() { ++current->groups; }

static inline void copy_wait(unsigned pending) {
    auto& copies = current->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group + pending < current->groups; ++done)
        memcpy(copies[done].to, copies[done].from, 16);
    copies.erase(copies.begin(), copies.begin() + static_cast<long>(done));
}

}  // namespace tcw_host

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, TCW_SITE) {
    return tcw_host::shuffle({"__shfl_sync", file, line}, mask, value, width, lane & 31);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, TCW_SITE) {
    const int lane = static_cast<int>(tcw_host::lane());
    const int from = by > static_cast<unsigned>(lane) ? -1 : lane - static_cast<int>(by);
    return tcw_host::shuffle({"__shfl_up_sync", file, line}, mask, value, width, from);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, TCW_SITE) {
    const unsigned lane = tcw_host::lane();
    const int from = by > 31 - lane ? -1 : static_cast<int>(lane + by);
    return tcw_host::shuffle({"__shfl_down_sync", file, line}, mask, value, width, from);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, TCW_SITE) {
    const unsigned from = tcw_host::lane() ^ static_cast<unsigned>(by);
    const int source = from > 31 ? -1 : static_cast<int>(from);
    return tcw_host::shuffle({"__shfl_xor_sync", file, line}, mask, value, width, source);
}

static inline unsigned __ballot_sync(unsigned mask, int yes, TCW_SITE) {
    return tcw_host::ballot({"__ballot_sync", file, line}, mask, yes != 0);
}
static inline int __any_sync(unsigned mask, int yes, TCW_SITE) {
    return tcw_host::ballot({"__any_sync", file, line}, mask, yes != 0) != 0;
}
static inline int __all_sync(unsigned mask, int yes, TCW_SITE) {
    return tcw_host::ballot({"__all_sync", file, line}, mask, yes != 0) == mask;
}

// ---- Arithmetic ----

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
static inline unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0F0F0F0Fu) | (x & 0x0F0F0F0Fu) << 4;
    return __builtin_bswap32(x);
}

// Each nibble of `select` picks one of the 8 bytes of {y, x}; with its high bit set, that byte's sign, 8 times.
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned select) {
    const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned pick = select >> 4 * i & 15;
        unsigned byte = static_cast<unsigned>(bytes >> 8 * (pick & 7)) & 0xFF;
        if (pick & 8) byte = byte & 0x80 ? 0xFF : 0;
        result |= byte << 8 * i;
    }
    return result;
}

// The upper (l) or lower (r) word of {high, low} moved by shift & 31; the _lc and _rc forms move by min(shift, 32).
static inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
    const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
    return shift >= 32 ? low : static_cast<unsigned>(both << shift >> 32);
}
static inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
    const unsigned long long both = static_cast<unsigned long long>(high) << 32 | low;
    return shift >= 32 ? high : static_cast<unsigned>(both >> shift);
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return __funnelshift_lc(low, high, shift & 31);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return __funnelshift_rc(low, high, shift & 31);
}

static inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
static inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

namespace tcw_host {
template <class T>
T least(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T most(T a, T b) {
    return a < b ? b : a;
}
}  // namespace tcw_host

// Of mixed signs, both are taken as unsigned, as CUDA does.
#define TCW_MIN_MAX(T, A, B)                                          \
    static inline T min(A a, B b) { return tcw_host::least<T>(a, b); } \
    static inline T max(A a, B b) { return tcw_host::most<T>(a, b); }
TCW_MIN_MAX(int, int, int)
TCW_MIN_MAX(unsigned, unsigned, unsigned)
TCW_MIN_MAX(unsigned, int, unsigned)
TCW_MIN_MAX(unsigned, unsigned, int)
TCW_MIN_MAX(long long, long long, long long)
TCW_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
TCW_MIN_MAX(unsigned long long, long long, unsigned long long)
TCW_MIN_MAX(unsigned long long, unsigned long long, long long)
TCW_MIN_MAX(float, float, float)
#undef TCW_MIN_MAX

// ---- Memory ----

template <class T>
T __ldg(const T* from) {
    return *from;
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}

namespace tcw_host {

template <class T>
struct Same {
    using type = T;
};

// In one piece, as the sanitizer of races is to see it; returns what was there before.
template <class T, class Change>
T exchange(T* at, Change change) {
    static_assert(std::is_integral<T>::value && sizeof(T) >= 4, "atomics are for integers of 4 and 8 bytes");
    T old = __atomic_load_n(at, __ATOMIC_RELAXED);
    constexpr int FREE = __ATOMIC_RELAXED;
    while (!__atomic_compare_exchange_n(at, &old, static_cast<T>(change(old)), false, FREE, FREE)) continue;
    return old;
}

}  // namespace tcw_host

#define TCW_ATOMIC(NAME, RESULT)                                      \
    template <class T>                                                \
    T NAME(T* at, typename tcw_host::Same<T>::type value) {           \
        return tcw_host::exchange(at, [=](T old) { return RESULT; }); \
    }
TCW_ATOMIC(atomicAdd, old + value)
TCW_ATOMIC(atomicSub, old - value)
TCW_ATOMIC(atomicOr, old | value)
TCW_ATOMIC(atomicAnd, old& value)
TCW_ATOMIC(atomicXor, old ^ value)
TCW_ATOMIC(atomicMax, old > value ? old : value)
TCW_ATOMIC(atomicMin, old < value ? old : value)
TCW_ATOMIC(atomicExch, value)
#undef TCW_ATOMIC
