// Decode `lanes` streams (tcw/codecs/lanes.py). A block of threads takes a unit: chunks that share a table. A warp
// takes one chunk at a time, or two side by side; a thread takes a lane of each, and only follows that lane's bits.
//
//     shared memory    table | for each warp, buffer and chunk a stage: 16 bytes, the chunk's codes, bytes behind them
//
// Once the table is there, warps do not wait for each other. README.md counts the instructions.
#include "tcw.cuh"

constexpr u32 STEPS = 32, GROUP = 4, ROW = WARP * GROUP, CHUNK = ROW * STEPS;
constexpr u32 TABLE_BYTES = 4 << 12;  // a uint32 for each 12 bits; tables.py says what is in it
constexpr u32 ALONE = 1u << 23;       // in an entry: there is no second symbol
constexpr u32 BEFORE = 16;            // bytes of a stage before the codes
constexpr u32 AHEAD = 4;              // steps that `raw` and `low` are loaded ahead

enum Split { BF16, F16, F32, U8, U16 };

DEVICE constexpr u32 word_bytes(int split) { return split == F32 ? 4 : split == U8 ? 1 : 2; }
DEVICE constexpr bool has_raw(int split) { return split == BF16 || split == F16 || split == F32; }

extern __shared__ __align__(16) u8 shared[];

DEVICE u32 shared_word(u32 at) { return *reinterpret_cast<const u32*>(shared + at); }

// The arrays of a group, each for the whole of it.
struct Streams {
    const u8* codes;
    const u8* lane_bytes;
    const u32* chunk_base;
    const u8* raw;
    const u16* low;
    u8* out;
    u32* status;
};

// A lane that is being read: its next bit is bit `at + 2` of `bits`. Two below, a look-up's 12 bits are a byte offset.
struct Lane {
    u64 bits;
    u32 at;     // at most 31 after `refill`, at most 43 after a look-up more: two fit between refills
    u32 next;   // in shared memory: the word that follows `bits`
    u32 start;  // in shared memory: the lane's first byte
    u32 size;   // bytes
};

DEVICE Lane open_lane(u32 start, u32 size) {
    const u32 bit = 8 * start - 2, word = bit / 32 * 4;
    const u64 bits = shared_word(word) | static_cast<u64>(shared_word(word + 4)) << 32;
    return {bits, bit % 32, word + 8, start, size};
}

DEVICE u32 look_up(const Lane& lane) {
    return shared_word(static_cast<u32>(lane.bits >> lane.at) & (TABLE_BYTES - 4));
}

DEVICE void refill(Lane& lane) {
    if (lane.at >= 32) {
        lane.bits = lane.bits >> 32 | static_cast<u64>(shared_word(lane.next)) << 32;
        lane.next += 4;
        lane.at -= 32;
    }
}

// Whether a lane that has given all its symbols ends with its last code, padded with zero bits.
DEVICE bool ends_well(const Lane& lane) {
    const u32 read = 8 * (lane.next - 8 - lane.start) + lane.at + 2;
    const u32 padding = static_cast<u32>(lane.bits >> (lane.at + 2)) & ((1u << (7 & (0 - read))) - 1);
    return (read + 7) / 8 == lane.size && padding == 0;
}

DEVICE void finish(const Streams& streams, const Lane& lane, u32 chunk) {
    if (streams.status != nullptr && !ends_well(lane)) atomicMax(streams.status, WARP * chunk + lane_id() + 1);
}

// The codes of a chunk on their way to shared memory.
struct Stage {
    u32 start;  // in shared memory: the chunk's first byte
    u32 size;   // bytes of this thread's lane
};

// Start to copy the codes of `chunk` to the stage at `to`; the chunk's are framed to multiples of 16 bytes.
DEVICE Stage stage(const Streams& streams, u32 chunk, u32 to) {
    const u32 begin = __ldg(streams.chunk_base + chunk), end = __ldg(streams.chunk_base + chunk + 1);
    const u32 size = __ldg(streams.lane_bytes + static_cast<u64>(chunk) * WARP + lane_id());
    const u32 skew = begin % 16;
    const u8* from = streams.codes + (begin - skew);
    to += BEFORE;
#pragma unroll 1
    for (u32 k = 16 * lane_id(); k < skew + (end - begin); k += 16 * WARP) copy_async(shared + to + k, from + k);
    return {to + skew, size};
}

