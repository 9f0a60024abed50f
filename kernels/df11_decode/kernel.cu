// BF16 weights out of the official DFloat11 layout (tcw/codecs/df11.py has the format). README.md has the reasons.
//
// A stream block is 4096 bytes, 512 cells of 8 bytes. The kernel `decode_*` gives it to 256 threads, and each thread
// decodes a run: two neighbouring cells as one piece of 128 bits, from the first cell's gap on. All the codes that
// start in the run are its own. Each warp then works on the weights of its 32 runs, which are neighbours.
#include "tcw.cuh"

constexpr u32 GAP_BYTES = 320;  // of a block: 5 bits a cell
constexpr u32 RUNS = 256, WARPS = RUNS / WARP, RUN_BITS = 128;
constexpr u32 CELLS = 512, CELL_BITS = 64;
constexpr u32 PEEK = 10;              // bits that the table of symbols is indexed by, 16 at most
constexpr u32 ENTRIES_BYTES = 8 << PEEK;
// Blocks that a multiprocessor shall have registers for; one of compute capability 7.5 takes 1,024 threads.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr u32 RESIDENT = 4;
#else
constexpr u32 RESIDENT = 6;
#endif
constexpr u32 UNRESOLVED = 32u << 8 | 255;  // for bits that are no code: a symbol that none has, and on by 32 bits

#define METHOD __device__ __forceinline__

// A position in a run, and the lower half of a table entry, in one word:
//     bits 0..7    bits of the stream
//     bits 8..18   eight times the number of symbols
//     bits 19..31  of an entry: where its codes start; of a position: nothing of use, as entries are just added
// Shuffling shifts take their count modulo 32, so `p` shifts by the bit in its word, `p >> 8` by the byte in its word.
constexpr u32 ONE_SYMBOL = 8u << 8, STARTS = 19;
DEVICE u32 bit_of(u32 position) { return position & 0xFF; }
DEVICE u32 symbols_of(u32 position) { return (position >> 11) & 0xFF; }

DEVICE u32 big_endian(u32 word) { return __byte_perm(word, 0, 0x0123); }

// Symbol | size in bits << 8 of the code that `window` begins with. `rows` are the look-up rows as 16-bit words:
// symbol | size << 8, or the number of the row for the next byte.
DEVICE u32 walk(const u16* rows, u32 window) {
    u32 row = 0;
#pragma unroll 1
    for (u32 shift = 32; shift; shift -= 8) {
        const u32 entry = rows[row * 256 + ((window >> (shift - 8)) & 255)];
        if (entry >> 8) return entry;
        row = entry;
    }
    return UNRESOLVED;
}

// A thread's run while it is decoded: five words of the stream, and where the symbols go, four to a word.
struct Run {
    u32 words[5];  // the first two hold the next 32 bits
    u32 position;
    u32 pending;  // symbols that do not fill a word yet
    u32* slot;

    METHOD u32 window() const { return __funnelshift_l(words[1], words[0], position); }
    METHOD bool done() const { return position & RUN_BITS; }

    // Append the symbols of a table entry.
    METHOD void emit(uint2 entry) {
        const u32 shift = position >> 8, before = position;
        pending |= __funnelshift_l(0, entry.x, shift);
        position += entry.y;
        if ((before ^ position) & (4 * ONE_SYMBOL)) {
            *slot++ = pending;
            pending = __funnelshift_l(entry.x, 0, shift);
        }
    }

    // Forget the first word where the position has left it since `before`, which is at most 32 bits ago.
    METHOD void advance(u32 before) {
        if ((before ^ position) & 32) {
#pragma unroll
            for (u32 k = 0; k < 4; ++k) words[k] = words[k + 1];
        }
    }
};

// `stream` is the run's 16 bytes; 4 more can be read, they are the next run's. All lanes of the warp take part.
DEVICE Run load_run(const uint4* stream, u32 gap, u32* slot) {
    const uint4 own = load_once(stream);
    u32 next = __shfl_down_sync(ALL, own.x, 1);
    if (lane_id() == WARP - 1) next = __ldg(reinterpret_cast<const u32*>(stream + 1));
    const u32 words[5] = {big_endian(own.x), big_endian(own.y), big_endian(own.z), big_endian(own.w), big_endian(next)};
    return {{words[0], words[1], words[2], words[3], words[4]}, gap, 0, slot};
}

