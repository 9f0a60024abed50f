"""What the kernel must get right: the inputs, and the errors allowed, that its test and its benchmark share."""

from dataclasses import dataclass, replace

import torch
from tcw.kernels.kv_dequant_attention.layout import Packed
from torch import Tensor

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
UNIT = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}  # half a step of the dtype, relative
SUMS = 2.0**-19  # what summing in float32 may lose, relative to all that is summed

ALL = 1 << 20  # tokens or channels that share a step: all of them


@dataclass(frozen=True)
class Case:
    """One attention: B sequences of n tokens in G heads, each with r·q rows of queries.

    `key_shared` and `value_shared` are the tokens and channels that share a step. `multiprocessors` says how finely the
    tokens are shared out; `kind` is a function of this module.
    """

    name: str
    bits: int
    n: int
    r: int = 1
    width: int = 64
    batch: int = 1
    groups: int = 1
    q: int = 1
    dtype: str = "F32"
    stored: str = "F16"
    key_shared: tuple[int, int] = (32, 1)
    value_shared: tuple[int, int] = (1, 32)
    value_bits: int = 0
    value_width: int = 0
    multiprocessors: int = 1
    kind: str = "usual"


@dataclass(frozen=True)
class Inputs:
    """Operands; see `kv_dequant_attention`."""

    queries: Tensor
    keys: Packed
    values: Packed
    scaling: float
    real: Tensor | None = None
    bias: Tensor | None = None