DEVICE Lane open_lane(const Stage& stage) {
    return open_lane(stage.start + warp_exclusive_sum(stage.size), stage.size);
}

// Four neighbouring symbols; `y` has the last two where they are of 16 bits.
struct Symbols {
    u32 x, y;
};

// `first` is the entry of a look-up that gave one symbol: look the second one up, and join them.
DEVICE u32 join(Lane& lane, u32 first) {
    const u32 second = look_up(lane);
    lane.at += second >> 16 & 15;
    refill(lane);
    return __byte_perm(first, second, 0x3240);
}

// The next four symbols of COUNT lanes. Work on the lanes alternates, so that one's look-up hides the other's wait.
template <int SPLIT, int COUNT>
DEVICE void next_symbols(Lane (&lanes)[COUNT], Symbols (&symbols)[COUNT]) {
    u32 found[4][COUNT];
    if constexpr (SPLIT == U16) {
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
#pragma unroll
            for (int k = 0; k < COUNT; ++k) found[j][k] = look_up(lanes[k]);
#pragma unroll
            for (int k = 0; k < COUNT; ++k) {
                lanes[k].at += found[j][k] >> 24;
                if (j % 2) refill(lanes[k]);
            }
        }
#pragma unroll
        for (int k = 0; k < COUNT; ++k) {
            symbols[k].x = __byte_perm(found[0][k], found[1][k], 0x5410);
            symbols[k].y = __byte_perm(found[2][k], found[3][k], 0x5410);
        }
    } else {
#pragma unroll
        for (u32 j = 0; j < 2; ++j) {
#pragma unroll
            for (int k = 0; k < COUNT; ++k) found[j][k] = look_up(lanes[k]);
#pragma unroll
            for (int k = 0; k < COUNT; ++k) {
                lanes[k].at += found[j][k] >> 24;
                if (j == 1) refill(lanes[k]);
                if (found[j][k] & ALONE) found[j][k] = join(lanes[k], found[j][k]);
            }
        }
#pragma unroll
        for (int k = 0; k < COUNT; ++k) symbols[k].x = __byte_perm(found[0][k], found[1][k], 0x5410);
    }
}

// What is stored beside four symbols.
struct Rest {
    u32 raw;
    uint2 low;
};

// Where four symbols' rests are, and where their words go.
struct Places {
    const u8* raw;
    const u16* low;
    u8* out;
};

// Of `element`, whose word goes to `place`; null where the split has no such array.
template <int SPLIT>
DEVICE Places places_of(const Streams& streams, u64 element, u64 place) {
    return {has_raw(SPLIT) ? streams.raw + element : nullptr, SPLIT == F32 ? streams.low + element : nullptr,
            streams.out + place * word_bytes(SPLIT)};
}

template <int SPLIT>
DEVICE Rest load_rest(const Places& at, u32 element) {
    Rest rest = {0, make_uint2(0, 0)};
    if constexpr (has_raw(SPLIT)) rest.raw = load_once(reinterpret_cast<const u32*>(at.raw + element));
    if constexpr (SPLIT == F32) rest.low = __ldg(reinterpret_cast<const uint2*>(at.low + element));
    return rest;
}

// Put four words together and store them at `to`, which is aligned to their bytes.
template <int SPLIT>
DEVICE void store_words(const Symbols& symbols, const Rest& rest, u8* to) {
    const u32 raw = rest.raw;
    u32 low = raw, high = symbols.x;  // of each word, bytes 0 and 1, or bytes 2 and 3 of F32
    if constexpr (SPLIT == BF16 || SPLIT == F32) {
        const u32 swapped = (raw ^ symbols.x) & 0x80808080u;
        low ^= swapped;
        high ^= swapped;
    }
    const u32 first = __byte_perm(low, high, 0x5140), second = __byte_perm(low, high, 0x7362);
    if constexpr (SPLIT == U8) {
        *reinterpret_cast<u32*>(to) = symbols.x;
    } else if constexpr (SPLIT == U16) {
        *reinterpret_cast<uint2*>(to) = make_uint2(symbols.x, symbols.y);
    } else if constexpr (SPLIT == F32) {
        *reinterpret_cast<uint4*>(to) =
            make_uint4(__byte_perm(rest.low.x, first, 0x5410), __byte_perm(rest.low.x, first, 0x7632),
                       __byte_perm(rest.low.y, second, 0x5410), __byte_perm(rest.low.y, second, 0x7632));
    } else {
        *reinterpret_cast<uint2*>(to) = make_uint2(first, second);
    }
}

