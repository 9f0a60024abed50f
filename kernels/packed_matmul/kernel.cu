// y = x W^T + b for few rows of x, where W is packed (layout.py) or plain BF16; and packed weights made plain again.
//
// A tile is 16 rows of W by 64 columns, one step of a warp. W is the left operand of the tensor cores, x the right one:
// 16 rows of W times 8 rows of x. Which column is which k of an instruction is ours to say, if only both sides agree:
// with g = lane / 4 and t = lane % 4 a lane holds rows g and g + 8, columns 8t .. 8t+7 and 32+8t .. 32+8t+7, so that
// plain rows and x are read 16 bytes a lane, four lanes 64 neighbouring bytes.
//
//     memory --copies in the background--> ring of tiles, a warp's own --> registers --decode--> 4 x mma --> sums
//
// A warp waits for its own copies alone; warps meet when their sums are added, in a fixed order. Plain and packed
// weights differ in how they come to be operands and in nothing that follows, so their results have the same bits.
#include "tcw.cuh"

constexpr u32 RAW = 16, P3 = 11, P4 = 12;  // the bits of a weight, without escapes
constexpr u32 STAGES = 4;                  // tiles of the ring; all but one are under way
constexpr u32 HALF = 512;                  // weights, and bytes of one plane, of half a tile
constexpr u32 SIGNS = 0x80808080u;

DEVICE constexpr u32 tile_bytes(u32 form) { return 128 * form; }
DEVICE constexpr u32 staged_escapes(u32 form) { return form == P3 ? 64 : form == P4 ? 16 : 0; }  // brought with a tile
DEVICE constexpr u32 slot_bytes(u32 form) { return tile_bytes(form) + 2 * staged_escapes(form); }
DEVICE constexpr u32 warps_of(u32 wide) { return 8 / wide; }
DEVICE constexpr u32 warp_bytes(u32 form, u32 wide) {
    return STAGES * wide * slot_bytes(form) + (form == RAW ? 0 : 2 * HALF);
}

struct Weights {
    const u8* tiles;     // [n / 16][k / 64] tiles; plain: BF16 [n][k]
    const u32* index;    // a tile: escapes in each half, and where they begin after those of `base`
    const u32* base;     // four tiles: their first escape
    const u16* escapes;  // place in the half, and bits 14..8 of the weight
    u32 low, high;       // the palette: bits 14..8 of a weight, by code
};

struct Shape {
    u32 m, n, k;
    __device__ __forceinline__ u32 n_tiles() const { return (n + 15) / 16; }
    __device__ __forceinline__ u32 k_tiles() const { return (k + 63) / 64; }
};

// Where a lane's weights are in a tile.
DEVICE u32 row_of(u32 part) { return lane_id() / 4 + 8 * part; }
DEVICE u32 column_of(u32 half) { return 32 * half + 8 * (lane_id() % 4); }

// The escapes of a tile: where they begin, and how many its halves have.
struct Spot {
    u32 start, word;
    __device__ __forceinline__ u32 first() const { return word & 1023; }
    __device__ __forceinline__ u32 count() const { return (word & 1023) + (word >> 10 & 1023); }
};

DEVICE Spot locate(const Weights& w, u32 tile) {
    const u32 word = w.index[tile];
    return {w.base[tile / 4] + (word >> 20), word};
}

// Start copying a plain tile to shared memory.
DEVICE void fetch_plain(u8* to, const Weights& w, const Shape& s, u32 n_tile, u32 k_tile) {
    uint4* const pieces = reinterpret_cast<uint4*>(to) + lane_id();
    const u16* const rows = reinterpret_cast<const u16*>(w.tiles);
#pragma unroll
    for (u32 p = 0; p < 4; ++p) {
        const u32 row = 16 * n_tile + row_of(p % 2), column = 64 * k_tile + column_of(p / 2);
        if (row < s.n && column < s.k) {
            copy_async(pieces + WARP * p, rows + static_cast<u64>(row) * s.k + column);
        } else {
            pieces[WARP * p] = make_uint4(0, 0, 0, 0);
        }
    }
}

// Start copying a packed tile to shared memory; this lane's first piece is at `from`.
template <u32 FORM>
DEVICE void fetch_packed(u8* to, const uint4* from) {
    uint4* const pieces = reinterpret_cast<uint4*>(to) + lane_id();
#pragma unroll
    for (u32 p = 0; p < tile_bytes(FORM) / 16; p += WARP) {
        if (p + lane_id() < tile_bytes(FORM) / 16) copy_async(pieces + p, from + p);
    }
}