// Decode a run into its slot of WORDS + 1 words. Returns the number of symbols, those that start in the run.
template <u32 WORDS>
DEVICE u32 decode_run(Run& run, const uint2* entries, const u16* rows) {
    u32* const slot = run.slot;
    uint2 first, second;
    u32 before;
    do {  // two looks at the 32 bits of one window, so entries take 16 bits of it at most
        before = run.position;
        const u32 window = run.window();
        first = entries[window >> (32 - PEEK)];
        second = entries[__funnelshift_l(0, window, first.y) >> (32 - PEEK)];
        run.emit(first);
        run.emit(second);
        run.advance(before);
        if (second.y == 0 && !run.done()) {  // a code too long for the table; `first` may have been one, or `second`
            const u32 start = run.position, found = walk(rows, run.window());
            run.emit(make_uint2(found & 255, found >> 8 | ONE_SYMBOL));
            run.advance(start);
        }
    } while (!run.done());
    const u32 count = symbols_of(run.position);
    if (count / 4 <= WORDS) slot[count / 4] = run.pending;
    const u32 starts = first.y >> STARTS | (second.y >> STARTS) << (first.y & 31);  // from `before` on
    return count - __popc(starts >> min(RUN_BITS - bit_of(before), 31u));           // less those after the run
}

// Move the symbols of the warp's slots together in place: the warp's first one to byte `phase` of the slots.
// A run has four symbols at least (31 + 3 * 32 < 128), so a word holds symbols of two runs at most: the later one
// writes it, and gets the other's last symbols by a shuffle.
template <u32 WORDS>
DEVICE void compact(u32* slots, u32 phase, u32 offset, u32 count) {
    const u32* const slot = slots + lane_id() * (WORDS + 1);
    u32 words[WORDS];
#pragma unroll
    for (u32 k = 0; k < WORDS; ++k) words[k] = slot[k];
    const u32 start = phase + offset, end = start + count, left = (count - 4) / 4;
    const u32 last_four = __funnelshift_r(slot[left], slot[left + 1], 8 * count);
    const u32 rest = __funnelshift_l(last_four, 0, 8 * end);  // symbols after the last full word
    u32 before = __shfl_up_sync(ALL, rest, 1);
    if (lane_id() == 0) before = 0;  // the warp before has them, in slots of its own
    __syncwarp();
    u32* const to = slots + start / 4;
    const u32 full = end / 4 - start / 4;
#pragma unroll
    for (u32 k = 0; k < WORDS; ++k) {
        const u32 word = __funnelshift_l(k ? words[k - 1] : 0, words[k], 8 * start);
        if (k < full) to[k] = k ? word : word | before;
    }
    if (lane_id() == WARP - 1) slots[end / 4] = rest;
    __syncwarp();
}

// Two words of two BF16 each, from four symbols and four bytes of sign and mantissa. A symbol is an exponent turned
// right by a bit, so that its bits stand where they go, but for the top one, which changes places with the sign.
DEVICE uint2 four_bf16(u32 symbols, u32 rest) {
    const u32 swapped = (symbols ^ rest) & 0x80808080, high = symbols ^ swapped, low = rest ^ swapped;
    return make_uint2(__byte_perm(low, high, 0x5140), __byte_perm(low, high, 0x7362));
}