// COUNT whole chunks side by side, neighbours in the tensor; `at` are this thread's places in the first row.
template <int SPLIT, int COUNT>
DEVICE void decode_whole(Lane (&lanes)[COUNT], Places at) {
    Rest rest[AHEAD][COUNT];
#pragma unroll
    for (u32 i = 0; i < AHEAD; ++i)
#pragma unroll
        for (u32 k = 0; k < COUNT; ++k) rest[i][k] = load_rest<SPLIT>(at, i * ROW + k * CHUNK);
#pragma unroll 1
    for (u32 step = 0; step < STEPS; step += AHEAD) {
#pragma unroll
        for (u32 i = 0; i < AHEAD; ++i) {
            Symbols symbols[COUNT];
            next_symbols<SPLIT>(lanes, symbols);
#pragma unroll
            for (u32 k = 0; k < COUNT; ++k) {
                const u32 element = i * ROW + k * CHUNK;
                store_words<SPLIT>(symbols[k], rest[i][k], at.out + element * word_bytes(SPLIT));
                if (step + AHEAD < STEPS) rest[i][k] = load_rest<SPLIT>(at, element + AHEAD * ROW);
            }
        }
        if constexpr (has_raw(SPLIT)) at.raw += AHEAD * ROW;
        if constexpr (SPLIT == F32) at.low += AHEAD * ROW;
        at.out += AHEAD * ROW * word_bytes(SPLIT);
    }
}

// One chunk of `count` words at any place, word by word: the last of a segment, or one that is not aligned.
template <int SPLIT>
DEVICE void decode_ragged(const Streams& streams, Lane& lane, u64 element, u32 count, u64 place) {
#pragma unroll 1
    for (u32 i = 0; i < STEPS * GROUP; ++i) {
        const u32 j = i / GROUP * ROW + GROUP * lane_id() + i % GROUP;
        if (j >= count) break;
        const u32 entry = look_up(lane);
        const u32 symbol = entry & (SPLIT == U16 ? 0xFFFF : 0xFF);
        lane.at += SPLIT == U16 ? entry >> 24 : entry >> 16 & 15;
        refill(lane);
        const u32 raw = has_raw(SPLIT) ? streams.raw[element + j] : 0;
        const u32 upper = ((raw & 0x80) | (symbol & 0x7F)) << 8 | (symbol & 0x80) | (raw & 0x7F);
        if constexpr (SPLIT == U8) {
            streams.out[place + j] = static_cast<u8>(symbol);
        } else if constexpr (SPLIT == F32) {
            reinterpret_cast<u32*>(streams.out)[place + j] = upper << 16 | streams.low[element + j];
        } else {
            const u32 word = SPLIT == BF16 ? upper : SPLIT == F16 ? symbol << 8 | raw : symbol;
            reinterpret_cast<u16*>(streams.out)[place + j] = static_cast<u16>(word);
        }
    }
}

// What a warp does with COUNT staged chunks from `chunk` on; `left` words, from `element` on, are the unit's.
template <int SPLIT, int COUNT>
DEVICE void decode_chunks(const Streams& streams, const Stage (&stages)[COUNT], u32 chunk, u64 element, u64 left,
                          u64 place) {
    Lane lanes[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; ++k) lanes[k] = open_lane(stages[k]);
    if (left >= COUNT * CHUNK && (element | place) % GROUP == 0) {
        const u32 mine = GROUP * lane_id();
        decode_whole<SPLIT>(lanes, places_of<SPLIT>(streams, element + mine, place + mine));
    } else {
#pragma unroll
        for (u32 k = 0; k < COUNT; ++k) {
            if (left <= k * CHUNK) break;
            const u32 count = static_cast<u32>(min(left - k * CHUNK, static_cast<u64>(CHUNK)));
            decode_ragged<SPLIT>(streams, lanes[k], element + k * CHUNK, count, place + k * CHUNK);
        }
    }
#pragma unroll
    for (u32 k = 0; k < COUNT; ++k)
        if (left > k * CHUNK) finish(streams, lanes[k], chunk + k);
}

template <int COUNT>
DEVICE void stage_chunks(const Streams& streams, u32 chunk, u32 end, u32 to, u32 stage_bytes, Stage (&stages)[COUNT]) {
#pragma unroll
    for (u32 k = 0; k < COUNT; ++k)
        stages[k] = chunk + k < end ? stage(streams, chunk + k, to + k * stage_bytes) : Stage{to + BEFORE, 0};
    copy_commit();
}