// Start copying a tile's first escapes behind it, from the last multiple of 8 on.
template <u32 FORM>
DEVICE void fetch_escapes(u8* to, const Weights& w, const Spot& spot) {
    const u32 used = spot.count() == 0 ? 0 : spot.start % 8 + spot.count(), at = 8 * lane_id();
    if (at < min(used, staged_escapes(FORM))) {
        copy_async(to + tile_bytes(FORM) + 2 * at, w.escapes + spot.start / 8 * 8 + at);
    }
}

// Put escapes among the decoded bytes of a tile: byte b of upper[q] is weight 4q + b of this lane. `staged` holds the
// first escapes, from the last multiple of 8 on.
DEVICE void patch(u32 (&upper)[8], u8* plane, const Weights& w, const Spot& spot, const u16* staged, u32 room) {
    uint4* const mine = reinterpret_cast<uint4*>(plane) + lane_id();
    mine[0] = make_uint4(upper[0], upper[1], upper[2], upper[3]);
    mine[WARP] = make_uint4(upper[4], upper[5], upper[6], upper[7]);
    __syncwarp(ALL);
#pragma unroll 1
    for (u32 i = lane_id(); i < spot.count(); i += WARP) {
        const u32 near = spot.start % 8 + i;
        const u32 escape = near < room ? staged[near] : w.escapes[spot.start + i];
        plane[(i >= spot.first() ? HALF : 0) + escape % HALF] = static_cast<u8>(escape / HALF);
    }
    __syncwarp(ALL);
    const uint4 p = mine[0], q = mine[WARP];
    upper[0] = p.x, upper[1] = p.y, upper[2] = p.z, upper[3] = p.w;
    upper[4] = q.x, upper[5] = q.y, upper[6] = q.z, upper[7] = q.w;
}

// Four weights of one row from their signs (the top bit of each byte), bits 14..8 and low bytes.
DEVICE void join(u32 (&a)[4], u32 part, u32 signs, u32 upper, u32 low) {
    const u32 high = (signs & SIGNS) | upper;
    a[part] = __byte_perm(low, high, 0x5140);
    a[part + 2] = __byte_perm(low, high, 0x7362);
}

// A packed tile, in shared or global memory, as left operands of four instructions; `room` escapes may be behind it.
template <u32 FORM>
DEVICE void decode(u32 (&a)[4][4], const u8* tile, u8* plane, const Weights& w, const Spot& spot, u32 room) {
    const uint4* const pieces = reinterpret_cast<const uint4*>(tile);
    const uint4 p = pieces[lane_id()], q = pieces[WARP + lane_id()];
    const u32 low[8] = {p.x, p.y, p.z, p.w, q.x, q.y, q.z, q.w};
    u32 upper[8], signs[8];
    if constexpr (FORM == P4) {
        const uint4 c = pieces[2 * WARP + lane_id()];
        const u32 codes[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            const u32 chosen = codes[j] & 0x77777777u;
            upper[2 * j] = __byte_perm(w.low, w.high, chosen);
            upper[2 * j + 1] = __byte_perm(w.low, w.high, chosen >> 16);
            signs[2 * j] = codes[j];
            signs[2 * j + 1] = codes[j] << 4;
        }
    } else {
        const u32* const words = reinterpret_cast<const u32*>(pieces + 2 * WARP) + lane_id();
        const u32 codes[2] = {words[0], words[WARP]}, sign = words[2 * WARP];
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            const u32 chosen = codes[j / 2] >> 2 * (j % 2) & 0x33333333u;
            upper[2 * j] = __byte_perm(w.low, 0, chosen);
            upper[2 * j + 1] = __byte_perm(w.low, 0, chosen >> 16);
            signs[2 * j] = sign << (7 - 2 * j);
            signs[2 * j + 1] = sign << (6 - 2 * j);
        }
    }
    if (spot.count() != 0) {
        patch(upper, plane, w, spot, reinterpret_cast<const u16*>(tile + tile_bytes(FORM)), room);
    }
#pragma unroll
    for (u32 i = 0; i < 8; ++i) join(a[i / 2], i % 2, signs[i], upper[i], low[i]);
}

