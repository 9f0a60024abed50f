// Words to the parts of a `lanes` stream (tcw/codecs/lanes.py): symbols are counted; then each lane's size is found and
// the planes are written; then, when the host knows where each chunk begins, the codes are written.
//
// Words begin on the boundary of four of them, planes and codes on 16 bytes: launch.py sees to that.
#include "tcw.cuh"

constexpr u32 GROUP = 4;  // neighbouring symbols that a lane owns in a step
constexpr u32 ROW = WARP * GROUP, STEPS = 32, CHUNK = ROW * STEPS;
constexpr u32 SYMBOLS = 256;  // of a split whose symbols are bytes
constexpr u32 WARPS = 8;      // of a block, at most
// An entry of a table: the code, its first bit in bit 0, and its length from this bit up. 128 entries can be summed:
// their codes stay below 2^19, and their lengths below 2^11.
constexpr u32 LENGTH = 20, CODE = 0xFFF;
constexpr u32 VECTOR = 16;  // bytes of a wide store

// The splits. Four neighbouring words lie in sizeof(Word) parts of 32 bits; `raw` gives the four bytes of that plane.

// Four signs, the first bits of `high`, and four mantissas, the others of `low`.
DEVICE u32 sign_and_mantissa(u32 high, u32 low) { return (high & 0x80808080) | (low & 0x7F7F7F7F); }

struct Bf16 {
    using Word = u16;
    static constexpr bool WIDE = false, RAW = true, LOW = false;
    DEVICE u32 symbol(const u32 (&quad)[2], u32 j) { return (quad[j / 2] >> (16 * (j % 2) + 7)) & 0xFF; }
    DEVICE u32 raw(const u32 (&quad)[2]) {
        return sign_and_mantissa(__byte_perm(quad[0], quad[1], 0x7531), __byte_perm(quad[0], quad[1], 0x6420));
    }
};

struct F16 {
    using Word = u16;
    static constexpr bool WIDE = false, RAW = true, LOW = false;
    DEVICE u32 symbol(const u32 (&quad)[2], u32 j) { return (quad[j / 2] >> (16 * (j % 2) + 8)) & 0xFF; }
    DEVICE u32 raw(const u32 (&quad)[2]) { return __byte_perm(quad[0], quad[1], 0x6420); }
};

struct F32 {
    using Word = u32;
    static constexpr bool WIDE = false, RAW = true, LOW = true;
    DEVICE u32 symbol(const u32 (&quad)[4], u32 j) { return (quad[j] >> 23) & 0xFF; }
    DEVICE u32 raw(const u32 (&quad)[4]) {
        const u32 first = __byte_perm(quad[0], quad[1], 0x7362), second = __byte_perm(quad[2], quad[3], 0x7362);
        return sign_and_mantissa(__byte_perm(first, second, 0x7632), __byte_perm(first, second, 0x5410));
    }
    DEVICE uint2 low(const u32 (&quad)[4]) {
        return make_uint2(__byte_perm(quad[0], quad[1], 0x5410), __byte_perm(quad[2], quad[3], 0x5410));
    }
};

struct U8 {
    using Word = u8;
    static constexpr bool WIDE = false, RAW = false, LOW = false;
    DEVICE u32 symbol(const u32 (&quad)[1], u32 j) { return (quad[0] >> (8 * j)) & 0xFF; }
};

struct U16 {
    using Word = u16;
    static constexpr bool WIDE = true, RAW = false, LOW = false;
    DEVICE u32 symbol(const u32 (&quad)[2], u32 j) { return (quad[j / 2] >> (16 * (j % 2))) & 0xFFFF; }
};

template <class Word>
DEVICE void load_quad(const Word* from, u32 (&quad)[sizeof(Word)]) {
    if constexpr (sizeof(Word) == 1) {
        quad[0] = *reinterpret_cast<const u32*>(from);
    } else if constexpr (sizeof(Word) == 2) {
        const uint2 read = *reinterpret_cast<const uint2*>(from);
        quad[0] = read.x, quad[1] = read.y;
    } else {
        const uint4 read = *reinterpret_cast<const uint4*>(from);
        quad[0] = read.x, quad[1] = read.y, quad[2] = read.z, quad[3] = read.w;
    }
}

// The same of the words that a ragged chunk of `count` has from `at` on; returns how many of the four these are.
template <class Word>
DEVICE u32 load_some(const Word* words, u32 at, u32 count, u32 (&quad)[sizeof(Word)]) {
    constexpr u32 bits = 8 * sizeof(Word);
    const u32 valid = at < count ? min(count - at, GROUP) : 0;
#pragma unroll
    for (u32 part = 0; part < sizeof(Word); ++part) quad[part] = 0;
#pragma unroll
    for (u32 j = 0; j < GROUP; ++j)
        if (j < valid) quad[j * bits / 32] |= static_cast<u32>(words[at + j]) << (j * bits % 32);
    return valid;
}