KIVI = {"key_shared": (32, 1), "value_shared": (1, 32)}
LAYOUTS = {
    "kivi": KIVI,
    "token": {"key_shared": (1, 32), "value_shared": (1, 16)},
    "whole": {"key_shared": (ALL, 1), "value_shared": (1, ALL)},  # a pair a channel, and a pair a token
    "block": {"key_shared": (128, 4), "value_shared": (4, 8)},
}
CASES = [
    *(
        Case(f"w{bits}-{name}-r{r}-n{n}", bits, n, r, batch=2 if r == 1 else 1, groups=2 if r < 8 else 1, **layout)
        for bits in (1, 2, 3, 4, 8)
        for (name, layout), r, n in zip(LAYOUTS.items(), (1, 3, 4, 8), (33, 70, 129, 64), strict=True)
    ),
    *(Case(f"{dtype}-w{bits}", bits, 70, 4, 128, dtype=dtype, stored=dtype)
      for dtype in ("BF16", "F16", "F32") for bits in (2, 4)),
    Case("one-token", 4, 1, 3, batch=2),
    Case("no-token", 4, 0, 2, batch=2),
    Case("one-token-bf16", 2, 1, 1, 128, dtype="BF16"),
    Case("eight-heads-128", 4, 100, 8, 128, groups=2, dtype="F16"),
    Case("four-queries", 4, 40, 4, q=3, groups=2, batch=2),
    Case("thirty-two-rows", 8, 40, 8, q=4),
    Case("keys-4-values-2", 4, 65, 2, value_bits=2),
    Case("keys-2-values-8-narrow", 2, 65, 2, 128, value_bits=8, value_width=32),
    Case("width-96", 4, 50, 2, 96, groups=2),
    Case("width-80", 2, 50, 2, 80, value_shared=(1, 16)),
    Case("width-20-of-3-bits", 3, 50, 1, 20, value_shared=(1, 4)),
    Case("width-256", 4, 40, 1, 256, dtype="BF16"),
    Case("tokens-50-of-50-share", 4, 50, key_shared=(50, 1)),
    Case("shared-by-heads", 4, 40, 2, groups=3, batch=2, value_shared=(1, ALL), kind="shared_by_heads"),
    Case("many-splits", 4, 300, 2, batch=2, multiprocessors=132),
    Case("two-splits", 2, 300, 1, groups=2, multiprocessors=2),
    Case("padding", 4, 90, 2, groups=2, batch=2, kind="padding", multiprocessors=8),
    Case("padding-of-each-head", 4, 90, 2, groups=2, batch=2, kind="padding_of_each_head"),
    Case("nothing-real", 4, 90, 2, batch=2, kind="nothing_real", multiprocessors=8),
    Case("bias", 4, 90, 2, groups=2, q=2, kind="bias", multiprocessors=8),
    Case("huge-logits", 4, 90, 2, groups=2, kind="huge_logits", multiprocessors=8),
    Case("huge-logits-f16", 4, 90, 2, groups=2, dtype="F16", kind="huge_logits"),
    Case("all-keys-equal", 4, 90, 2, kind="all_keys_equal"),
    Case("no-steps", 2, 90, 2, kind="no_steps"),
    Case("all-ones", 8, 90, 2, kind="all_ones"),
    Case("far-minima", 4, 90, 2, stored="F32", kind="far_minima"),
    Case("negative-and-tiny-steps", 2, 90, 2, stored="F32", kind="odd_steps"),
    Case("gaps-in-memory", 4, 40, 2, groups=2, batch=2, kind="gaps"),
    *(Case(f"blocks-w{bits}", bits, 90, 2, groups=2, batch=2, multiprocessors=8, kind="blocks") for bits in (2, 3, 4)),
    *(Case(f"scaled-{dtype}", 4, 70, 3, groups=2, batch=2, dtype=dtype, stored="BF16", key_shared=(1, ALL),
           value_shared=(1, ALL), kind="scaled") for dtype in ("BF16", "F32")),
    Case("edge-of-f16", 2, 40, 2, dtype="F16", stored="BF16", kind="edge_of_f16"),
    Case("blocks-of-all-heads", 4, 70, 2, groups=2, batch=2, kind="blocks_of_all_heads"),
]  # fmt: skip


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Make the operands of a case, the same at each call."""
    random = torch.Generator().manual_seed(case.n * 1_000_003 + case.r * 1009 + case.width * 7 + case.bits)
    queries = torch.randn(case.batch, case.groups * case.r, case.q, case.width, generator=random)
    keys = _packed(case, case.bits, case.width, case.key_shared, random)
    values = _packed(case, case.value_bits or case.bits, case.value_width or case.width, case.value_shared, random)
    inputs = globals()[case.kind](Inputs(queries.to(DTYPES[case.dtype]), keys, values, case.width**-0.5))
    return on(inputs, device)


def on(inputs: Inputs, device: str) -> Inputs:
    """The operands on a device."""
    there = {name: held.to(device) for name, held in vars(inputs).items() if isinstance(held, Tensor)}
    for name in ("keys", "values"):
        packed = getattr(inputs, name)
        held = {field: value.to(device) for field, value in vars(packed).items() if isinstance(value, Tensor)}
        there[name] = replace(packed, **held)
    return replace(inputs, **there)


def _packed(case: Case, bits: int, width: int, shared: tuple[int, int], random: torch.Generator) -> Packed:
    """Random codes that stand for numbers between about -2 and 2."""
    shape = (case.batch, case.groups, -(-case.n // shared[0]), -(-width // shared[1]))
    codes = torch.randint(0, 256, (*shape[:2], case.n, -(-width * bits // 8)), generator=random, dtype=torch.uint8)
    minimum = -1 - torch.rand(shape, generator=random)
    step = (1 + 3 * torch.rand(shape, generator=random)) / ((1 << bits) - 1)
    stored = DTYPES[case.stored]
    return Packed(codes, minimum.to(stored), step.to(stored), bits, width, *shared)


def usual(inputs: Inputs) -> Inputs:
    """Random numbers."""
    return inputs


def shared_by_heads(inputs: Inputs) -> Inputs:
    """The values of all heads have the steps of the first."""
    values = inputs.values
    return replace(inputs, values=replace(values, minimum=values.minimum[:, :1], step=values.step[:, :1]))


def padding(inputs: Inputs) -> Inputs:
    """Sequences begin with padding, one with whole tiles of it."""
    real = torch.ones(inputs.queries.shape[0], 1, inputs.keys.codes.shape[2], dtype=torch.bool)
    real[0, :, :3], real[-1, :, :-7] = False, False
    return replace(inputs, real=real)


def padding_of_each_head(inputs: Inputs) -> Inputs:
    """Heads lack different tokens; the mask is a part of a longer one."""
    batch, heads, n, _ = inputs.keys.codes.shape
    real = (torch.arange(batch * heads * (n + 9)) * 7 % 11 > 3).view(batch, heads, n + 9)
    return replace(inputs, real=real[..., 4 : n + 4])


def nothing_real(inputs: Inputs) -> Inputs:
    """One sequence has no token at all."""
    real = torch.ones(inputs.queries.shape[0], 1, inputs.keys.codes.shape[2], dtype=torch.bool)
    real[0] = False
    return replace(inputs, real=real)


def bias(inputs: Inputs) -> Inputs:
    """Something is added to each logit, to some -inf; a query is left with none."""
    (b, h, q, _), n = inputs.queries.shape, inputs.keys.codes.shape[2]
    added = torch.linspace(-3, 3, b * h * q * n).view(b, h, q, n)
    added[..., ::5] = -torch.inf
    added[0, 0, 0] = -torch.inf
    return replace(inputs, bias=added)


def huge_logits(inputs: Inputs) -> Inputs:
    """All weight is on one token, or nearly; e^logit is far beyond a float."""
    return replace(inputs, queries=inputs.queries * 1000)


def all_keys_equal(inputs: Inputs) -> Inputs:
    """Every token has the same weight."""
    keys = inputs.keys
    return replace(inputs, keys=replace(keys, step=torch.zeros_like(keys.step), minimum=torch.ones_like(keys.minimum)))


def no_steps(inputs: Inputs) -> Inputs:
    """Keys and values are their minima."""
    keys, values = (replace(p, step=torch.zeros_like(p.step)) for p in (inputs.keys, inputs.values))
    return replace(inputs, keys=keys, values=values)


def all_ones(inputs: Inputs) -> Inputs:
    """Every bit is set."""
    keys, values = (replace(p, codes=torch.full_like(p.codes, 255)) for p in (inputs.keys, inputs.values))
    return replace(inputs, keys=keys, values=values)


def far_minima(inputs: Inputs) -> Inputs:
    """Minima a thousand times larger than what the steps span."""
    return replace(inputs, values=replace(inputs.values, minimum=inputs.values.minimum * 1000))


def odd_steps(inputs: Inputs) -> Inputs:
    """Steps of both signs, zero, and the smallest there are."""
    step = inputs.values.step.clone()
    step[:, :, ::4] *= -1
    step[:, :, 1::4] = 0
    step[:, :, 2::4] = 1e-38
    return replace(inputs, values=replace(inputs.values, step=step))


def scaled(inputs: Inputs) -> Inputs:
    """Each channel has a size of its own."""
    keys, values = inputs.keys, inputs.values
    sizes = (torch.arange(2 * 2 * keys.width).view(2, 2, 1, -1) % 13 / 4 + 0.1).bfloat16()
    return replace(inputs, keys=replace(keys, scale=sizes), values=replace(values, scale=sizes.flip(-1)))


def edge_of_f16(inputs: Inputs) -> Inputs:
    """Values up to the largest float16, and steps that end a little beyond it."""
    values = inputs.values
    minimum, step = torch.full_like(values.minimum, 65280), torch.full_like(values.step, 80)
    return replace(inputs, values=replace(values, minimum=minimum, step=step))


def blocks(inputs: Inputs) -> Inputs:
    """Tokens were forgotten: each head has what is left of its blocks of keys, the last of which is empty."""
    (batch, heads, n, _), rows = inputs.keys.codes.shape, inputs.keys.minimum.shape[2]
    of_token = torch.arange(batch * heads * n).view(batch, heads, n) * 7 % (rows - 1)
    return replace(inputs, keys=replace(inputs.keys, blocks=of_token.sort(-1).values.to(torch.uint8)))


def blocks_of_all_heads(inputs: Inputs) -> Inputs:
    """Blocks of different lengths, the same for all sequences and heads, of keys and of values."""
    n, rows = inputs.keys.codes.shape[2], inputs.keys.minimum.shape[2]
    of_token = (torch.arange(n) ** 2 * rows // n**2).view(1, 1, n)
    keys = replace(inputs.keys, blocks=of_token.int())
    return replace(inputs, keys=keys, values=replace(inputs.values, blocks=of_token.to(torch.int16).flip(-1)))


def gaps(inputs: Inputs) -> Inputs:
    """Operands that are views: queries and codes with another order of axes, steps with gaps."""
    queries, keys, values = inputs.queries, inputs.keys, inputs.values
    return replace(
        inputs,
        queries=queries.transpose(1, 2).contiguous().transpose(1, 2),
        keys=replace(keys, codes=keys.codes.transpose(1, 2).contiguous().transpose(1, 2)),
        values=replace(values, step=values.step.repeat_interleave(2, 3)[..., ::2]),
    )