// The same operands out of a plain tile.
DEVICE void plain(u32 (&a)[4][4], const u8* tile) {
    const uint4* const pieces = reinterpret_cast<const uint4*>(tile);
#pragma unroll
    for (u32 p = 0; p < 4; ++p) {
        const uint4 v = pieces[WARP * p + lane_id()];
        const u32 part = p % 2, j = p / 2 * 2;
        a[j][part] = v.x, a[j][part + 2] = v.y;
        a[j + 1][part] = v.z, a[j + 1][part + 2] = v.w;
    }
}

// float32 to BF16, every NaN to the same one: how a NaN got its payload is no business of the result.
DEVICE u16 rounded(float value) { return value == value ? to_bf16(value) : 0x7FFFu; }

// What `WIDE` tiles of rows, one below the other, give with 8 WIDE rows of x over a range of columns.
template <u32 FORM, u32 WIDE>
struct Product {
    const Weights& w;
    const Shape& s;
    const u16* x;
    u8* ring;  // this warp's own: STAGES * WIDE slots, then room for patch()
    u32 n_tile[WIDE];
    const uint4* next[WIDE];  // a lane's part of the next packed tile to copy
    const uint4* here[WIDE];  // and of the columns of x at hand
    u32 window;       // its 32 tiles from here on have their escapes
    Spot spot[WIDE];  // at lane i those of tile window + i
    float sums[WIDE][WIDE][4];  // [tile of W][8 rows of x]

    __device__ __forceinline__ void run(u32 first, u32 last) {
#pragma unroll
        for (u32 i = 0; i < WIDE; ++i) {
            n_tile[i] = min(blockIdx.x * WIDE + i, s.n_tiles() - 1);  // the last one again rather than none
            const u64 tile = static_cast<u64>(n_tile[i]) * s.k_tiles() + first, row = row_of(i);
            next[i] = reinterpret_cast<const uint4*>(w.tiles + tile * tile_bytes(FORM)) + lane_id();
            here[i] = reinterpret_cast<const uint4*>(x + row * 64 * s.k_tiles() + 64 * first + column_of(0));
#pragma unroll
            for (u32 j = 0; j < WIDE * 4; ++j) sums[i][j / 4][j % 4] = 0.0f;
        }
        if (first >= last) return;
        for (u32 i = 0; i < STAGES - 1; ++i) start(i, first + i, last);
        look_up(first, last);
        for (u32 i = 0; i < STAGES - 1; ++i) finish(i, first + i, last);
        u32 stage = 0;
        for (u32 tile = first; tile < last; ++tile) {
            if (FORM != RAW && tile + STAGES > window + WARP) look_up(tile, last);
            copy_wait<STAGES - 2>();
            __syncwarp(ALL);  // the tile is there for all lanes, and all have read the one before
            start((stage + STAGES - 1) % STAGES, tile + STAGES - 1, last);
            finish((stage + STAGES - 1) % STAGES, tile + STAGES - 1, last);
            step(stage, tile);
            stage = (stage + 1) % STAGES;
        }
    }

    __device__ __forceinline__ void look_up(u32 tile, u32 last) {
        window = tile;
        if constexpr (FORM != RAW) {
#pragma unroll
            for (u32 i = 0; i < WIDE; ++i) {
                spot[i] = locate(w, n_tile[i] * s.k_tiles() + min(tile + lane_id(), last - 1));
            }
        }
    }

    __device__ __forceinline__ Spot spot_of(u32 i, u32 tile) const {
        return {__shfl_sync(ALL, spot[i].start, tile - window), __shfl_sync(ALL, spot[i].word, tile - window)};
    }

    __device__ __forceinline__ void start(u32 stage, u32 tile, u32 last) {
#pragma unroll
        for (u32 i = 0; i < WIDE; ++i) {
            if (tile >= last) continue;
            if constexpr (FORM == RAW) {
                fetch_plain(slot(stage, i), w, s, n_tile[i], tile);
            } else {
                fetch_packed<FORM>(slot(stage, i), next[i]);
                next[i] += tile_bytes(FORM) / 16;
            }
        }
    }

    __device__ __forceinline__ void finish(u32 stage, u32 tile, u32 last) const {
        if constexpr (FORM != RAW) {
#pragma unroll
            for (u32 i = 0; i < WIDE; ++i) {
                if (tile < last) fetch_escapes<FORM>(slot(stage, i), w, spot_of(i, tile));
            }
        }
        copy_commit();
    }

