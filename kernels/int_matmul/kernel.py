"""The Triton kernels: y[m, n] = Σ_k x[m, k] W[n, k] + b[n], with W as layout.py lays it out.

A weight is s·c + t, where c is the code less 2^(bits - 1), and s and t belong to the code's group: so each group costs

    y  +=  s · Σ x·c   +   t · Σ x                              t = 0 on the symmetric grid

and its scale is used once. Everything is summed in float32. A program takes some columns of W's transpose and a share
of the tiles along K; where K is shared out, it writes a partial sum of its own, and `reduce` adds them up in order:
the same bits at each run. A tile is up to BLOCK_W words of one group. The launcher (launch.py) says how many.

    `gemv`        up to 4 rows of x: multiplies and adds, as a product with a vector is bound by reading words
    `gemm`        5 to 64 rows: tensor cores
    `dequantize`  writes W transposed, for a plain matrix product above that
    `reduce`      adds partial sums, and the bias

README.md says why a code becomes a float without a conversion.
"""

import triton
import triton.language as tl


@triton.jit
def _scale_and_shift(scale_ptr, zero_ptr, at, mask, BITS: tl.constexpr, GRID: tl.constexpr):
    """The s and t of a group, float32, for the columns at `at`."""
    s = tl.load(scale_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if GRID == "midrise":
        t = 0.5 * s
    elif GRID == "zero":
        t = ((1 << (BITS - 1)) - tl.load(zero_ptr + at, mask=mask, other=0).to(tl.float32)) * s
    elif GRID == "float":
        t = tl.load(zero_ptr + at, mask=mask, other=0.0).to(tl.float32) + (1 << (BITS - 1)) * s
    else:
        t = 0.0 * s
    return s, t


@triton.jit
def gemv(  # noqa: PLR0913
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    M, N, K, group_size, words_per_group, tiles_per_group, tiles, tiles_per_program,
    BITS: tl.constexpr, GRID: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[split, m, n], float32, or y itself where there is one split; x is [M, K], M <= BLOCK_M."""
    HALF: tl.constexpr = 16 // BITS
    # everything has three axes, [m, word, n], from its load on: so that no thread hands values to another in the loop
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, None, :]
    m = tl.arange(0, BLOCK_M)[:, None, None]
    first = tl.program_id(1) * tiles_per_program
    acc = tl.zeros([BLOCK_M, BLOCK_W, BLOCK_N], tl.float32)
    for tile in range(first, min(first + tiles_per_program, tiles)):
        group = tile // tiles_per_group
        row = ((tile % tiles_per_group) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :, None]
        limit = min(group_size, K - group * group_size)  # columns of this group; the last one may have fewer
        at = (group * words_per_group + row).to(tl.int64) * N + n
        words = tl.load(words_ptr + at, mask=(row * (2 * HALF) < limit) & (n < N), other=0)
        # a scale for each word, though those of a column are the same: so they lie in the threads that have the words
        s, t = _scale_and_shift(scale_ptr, zero_ptr, group * N + n + 0 * row, (n < N) & (row >= 0), BITS, GRID)
        dot = tl.zeros([BLOCK_M, BLOCK_W, BLOCK_N], tl.float32)
        x_sum = tl.zeros([BLOCK_M, BLOCK_W, 1], tl.float32)
        for half in tl.static_range(2):
            bits = words >> (16 * half)
            for i in tl.static_range(HALF):
                k = row * (2 * HALF) + half * HALF + i
                x = tl.load(x_ptr + m * K + group * group_size + k, mask=(m < M) & (k < limit), other=0.0)
                x = x.to(tl.float32)
                # the code stays where it is in the word: 2^23 + c·2^(bits·i) is exact, and x takes the power of two
                field = bits & (((1 << BITS) - 1) << (BITS * i))
                c = (field | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + (1 << (BITS - 1 + BITS * i)))
                dot += (x * (1.0 / (1 << (BITS * i)))) * c
                x_sum += x
        acc += s * dot
        if GRID != "symmetric":
            acc += t * x_sum
    y = tl.sum(acc, axis=1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    at = (tl.program_id(1) * M + m)[:, None] * N + n[None, :]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def gemm(  # noqa: PLR0913
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    M, N, K, group_size, words_per_group, tiles_per_group, tiles, tiles_per_program,
    BITS: tl.constexpr, GRID: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As `gemv`, on tensor cores: codes are exact in the dtype of x, products and sums are float32.

    WIDE: multiply in float32, for Triton's interpreter, which cannot multiply BF16.
    """
    HALF: tl.constexpr = 16 // BITS
    FIELDS: tl.constexpr = 16 if BITS < 4 else 2 * HALF  # a power of two; words of 3 bits have 10 codes
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    in_n, in_m = n < N, m < M
    field = tl.arange(0, FIELDS)
    shift = (BITS * (field % HALF) + 16 * (field // HALF)) & 31
    place = tl.arange(0, BLOCK_W * FIELDS)
    first = tl.program_id(1) * tiles_per_program
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(first, min(first + tiles_per_program, tiles)):
        group = tile // tiles_per_group
        first_row = (tile % tiles_per_group) * BLOCK_W
        row = first_row + tl.arange(0, BLOCK_W)
        limit = min(group_size, K - group * group_size)
        at = (group * words_per_group + row).to(tl.int64)[:, None] * N + n[None, :]
        words = tl.load(words_ptr + at, mask=(row * (2 * HALF) < limit)[:, None] & in_n[None, :], other=0)
        c = ((words[:, None, :] >> shift[None, :, None]) & ((1 << BITS) - 1)) | 0x4B000000
        c = tl.reshape(c, [BLOCK_W * FIELDS, BLOCK_N]).to(tl.float32, bitcast=True) - (8388608.0 + (1 << (BITS - 1)))
        k = (first_row + place // FIELDS) * (2 * HALF) + place % FIELDS
        known = (place % FIELDS < 2 * HALF) & (k < limit)
        x_at = m[:, None] * K + (group * group_size + k)[None, :]
        x = tl.load(x_ptr + x_at, mask=in_m[:, None] & known[None, :], other=0.0)
        if WIDE:
            x = x.to(tl.float32)
        s, t = _scale_and_shift(scale_ptr, zero_ptr, group * N + n, in_n, BITS, GRID)
        acc += s[None, :] * tl.dot(x, c.to(x.dtype), input_precision="ieee")
        if GRID != "symmetric":
            acc += t[None, :] * tl.sum(x.to(tl.float32), axis=1)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    at = (tl.program_id(1) * M + m)[:, None] * N + n[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=in_m[:, None] & in_n[None, :])


@triton.jit
def dequantize(  # noqa: PLR0913
    words_ptr, scale_ptr, zero_ptr, out_ptr, N, K, group_size, words_per_group, tiles_per_group,
    BITS: tl.constexpr, GRID: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[k, n] = W[n, k], rounded to the dtype of out; one tile a program."""
    HALF: tl.constexpr = 16 // BITS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    group = tl.program_id(1) // tiles_per_group
    row = (tl.program_id(1) % tiles_per_group) * BLOCK_W + tl.arange(0, BLOCK_W)
    limit = min(group_size, K - group * group_size)
    at = (group * words_per_group + row).to(tl.int64)[:, None] * N + n[None, :]
    words = tl.load(words_ptr + at, mask=(row * (2 * HALF) < limit)[:, None] & in_n[None, :], other=0)
    s, t = _scale_and_shift(scale_ptr, zero_ptr, group * N + n, in_n, BITS, GRID)
    for i in tl.static_range(2 * HALF):
        field = (words >> (BITS * (i % HALF) + 16 * (i // HALF))) & ((1 << BITS) - 1)
        c = (field | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + (1 << (BITS - 1)))
        k = row * (2 * HALF) + i
        column = group * group_size + k
        known = k < limit
        value = (c * s[None, :] + t[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + column.to(tl.int64)[:, None] * N + n[None, :], value, mask=known[:, None] & in_n[None, :])


@triton.jit
def reduce(partial_ptr, bias_ptr, out_ptr, size, N, splits, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = Σ partial[split, i] + bias[i % N], one split after the other, for i < size = M·N."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = i < size
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        acc += tl.load(partial_ptr + split * size + i, mask=known, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + i % N, mask=known, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, acc.to(out_ptr.dtype.element_ty), mask=known)