// A block decodes one unit: first chunk, end chunk, first element, end element, table, and where there is a sixth number
// the first element's place in `out`. With two `buffers` a warp copies its next codes while it decodes.
template <int SPLIT, int COUNT>
DEVICE void decode_unit(const Streams& streams, const i64* unit, u32 columns, const u32* tables, u32 stage_bytes,
                        u32 buffers) {
    unit += static_cast<u64>(blockIdx.x) * columns;
    const u32 first = static_cast<u32>(unit[0]), end = static_cast<u32>(unit[1]);
    const u64 element = static_cast<u64>(unit[2]), stop = static_cast<u64>(unit[3]);
    const u64 place = static_cast<u64>(unit[columns > 5 ? 5 : 2]);
    const u8* table = reinterpret_cast<const u8*>(tables) + static_cast<u64>(unit[4]) * TABLE_BYTES;
    for (u32 k = 16 * threadIdx.x; k < TABLE_BYTES; k += 16 * blockDim.x) copy_async(shared + k, table + k);
    const u32 stride = blockDim.x / WARP * COUNT, buffer_bytes = COUNT * stage_bytes;
    u32 chunk = first + warp_id() * COUNT, to = TABLE_BYTES + warp_id() * buffers * buffer_bytes;
    u32 other = to + (buffers - 1) * buffer_bytes;
    Stage now[COUNT], later[COUNT];
    stage_chunks(streams, chunk, end, to, stage_bytes, now);
    copy_wait<0>();
    __syncthreads();
    while (chunk < end) {
        const u32 next = chunk + stride;
        if (buffers > 1) stage_chunks(streams, next, end, other, stage_bytes, later);
        const u64 skip = static_cast<u64>(chunk - first) * CHUNK;
        decode_chunks<SPLIT>(streams, now, chunk, element + skip, stop - (element + skip), place + skip);
        __syncwarp(ALL);  // all lanes are done with the codes that are overwritten now
        if (buffers == 1) stage_chunks(streams, next, end, other, stage_bytes, later);
        copy_wait<0>();
        __syncwarp(ALL);
        for (int k = 0; k < COUNT; ++k) now[k] = later[k];
        const u32 free = to;
        to = other;
        other = free;
        chunk = next;
    }
}

// units int64 [blocks, columns], tables uint32 [tables, 4096], status uint32 [1] or null; stage_bytes: a multiple of 16
#define PARAMETERS                                                                                                     \
    const u8 *__restrict__ codes, const u8 *__restrict__ lane_bytes, const u32 *__restrict__ chunk_base,               \
        const i64 *__restrict__ units, const u32 *__restrict__ tables, const u8 *__restrict__ raw,                     \
        const u16 *__restrict__ low, u8 *__restrict__ out, u32 *__restrict__ status, u32 columns, u32 stage_bytes,     \
        u32 buffers
#define STREAMS {codes, lane_bytes, chunk_base, raw, low, out, status}

extern "C" __global__ void __launch_bounds__(512) lanes_decode_bf16(PARAMETERS) {
    decode_unit<BF16, 1>(STREAMS, units, columns, tables, stage_bytes, buffers);
}
extern "C" __global__ void __launch_bounds__(512) lanes_decode_f16(PARAMETERS) {
    decode_unit<F16, 1>(STREAMS, units, columns, tables, stage_bytes, buffers);
}
extern "C" __global__ void __launch_bounds__(512) lanes_decode_f32(PARAMETERS) {
    decode_unit<F32, 1>(STREAMS, units, columns, tables, stage_bytes, buffers);
}
extern "C" __global__ void __launch_bounds__(512) lanes_decode_u8(PARAMETERS) {
    decode_unit<U8, 1>(STREAMS, units, columns, tables, stage_bytes, buffers);
}
extern "C" __global__ void __launch_bounds__(512) lanes_decode_u16(PARAMETERS) {
    decode_unit<U16, 1>(STREAMS, units, columns, tables, stage_bytes, buffers);
}
extern "C" __global__ void __launch_bounds__(512) lanes_decode_bf16_by_2(PARAMETERS) {
    decode_unit<BF16, 2>(STREAMS, units, columns, tables, stage_bytes, buffers);
}