    __device__ __forceinline__ u8* slot(u32 stage, u32 i) const { return ring + (stage * WIDE + i) * slot_bytes(FORM); }

    __device__ __forceinline__ void step(u32 stage, u32 tile) {
        uint4 b[WIDE][2];
#pragma unroll
        for (u32 i = 0; i < WIDE; ++i) {
            b[i][0] = row_of(i) < s.m ? here[i][0] : make_uint4(0, 0, 0, 0);
            b[i][1] = row_of(i) < s.m ? here[i][4] : make_uint4(0, 0, 0, 0);
            here[i] += 8;
        }
#pragma unroll
        for (u32 i = 0; i < WIDE; ++i) {
            u32 a[4][4];
            if constexpr (FORM == RAW) {
                __syncwarp(ALL);  // keeps the compiler from doing all tiles at once: too many registers before 8.0
                plain(a, slot(stage, i));
            } else {
                decode<FORM>(a, slot(stage, i), slot(STAGES, 0), w, spot_of(i, tile), staged_escapes(FORM));
            }
#pragma unroll
            for (u32 j = 0; j < 2 * WIDE; ++j) {
                const uint4 v = b[j / 2][j % 2];
                const u32 left[2] = {v.x, v.y}, right[2] = {v.z, v.w};
                mma_bf16(sums[i][j / 2], a[j % 2 * 2], left);
                mma_bf16(sums[i][j / 2], a[j % 2 * 2 + 1], right);
            }
        }
    }
};

// One block: `WIDE` tiles of rows and the share blockIdx.y of the columns, which its warps share out among them.
template <u32 FORM, u32 WIDE>
DEVICE void multiply(const Weights& w, const Shape& s, const u16* x, const u16* bias, u16* y, float* partial) {
    extern __shared__ __align__(16) u8 shared[];
    constexpr u32 WARPS = warps_of(WIDE), ROWS = 16 * WIDE, COLUMNS = 8 * WIDE;
    const u32 tiles = s.k_tiles(), begin = blockIdx.y * tiles / gridDim.y, end = (blockIdx.y + 1) * tiles / gridDim.y;
    const u32 first = begin + warp_id() * (end - begin) / WARPS, last = begin + (warp_id() + 1) * (end - begin) / WARPS;
    Product<FORM, WIDE> product = {w, s, x, shared + warp_id() * warp_bytes(FORM, WIDE)};
    product.run(first, last);
    copy_wait<0>();
    __syncthreads();  // no ring is in use
    float* const sums = reinterpret_cast<float*>(shared);
    float* const own = sums + warp_id() * ROWS * COLUMNS;
#pragma unroll
    for (u32 i = 0; i < WIDE * WIDE * 4; ++i) {
        const u32 tile = i / 4 / WIDE, eight = i / 4 % WIDE, row = lane_id() / 4 + i % 4 / 2 * 8;
        own[(16 * tile + row) * COLUMNS + 8 * eight + lane_id() % 4 * 2 + i % 2] = product.sums[tile][eight][i % 4];
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < ROWS * COLUMNS; i += WARPS * WARP) {
        const u32 row = i / ROWS, local = i % ROWS, column = blockIdx.x * ROWS + local;
        if (row >= s.m || column >= s.n) continue;
        float sum = 0.0f;
#pragma unroll
        for (u32 warp = 0; warp < WARPS; ++warp) sum += sums[warp * ROWS * COLUMNS + local * COLUMNS + row];
        if (partial != nullptr) {
            partial[(static_cast<u64>(blockIdx.y) * s.m + row) * s.n + column] = sum;
        } else {
            y[static_cast<u64>(row) * s.n + column] = rounded(bias == nullptr ? sum : sum + from_bf16(bias[column]));
        }
    }
}

