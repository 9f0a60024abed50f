"""The Triton kernels: attention of a few queries over packed keys and values, split over the tokens.

A program takes one head of keys and values, all rows of queries that belong to it, and a share of the tokens. It goes
through them in tiles: unpacks the keys of a tile, multiplies, unpacks the values, and keeps a running softmax:

    top  = max(top, logits)            of each row so far; everything before is scaled by 2^(old top - top)
    mass = Σ 2^(logit - top)           logits are in units of log 2
    acc  = Σ 2^(logit - top) · v

and leaves acc / mass and the logarithm of Σ e^logit, from which `merge` makes the attention over all tokens, as anyone
can who has more parts. Each key and value is read once, whatever the number of queries, and unpacked in registers.

    `attend`    a part for each share of the tokens
    `merge`     one of several
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_STRIDES = [f"{name}_{axis}" for name in ("k_rows", "k_blocks", "v_rows", "v_blocks", "real") for axis in "bg"]


@triton.jit
def _codes(
    codes_ptr, token, here, BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The codes of tokens `token` as floats, [BLOCK_N, BLOCK_D]; anything where not `here`."""
    SIZE: tl.constexpr = (WIDTH * BITS + 7) // 8
    at = token[:, None] * SIZE
    if BITS == 3:  # a code may lie in two bytes
        bit = tl.arange(0, BLOCK_D)[None, :] * 3
        known = here[:, None] & (bit < WIDTH * 3)
        code = tl.load(codes_ptr + at + bit // 8, mask=known, other=0).to(tl.int32)
        more = known & (bit % 8 > 5)
        code |= tl.load(codes_ptr + at + bit // 8 + 1, mask=more, other=0).to(tl.int32) << 8
        code = (code >> (bit % 8)) & 7
    else:
        EACH: tl.constexpr = 8 // BITS
        byte = tl.arange(0, BLOCK_D // EACH)
        known = here[:, None] & (byte < SIZE)[None, :]
        code = tl.load(codes_ptr + at + byte[None, :], mask=known, other=0).to(tl.int32)
        code = code[:, :, None] >> (tl.arange(0, EACH) * BITS)[None, None, :]
        code = tl.reshape(code & ((1 << BITS) - 1), [BLOCK_N, BLOCK_D])
    # 2^23 + code, exactly, without a conversion: those run at a quarter of the rate of other instructions
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _tile(  # noqa: PLR0913
    pointers, start, n,
    BITS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keys or values of the tokens from `start`, float32 [BLOCK_N, BLOCK_D]; finite numbers beyond `n` and WIDTH.

    `pointers` are those of `_of_head`. TOKENS is 0 where blocks say which row of minima and steps each token has.
    """
    codes_ptr, minimum_ptr, step_ptr, blocks_ptr = pointers
    T: tl.constexpr = min(max(TOKENS, 1), BLOCK_N)
    C: tl.constexpr = min(CHANNELS, BLOCK_D)
    COLUMNS: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    token = start + tl.arange(0, BLOCK_N)
    code = _codes(codes_ptr, token.to(tl.int64), token < n, BITS, WIDTH, BLOCK_N, BLOCK_D)
    first = start + tl.arange(0, BLOCK_N // T) * T
    column = tl.arange(0, BLOCK_D // C)
    block = tl.load(blocks_ptr + first, mask=first < n, other=0) if TOKENS == 0 else first // TOKENS
    at = block.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    known = (first < n)[:, None] & (column < COLUMNS)[None, :]
    minimum = tl.load(minimum_ptr + at, mask=known, other=0.0).to(tl.float32)
    step = tl.load(step_ptr + at, mask=known, other=0.0).to(tl.float32)
    # four axes, so that a pair is loaded once for all that share it
    code = tl.reshape(code, [BLOCK_N // T, T, BLOCK_D // C, C])
    return tl.reshape(minimum[:, None, :, None] + step[:, None, :, None] * code, [BLOCK_N, BLOCK_D])


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """`x` as a matrix product takes it: of DTYPE, or rounded to that and float32 again."""
    if tl.float16 == DTYPE:  # a step may lead beyond what float16 holds, by less than itself
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    x = x.to(DTYPE)
    return x.to(tl.float32) if WIDE else x


@triton.jit
def _queries(q_ptr, scale_ptr, in_rows, WIDTH: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of queries, float32 [rows, BLOCK], that take upon them what the keys are to be multiplied with."""
    d = tl.arange(0, BLOCK)
    at = tl.arange(0, in_rows.shape[0])[:, None] * WIDTH + d[None, :]
    q = tl.load(q_ptr + at, mask=in_rows[:, None] & (d < WIDTH)[None, :], other=0.0).to(tl.float32)
    if SCALED:
        q *= tl.load(scale_ptr + d, mask=d < WIDTH, other=0.0).to(tl.float32)[None, :]
    return q


@triton.jit
def _of_head(  # noqa: PLR0913
    codes_ptr, minimum_ptr, step_ptr, blocks_ptr, tokens, rows, blocks,
    BITS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Pointers to what lies so many tokens, rows of minima and steps, and blocks, further on."""
    shared = rows * ((WIDTH + CHANNELS - 1) // CHANNELS)
    return codes_ptr + tokens * ((WIDTH * BITS + 7) // 8), minimum_ptr + shared, step_ptr + shared, blocks_ptr + blocks


@triton.jit
def _seen(logits, token, n, in_rows, real_ptr, bias_ptr, HAS_REAL: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Logits [rows, tokens] with the bias added, and -inf for tokens that are not there."""
    visible = token < n
    if HAS_REAL:
        visible = visible & (tl.load(real_ptr + token, mask=visible, other=0) != 0)
    if HAS_BIAS:
        row = tl.arange(0, in_rows.shape[0])
        at = row[:, None].to(tl.int64) * n + token[None, :]
        bias = tl.load(bias_ptr + at, mask=in_rows[:, None] & (token < n)[None, :], other=0.0)
        logits += bias.to(tl.float32) * LOG2E
    return tl.where(visible[None, :], logits, float("-inf"))


@triton.jit(do_not_specialize=["ROWS", "n", "tokens_per_program", *_STRIDES])  # n grows: one kernel for all of it
def attend(  # noqa: PLR0913
    q_ptr, k_codes_ptr, k_minimum_ptr, k_step_ptr, k_blocks_ptr, k_scale_ptr, v_codes_ptr, v_minimum_ptr, v_step_ptr,
    v_blocks_ptr, v_scale_ptr, real_ptr, bias_ptr, out_ptr, lse_ptr, ROWS, n, tokens_per_program, scaling,
    k_rows_b, k_rows_g, k_blocks_b, k_blocks_g, v_rows_b, v_rows_g, v_blocks_b, v_blocks_g, real_b, real_g,
    K_BITS: tl.constexpr, K_WIDTH: tl.constexpr, K_TOKENS: tl.constexpr, K_CHANNELS: tl.constexpr,
    V_BITS: tl.constexpr, V_WIDTH: tl.constexpr, V_TOKENS: tl.constexpr, V_CHANNELS: tl.constexpr,
    K_SCALED: tl.constexpr, V_SCALED: tl.constexpr, HAS_REAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out[split, b, g, row, :] and lse[split, b, g, row], float32: q is [B, G, ROWS, K_WIDTH], bias [B, G, ROWS, n].

    `_b` and `_g` are from one sequence, and one head, to the next: rows of minima and steps, or elements. Keys, values
    and weights are rounded to the dtype of q, as a cache that is not packed holds them; F32 is multiplied as three
    products of TF32. Sums are float32. WIDE: for Triton's interpreter, which cannot multiply BF16.
    """
    split, g, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = b * tl.num_programs(1) + g
    keys = _of_head(
        k_codes_ptr, k_minimum_ptr, k_step_ptr, k_blocks_ptr, head * n, b * k_rows_b + g * k_rows_g,
        b * k_blocks_b + g * k_blocks_g, K_BITS, K_WIDTH, K_CHANNELS,
    )  # fmt: skip
    values = _of_head(
        v_codes_ptr, v_minimum_ptr, v_step_ptr, v_blocks_ptr, head * n, b * v_rows_b + g * v_rows_g,
        b * v_blocks_b + g * v_blocks_g, V_BITS, V_WIDTH, V_CHANNELS,
    )  # fmt: skip
    real_ptr += b * real_b + g * real_g
    bias_ptr += head * ROWS * n
    row = tl.arange(0, BLOCK_R)
    in_rows = row < ROWS
    q = _queries(q_ptr + head * ROWS * K_WIDTH, k_scale_ptr + head * K_WIDTH, in_rows, K_WIDTH, K_SCALED, BLOCK_K)
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    q = _rounded(q, DTYPE, WIDE)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    begin = split * tokens_per_program
    for start in range(begin, min(begin + tokens_per_program, n), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        k = _tile(keys, start, n, K_BITS, K_WIDTH, K_TOKENS, K_CHANNELS, BLOCK_N, BLOCK_K)
        logits = tl.dot(q, tl.trans(_rounded(k, DTYPE, WIDE)), input_precision="tf32x3") * (scaling * LOG2E)
        logits = _seen(logits, token, n, in_rows, real_ptr, bias_ptr, HAS_REAL, HAS_BIAS)
        higher = tl.maximum(top, tl.max(logits, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: no inf - inf
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        v = _tile(values, start, n, V_BITS, V_WIDTH, V_TOKENS, V_CHANNELS, BLOCK_N, BLOCK_V)
        p_rounded, v = _rounded(p, DTYPE, WIDE), _rounded(v, DTYPE, WIDE)
        acc = tl.dot(p_rounded, v, acc * shrink[:, None], input_precision="tf32x3")
        mass = mass * shrink + tl.sum(p, axis=1)
        top = higher
    at = ((split * tl.num_programs(2) + b) * tl.num_programs(1) + g) * ROWS + row
    e = tl.arange(0, BLOCK_V)
    out = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
    if V_SCALED:
        out *= tl.load(v_scale_ptr + head * V_WIDTH + e, mask=e < V_WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + at[:, None] * V_WIDTH + e[None, :], out, mask=in_rows[:, None] & (e < V_WIDTH)[None, :])
    tl.store(lse_ptr + at, (top + tl.log2(mass)) * LN2, mask=in_rows)


@triton.jit(do_not_specialize=["rows", "splits"])
def merge(parts_ptr, lses_ptr, out_ptr, lse_ptr, rows, splits, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One part of `splits`, for each of `rows`: parts [splits, rows, WIDTH] weighted by e^lse. One row a program."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    top = float("-inf")
    for split in range(splits):
        top = tl.maximum(top, tl.load(lses_ptr + split * rows + row))
    base = tl.where(top == float("-inf"), 0.0, top)
    mass = 0.0
    acc = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        weight = tl.exp(tl.load(lses_ptr + split * rows + row) - base)
        acc += weight * tl.load(parts_ptr + (split * rows + row) * WIDTH + e, mask=e < WIDTH, other=0.0)
        mass += weight
    tl.store(out_ptr + row * WIDTH + e, acc / tl.where(mass == 0.0, 1.0, mass), mask=e < WIDTH)
    tl.store(lse_ptr + row, tl.log(mass) + base)