// Write the weights first..last, whose symbols stand in `symbols` from byte `first % 8` on.
DEVICE void write_weights(const u8* symbols, const u8* rest, u16* out, u32 first, u32 last) {
    const u32 base = first / 8, inner = (first + 7) / 8, outer = last / 8;  // eights: of the first, whole ones
    const u32 i = lane_id() < 8 ? 8 * base + lane_id() : 8 * outer + lane_id() - 8;
    const bool head = lane_id() < 8 && i >= first && i < 8 * inner;
    const bool tail = lane_id() >= 8 && lane_id() < 16 && outer >= inner;
    if ((head || tail) && i < last) out[i] = static_cast<u16>(four_bf16(symbols[i - 8 * base], rest[i]).x);
    const uint2* eights = reinterpret_cast<const uint2*>(symbols) + (inner - base + lane_id());
    const uint2* rests = reinterpret_cast<const uint2*>(rest) + (inner + lane_id());
    uint4* to = reinterpret_cast<uint4*>(out) + (inner + lane_id());
#pragma unroll 4
    for (i32 left = outer - inner - lane_id(); left > 0; left -= WARP, eights += WARP, rests += WARP, to += WARP) {
        const uint2 e = *eights, r = __ldg(rests);
        const uint2 a = four_bf16(e.x, r.x), b = four_bf16(e.y, r.y);
        *to = make_uint4(a.x, a.y, b.x, b.y);
    }
}

// The gap of a cell of a block, from the block's packed gaps.
DEVICE u32 gap_of(const u8* gaps, u32 cell) {
    const u32 bit = 5 * cell, high = gaps[bit / 8], low = bit % 8 > 3 ? gaps[bit / 8 + 1] : 0;
    return (high << 8 | low) >> (11 - bit % 8) & 31;
}

// Bring `bytes` of tables, a multiple of 16, to shared memory; the block's threads go on together.
DEVICE void copy_tables(u8* to, const u8* tables, u32 bytes) {
#pragma unroll 1
    for (u32 k = 16 * threadIdx.x; k < bytes; k += 16 * blockDim.x) copy_async(to + k, tables + k);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
}

struct Stream {
    const u8* tables;        // 2^PEEK entries of 8 bytes, then look-up rows of 512 bytes
    const uint4* bytes;      // 4096 a block, and 16 more
    const u8* gaps;          // 320 a block
    const u32* positions;    // weights before each block, and in all
    const u8* rest;          // a byte a weight
    u16* out;
};

// WORDS: of a slot, with symbols; the one more is for what the last look decodes behind the run, and an odd number of
// words spreads the slots of a warp over all banks.
template <u32 WORDS>
DEVICE void decode_blocks(const Stream& from, u32 table_bytes, u32 weights, u32 blocks, u8* shared) {
    __shared__ u32 totals[2][WARPS];
    copy_tables(shared, from.tables, table_bytes);
    const uint2* const entries = reinterpret_cast<const uint2*>(shared);
    const u16* const rows = reinterpret_cast<const u16*>(shared + ENTRIES_BYTES);
    u32* const slots = reinterpret_cast<u32*>(shared + table_bytes) + warp_id() * WARP * (WORDS + 1);
    u32 turn = 0;
    for (u32 block = blockIdx.x; block < blocks; block += gridDim.x, turn ^= 1) {
        const u32 gap = gap_of(from.gaps + static_cast<u64>(GAP_BYTES) * block, 2 * threadIdx.x);
        const uint4* const bytes = from.bytes + static_cast<u64>(RUNS) * block + threadIdx.x;
        Run run = load_run(bytes, gap, slots + lane_id() * (WORDS + 1));
        u32 first = from.positions[block];
        const u32 end = min(from.positions[block + 1], weights);
        const u32 count = decode_run<WORDS>(run, entries, rows);
        const u32 offset = warp_exclusive_sum(count);
        const u32 total = __shfl_sync(ALL, offset + count, WARP - 1);
        if (lane_id() == 0) totals[turn][warp_id()] = total;
        __syncthreads();  // the only one of a turn: the next one's totals are others
#pragma unroll
        for (u32 warp = 0; warp < WARPS - 1; ++warp) first += warp < warp_id() ? totals[turn][warp] : 0;
        compact<WORDS>(slots, first % 8, offset, count);
        const u32 last = min(first + total, end);
        if (first < last) write_weights(reinterpret_cast<const u8*>(slots), from.rest, from.out, first, last);
        __syncwarp();
    }
}

extern __shared__ __align__(16) u8 shared[];