template <class Split, bool FULL>
DEVICE u32 load(const typename Split::Word* words, u32 at, u32 count, u32 (&quad)[sizeof(typename Split::Word)]) {
    if constexpr (!FULL) return load_some(words, at, count, quad);
    load_quad(words + at, quad);
    return GROUP;
}

// ---- 1. How often each symbol occurs. ----

// Each warp has counters of its own. An addition of 1 whose result nobody wants is ATOMS.POPC.INC, made for lanes that
// count the same; exponents are few, so that is common.
template <class Split>
DEVICE void count_symbols(const typename Split::Word* words, u32 count, u32* counts) {
    __shared__ u32 counters[WARPS * SYMBOLS];
    u32* mine = Split::WIDE ? counts : counters + warp_id() * SYMBOLS;
    if constexpr (!Split::WIDE) {
        for (u32 i = threadIdx.x; i < WARPS * SYMBOLS; i += blockDim.x) counters[i] = 0;
        __syncthreads();
    }
    const u32 thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
    u32 quad[sizeof(typename Split::Word)];
#pragma unroll 4
    for (u32 at = thread; at < count / GROUP; at += threads) {
        load_quad(words + static_cast<u64>(at) * GROUP, quad);
#pragma unroll
        for (u32 j = 0; j < GROUP; ++j) atomicAdd(&mine[Split::symbol(quad, j)], 1u);
    }
    if (thread < count % GROUP) {
        load_some(words + (count - count % GROUP), thread, thread + 1, quad);
        atomicAdd(&mine[Split::symbol(quad, 0)], 1u);
    }
    if constexpr (!Split::WIDE) {
        __syncthreads();
        for (u32 symbol = threadIdx.x; symbol < SYMBOLS; symbol += blockDim.x) {
            u32 sum = 0;
            for (u32 warp = 0; warp < WARPS; ++warp) sum += counters[warp * SYMBOLS + symbol];
            if (sum) atomicAdd(&counts[symbol], sum);
        }
    }
}

// ---- What 2 and 3 have in common: a warp takes a chunk, and the table is at hand. ----

// Where to look codes up: bytes have their table in shared memory, for wider symbols the caches must do.
template <class Split>
DEVICE const u32* at_hand(const u32* table, u32 (&near)[SYMBOLS]) {
    if constexpr (Split::WIDE) {
        return table;
    } else {
        for (u32 i = threadIdx.x; i < SYMBOLS; i += blockDim.x) near[i] = table[i];
        __syncthreads();
        return near;
    }
}

DEVICE u32 first_chunk() { return blockIdx.x * (blockDim.x / WARP) + warp_id(); }
DEVICE u32 chunk_stride() { return gridDim.x * (blockDim.x / WARP); }
DEVICE u32 chunks_of(u64 count) { return static_cast<u32>((count + CHUNK - 1) / CHUNK); }
DEVICE u32 words_of(u32 chunk, u64 count) {
    return static_cast<u32>(min(count - static_cast<u64>(chunk) * CHUNK, static_cast<u64>(CHUNK)));
}

// ---- 2. The size of each lane, and what is not coded. ----

template <class Split, bool FULL>
DEVICE void store_planes(const u32 (&quad)[sizeof(typename Split::Word)], u32 at, u32 valid, u8* raw, u16* low) {
    if constexpr (Split::RAW) {
        const u32 bytes = Split::raw(quad);
        if constexpr (FULL) {
            *reinterpret_cast<u32*>(raw + at) = bytes;
        } else {
            for (u32 j = 0; j < valid; ++j) raw[at + j] = static_cast<u8>(bytes >> (8 * j));
        }
    }
    if constexpr (Split::LOW) {
        if constexpr (FULL) {
            *reinterpret_cast<uint2*>(low + at) = Split::low(quad);
        } else {
            for (u32 j = 0; j < valid; ++j) low[at + j] = static_cast<u16>(quad[j]);
        }
    }
}

// Bytes of this thread's lane.
template <class Split, bool FULL>
DEVICE u32 measure(const typename Split::Word* words, u32 count, const u32* table, u8* raw, u16* low) {
    u32 sum = 0;
#pragma unroll 4
    for (u32 step = 0; step < STEPS; ++step) {
        const u32 at = step * ROW + lane_id() * GROUP;
        u32 quad[sizeof(typename Split::Word)];
        const u32 valid = load<Split, FULL>(words, at, count, quad);
#pragma unroll
        for (u32 j = 0; j < GROUP; ++j)
            if (FULL || j < valid) sum += table[Split::symbol(quad, j)];
        store_planes<Split, FULL>(quad, at, valid, raw, low);
    }
    return ((sum >> LENGTH) + 7) / 8;
}