// x BF16 [m, k up to a multiple of 64, there 0], y BF16 [m, n], bias BF16 [n] or null; where partial float32
// [gridDim.y, m, n] is not null, it is written instead of y. Plain W has a k that is a multiple of 8.
// The grid is (tiles of rows / WIDE, shares of the columns); m <= 8 WIDE.
extern "C" __global__ void __launch_bounds__(256, 2)
    raw_narrow(const u8* weight, const u16* x, const u16* bias, u16* y, float* partial, u32 m, u32 n, u32 k) {
    multiply<RAW, 1>({weight, nullptr, nullptr, nullptr, 0, 0}, {m, n, k}, x, bias, y, partial);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    raw_wide(const u8* weight, const u16* x, const u16* bias, u16* y, float* partial, u32 m, u32 n, u32 k) {
    multiply<RAW, 2>({weight, nullptr, nullptr, nullptr, 0, 0}, {m, n, k}, x, bias, y, partial);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    p4_narrow(const u8* tiles, const u32* index, const u32* base, const u16* escapes, u32 low, u32 high, const u16* x,
              const u16* bias, u16* y, float* partial, u32 m, u32 n, u32 k) {
    multiply<P4, 1>({tiles, index, base, escapes, low, high}, {m, n, k}, x, bias, y, partial);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    p4_wide(const u8* tiles, const u32* index, const u32* base, const u16* escapes, u32 low, u32 high, const u16* x,
            const u16* bias, u16* y, float* partial, u32 m, u32 n, u32 k) {
    multiply<P4, 2>({tiles, index, base, escapes, low, high}, {m, n, k}, x, bias, y, partial);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    p3_narrow(const u8* tiles, const u32* index, const u32* base, const u16* escapes, u32 low, u32 high, const u16* x,
              const u16* bias, u16* y, float* partial, u32 m, u32 n, u32 k) {
    multiply<P3, 1>({tiles, index, base, escapes, low, high}, {m, n, k}, x, bias, y, partial);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    p3_wide(const u8* tiles, const u32* index, const u32* base, const u16* escapes, u32 low, u32 high, const u16* x,
            const u16* bias, u16* y, float* partial, u32 m, u32 n, u32 k) {
    multiply<P3, 2>({tiles, index, base, escapes, low, high}, {m, n, k}, x, bias, y, partial);
}

// Add the shares of the columns, in their order: partial float32 [splits, m * n], bias [n] or null, y [m * n].
extern "C" __global__ void __launch_bounds__(256)
    reduce(const float* partial, const u16* bias, u16* y, u32 outputs, u32 n, u32 splits) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= outputs) return;
    float sum = 0.0f;
    for (u32 split = 0; split < splits; ++split) sum += partial[static_cast<u64>(split) * outputs + i];
    y[i] = rounded(bias == nullptr ? sum : sum + from_bf16(bias[i % n]));
}

// A warp makes one tile plain again: out BF16 [n, k]. Dynamic shared memory: 1024 bytes a warp.
template <u32 FORM>
DEVICE void expand(const Weights& w, const Shape& s, bool aligned, u16* out) {
    extern __shared__ __align__(16) u8 shared[];
    const u32 tile = blockIdx.x * (blockDim.x / WARP) + warp_id();
    if (tile >= s.n_tiles() * s.k_tiles()) return;
    u32 a[4][4];
    const Spot spot = locate(w, tile);
    const u8* const from = w.tiles + static_cast<u64>(tile) * tile_bytes(FORM);
    decode<FORM>(a, from, shared + warp_id() * 2 * HALF, w, spot, 0);
    const u32 n_tile = tile / s.k_tiles(), k_tile = tile % s.k_tiles();
#pragma unroll
    for (u32 p = 0; p < 4; ++p) {
        const u32 part = p % 2, j = p / 2 * 2;
        const u32 row = 16 * n_tile + row_of(part), column = 64 * k_tile + column_of(p / 2);
        if (row >= s.n || column >= s.k) continue;
        u16* const to = out + static_cast<u64>(row) * s.k + column;
        const u32 word[4] = {a[j][part], a[j][part + 2], a[j + 1][part], a[j + 1][part + 2]};
        if (aligned) {
            *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
        } else {
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
                if (column + i < s.k) to[i] = static_cast<u16>(word[i / 2] >> i % 2 * 16);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
    p4_unpack(const u8* tiles, const u32* index, const u32* base, const u16* escapes, u32 low, u32 high, u16* out,
              u32 n, u32 k, u32 aligned) {
    expand<P4>({tiles, index, base, escapes, low, high}, {0, n, k}, aligned != 0, out);
}

extern "C" __global__ void __launch_bounds__(256)
    p3_unpack(const u8* tiles, const u32* index, const u32* base, const u16* escapes, u32 low, u32 high, u16* out,
              u32 n, u32 k, u32 aligned) {
    expand<P3>({tiles, index, base, escapes, low, high}, {0, n, k}, aligned != 0, out);
}