// For codes of 2 bits or more: up to 64 symbols a run.
extern "C" __global__ void __launch_bounds__(256, RESIDENT)
    decode_64(const u8* tables, u32 table_bytes, const uint4* stream, const u8* gaps, const u32* positions,
              const u8* rest, u16* out, u32 weights, u32 blocks) {
    decode_blocks<16>({tables, stream, gaps, positions, rest, out}, table_bytes, weights, blocks, shared);
}

// For any codes: up to 128 symbols a run.
extern "C" __global__ void __launch_bounds__(256, 4)
    decode_128(const u8* tables, u32 table_bytes, const uint4* stream, const u8* gaps, const u32* positions,
               const u8* rest, u16* out, u32 weights, u32 blocks) {
    decode_blocks<32>({tables, stream, gaps, positions, rest, out}, table_bytes, weights, blocks, shared);
}

// A cell, its code by code: `limit` codes at most, and none that starts after it.
struct Cell {
    u32 words[3];
    u32 gap;

    // Sets `end` to the bit after the last code. Returns the number of codes; where bits are no code, ALL.
    METHOD u32 decode(const u16* rows, u32 limit, u32& end) const {
        u32 count = 0, bit = gap;
        bool resolved = true;
        for (; bit < CELL_BITS && count < limit; ++count) {
            const bool low = bit < 32;
            const u32 step = walk(rows, __funnelshift_l(low ? words[1] : words[2], low ? words[0] : words[1], bit));
            resolved = resolved && step != UNRESOLVED;
            bit += step >> 8;
        }
        end = bit;
        return resolved ? count : ALL;
    }
};

// Whether the `wanted` codes of a block end where its gaps say, and none of them after the stream. `more`: codes follow
// in the next block. `start`: weights of the block before the cell; `count`: codes that start in it.
DEVICE bool fits(const Cell& cell, const u16* rows, const u8* gaps, u64 at, u64 bits, u32 start, u32 count, u32 wanted,
                 bool more) {
    const u32 left = start < wanted ? wanted - start : 0;
    const bool last = at % CELLS == CELLS - 1;
    if (last && (more ? count != left : count < left)) return false;
    u32 end = 0;
    if (cell.decode(rows, left, end) == ALL) return false;
    if (count > left) return !more && (left == 0 || CELL_BITS * at + end <= bits);
    if (count < left || more) return end - CELL_BITS == gap_of(gaps + GAP_BYTES * ((at + 1) / CELLS), (at + 1) % CELLS);
    return count == 0 || CELL_BITS * at + end <= bits;
}

// Look whether blocks are what their tables, gaps and positions say. A block that is not, b, makes `status` at least
// 2^32 - 1 - b. One thread a cell, one block of threads a block.
extern "C" __global__ void __launch_bounds__(512)
    check(const u8* tables, u32 table_bytes, const uint2* stream, const u8* gaps, const u32* positions,
          u32 weights, u64 stream_bytes, u32 blocks, u32* status) {
    __shared__ u32 totals[CELLS / WARP];
    copy_tables(shared, tables + ENTRIES_BYTES, table_bytes - ENTRIES_BYTES);
    const u16* const rows = reinterpret_cast<const u16*>(shared);
    const u32 block = blockIdx.x;
    const u64 at = static_cast<u64>(CELLS) * block + threadIdx.x;
    const uint2 own = stream[at], next = stream[at + 1];
    const u32 gap = gap_of(gaps + static_cast<u64>(GAP_BYTES) * block, threadIdx.x);
    const Cell cell = {{big_endian(own.x), big_endian(own.y), big_endian(next.x)}, gap};
    u32 end = 0;
    u32 count = cell.decode(rows, CELL_BITS, end);
    if (count == ALL) count = CELL_BITS;  // enough to be looked at, and too many to be right before the last block
    const u32 offset = warp_exclusive_sum(count);
    if (lane_id() == WARP - 1) totals[warp_id()] = offset + count;
    __syncthreads();
    u32 start = offset;
    for (u32 warp = 0; warp < warp_id(); ++warp) start += totals[warp];
    const u32 wanted = positions[block + 1] - positions[block];
    const bool more = positions[block + 1] < weights;
    if (!fits(cell, rows, gaps, at, 8 * stream_bytes, start, count, wanted, more)) atomicMax(status, ALL - block);
}