template <class Split>
DEVICE void measure_lanes(
    const typename Split::Word* words, u64 count, const u32* table, u8* lane_bytes, u8* raw, u16* low) {
    __shared__ u32 near[SYMBOLS];
    const u32* entries = at_hand<Split>(table, near);
    for (u32 chunk = first_chunk(); chunk < chunks_of(count); chunk += chunk_stride()) {
        const u64 begin = static_cast<u64>(chunk) * CHUNK;
        const u32 words_here = words_of(chunk, count);
        u8* raw_here = Split::RAW ? raw + begin : nullptr;
        u16* low_here = Split::LOW ? low + begin : nullptr;
        const u32 bytes = words_here == CHUNK
                              ? measure<Split, true>(words + begin, CHUNK, entries, raw_here, low_here)
                              : measure<Split, false>(words + begin, words_here, entries, raw_here, low_here);
        lane_bytes[static_cast<u64>(chunk) * WARP + lane_id()] = static_cast<u8>(bytes);
    }
}

// ---- 3. The codes. ----

// Bits that a lane has not written yet, `used` of them, at most 31; `to` is the word of shared memory they go to.
struct Writer {
    u32* to;
    u32 bits, used;

    __device__ __forceinline__ void add(u32 code, u32 size) {  // at most 24 bits
        const u32 rest = __funnelshift_l(code, 0, used);
        bits |= code << used;
        used += size;
        const bool full = used >= 32;
        if (full) *to = bits;
        to += full;
        bits = full ? rest : bits;
        used %= 32;
    }
    // Lanes share the words where one ends and the next begins. A word is stored by the lane that fills it, the only
    // one; then the others add their bits to it, or to the zeros that were there.
    __device__ __forceinline__ void end() {
        __syncwarp();
        if (bits) atomicOr(to, bits);
    }
};

// Write this thread's lane to byte `at` of the warp's copy of the chunk.
template <class Split, bool FULL>
DEVICE void write_lane(const typename Split::Word* words, u32 count, const u32* table, u8* copy, u32 at) {
    Writer writer = {reinterpret_cast<u32*>(copy) + at / 4, 0, at % 4 * 8};
#pragma unroll 4
    for (u32 step = 0; step < STEPS; ++step) {
        u32 quad[sizeof(typename Split::Word)];
        const u32 valid = load<Split, FULL>(words, step * ROW + lane_id() * GROUP, count, quad);
#pragma unroll
        for (u32 j = 0; j < GROUP; j += 2) {
            const u32 first = FULL || j < valid ? table[Split::symbol(quad, j)] : 0;
            const u32 second = FULL || j + 1 < valid ? table[Split::symbol(quad, j + 1)] : 0;
            const u32 size = first >> LENGTH;
            writer.add((first & CODE) | (second & CODE) << size, size + (second >> LENGTH));
        }
    }
    writer.end();
}

// Bring bytes begin..end of the warp's copy to where they go; to + begin is the chunk's first byte, `to` is a multiple
// of 16. Chunks share vectors of 16 bytes where one ends and the next begins: those are written byte by byte.
DEVICE void copy_out(const u8* copy, u32 begin, u32 end, u8* to) {
    const u32 first = (begin + VECTOR - 1) / VECTOR * VECTOR, last = end / VECTOR * VECTOR;
    for (u32 at = first + lane_id() * VECTOR; at < last; at += WARP * VECTOR)
        *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(copy + at);
    const bool before = lane_id() < VECTOR;  // half of the lanes write what is before the vectors, half what is behind
    const u32 at = before ? lane_id() : last + lane_id() - VECTOR;
    if (before ? at >= begin && at < min(first, end) : at >= first && at < end) to[at] = copy[at];
}

template <class Split>
DEVICE void write_codes(
    const typename Split::Word* words, u64 count, const u32* table, const u8* lane_bytes, const u32* chunk_base,
    u8* codes, u32 room) {
    extern __shared__ __align__(16) u8 shared[];
    __shared__ u32 near[SYMBOLS];
    const u32* entries = at_hand<Split>(table, near);
    u8* copy = shared + warp_id() * room;
    for (u32 chunk = first_chunk(); chunk < chunks_of(count); chunk += chunk_stride()) {
        const u32 bytes = lane_bytes[static_cast<u64>(chunk) * WARP + lane_id()];
        const u32 base = chunk_base[chunk], begin = base % VECTOR;
        const u32 at = begin + warp_exclusive_sum(bytes);
        const u32 end = __shfl_sync(ALL, at + bytes, WARP - 1);
        for (u32 i = lane_id() * VECTOR; i < end; i += WARP * VECTOR)
            *reinterpret_cast<uint4*>(copy + i) = make_uint4(0, 0, 0, 0);
        __syncwarp();
        const typename Split::Word* here = words + static_cast<u64>(chunk) * CHUNK;
        const u32 words_here = words_of(chunk, count);
        if (words_here == CHUNK) {
            write_lane<Split, true>(here, CHUNK, entries, copy, at);
        } else {
            write_lane<Split, false>(here, words_here, entries, copy, at);
        }
        __syncwarp();
        copy_out(copy, begin, end, codes + (base - begin));
        __syncwarp();
    }
}

// ---- Entry points, by split. ----

// counts u32 [256 or 65,536] += the symbols of words [count]
extern "C" __global__ void __launch_bounds__(256) count_bf16(const u16* __restrict__ words, u32 count, u32* counts) {
    count_symbols<Bf16>(words, count, counts);
}
extern "C" __global__ void __launch_bounds__(256) count_f16(const u16* __restrict__ words, u32 count, u32* counts) {
    count_symbols<F16>(words, count, counts);
}
extern "C" __global__ void __launch_bounds__(256) count_f32(const u32* __restrict__ words, u32 count, u32* counts) {
    count_symbols<F32>(words, count, counts);
}
extern "C" __global__ void __launch_bounds__(256) count_u8(const u8* __restrict__ words, u32 count, u32* counts) {
    count_symbols<U8>(words, count, counts);
}
extern "C" __global__ void __launch_bounds__(256) count_u16(const u16* __restrict__ words, u32 count, u32* counts) {
    count_symbols<U16>(words, count, counts);
}

// lane_bytes u8 [32 chunks]; raw u8 [count] and low u16 [count] where the split has them
extern "C" __global__ void __launch_bounds__(256) measure_bf16(
    const u16* __restrict__ words, u64 count, const u32* table, u8* __restrict__ lane_bytes,
    u8* __restrict__ raw, u16* __restrict__ low) {
    measure_lanes<Bf16>(words, count, table, lane_bytes, raw, low);
}
extern "C" __global__ void __launch_bounds__(256) measure_f16(
    const u16* __restrict__ words, u64 count, const u32* table, u8* __restrict__ lane_bytes,
    u8* __restrict__ raw, u16* __restrict__ low) {
    measure_lanes<F16>(words, count, table, lane_bytes, raw, low);
}
extern "C" __global__ void __launch_bounds__(256) measure_f32(
    const u32* __restrict__ words, u64 count, const u32* table, u8* __restrict__ lane_bytes,
    u8* __restrict__ raw, u16* __restrict__ low) {
    measure_lanes<F32>(words, count, table, lane_bytes, raw, low);
}
extern "C" __global__ void __launch_bounds__(256) measure_u8(
    const u8* __restrict__ words, u64 count, const u32* table, u8* __restrict__ lane_bytes,
    u8* __restrict__ raw, u16* __restrict__ low) {
    measure_lanes<U8>(words, count, table, lane_bytes, raw, low);
}
extern "C" __global__ void __launch_bounds__(256) measure_u16(
    const u16* __restrict__ words, u64 count, const u32* table, u8* __restrict__ lane_bytes,
    u8* __restrict__ raw, u16* __restrict__ low) {
    measure_lanes<U16>(words, count, table, lane_bytes, raw, low);
}

// codes u8 [bytes]; room: bytes of shared memory for each warp, a multiple of 16, 15 more than the largest chunk
extern "C" __global__ void __launch_bounds__(256) write_bf16(
    const u16* __restrict__ words, u64 count, const u32* table, const u8* lane_bytes,
    const u32* chunk_base, u8* codes, u32 room) {
    write_codes<Bf16>(words, count, table, lane_bytes, chunk_base, codes, room);
}
extern "C" __global__ void __launch_bounds__(256) write_f16(
    const u16* __restrict__ words, u64 count, const u32* table, const u8* lane_bytes,
    const u32* chunk_base, u8* codes, u32 room) {
    write_codes<F16>(words, count, table, lane_bytes, chunk_base, codes, room);
}
extern "C" __global__ void __launch_bounds__(256) write_f32(
    const u32* __restrict__ words, u64 count, const u32* table, const u8* lane_bytes,
    const u32* chunk_base, u8* codes, u32 room) {
    write_codes<F32>(words, count, table, lane_bytes, chunk_base, codes, room);
}
extern "C" __global__ void __launch_bounds__(256) write_u8(
    const u8* __restrict__ words, u64 count, const u32* table, const u8* lane_bytes,
    const u32* chunk_base, u8* codes, u32 room) {
    write_codes<U8>(words, count, table, lane_bytes, chunk_base, codes, room);
}
extern "C" __global__ void __launch_bounds__(256) write_u16(
    const u16* __restrict__ words, u64 count, const u32* table, const u8* lane_bytes,
    const u32* chunk_base, u8* codes, u32 room) {
    write_codes<U16>(words, count, table, lane_bytes, chunk_base, codes, room);
}
