"""Attention over packed keys and values: a Triton kernel on a GPU, plain torch elsewhere."""

import functools

import torch
from tcw.kernels.kv_dequant_attention.layout import BITS, Packed
from torch import Tensor

__all__ = ["BITS", "ROWS", "Packed", "kv_dequant_attention"]

ROWS = 32  # queries, of all heads and tokens, that may share a head of keys


def kv_dequant_attention(
    queries: Tensor,
    keys: Packed,
    values: Packed,
    scaling: float,
    real: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a few queries over packed keys and values, each query looking at every token.

    Args:
        queries: BF16, F16 or F32 [B, H, q, D]. Query head h looks at head h // (H/G).
        keys: [B, G, n] tokens of D channels, on the device of the queries.
        values: the same tokens, in Dv channels.
        scaling: what q·k is multiplied with.
        real: bool [B, 1 or G, n], False for tokens that are not there, or None.
        bias: what is added to the logits, a float [B, H, q, n], or None.

    Returns:
        The attention, float32 [B, H, q, Dv], and the logarithm of the sum of e^logit, float32 [B, H, q]: 0 and -inf
        where no token is there. `tcw.kv.fused.merge` makes one of several such parts.

    Raises:
        ValueError: shapes do not fit, or H/G·q is above `ROWS`.
    """
    (batch, heads, q, width), (b, groups, n, _) = queries.shape, keys.codes.shape
    if values.codes.shape[:3] != (b, groups, n) or b != batch or keys.width != width or heads % groups:
        raise ValueError(f"queries {list(queries.shape)} do not fit keys {list(keys.codes.shape)} and values")
    if heads // groups * q > ROWS:
        raise ValueError(f"{heads // groups * q} queries for a head of keys: more than {ROWS}")
    if real is not None and (real.dtype != torch.bool or real.shape not in ((b, 1, n), (b, groups, n))):
        raise ValueError(f"which tokens are real is {real.dtype} {list(real.shape)}, not bool {[b, groups, n]}")
    if bias is not None and bias.shape != (b, heads, q, n):
        raise ValueError(f"the bias is {list(bias.shape)}, not {[b, heads, q, n]}")
    return torch.ops.tcw.kv_dequant_attention(
        queries, *_flat(keys), *_flat(values), scaling, real, bias
    )  # an operation takes no dataclasses


def _flat(packed: Packed) -> tuple[list[Tensor], list[int]]:
    """The tensors and the numbers that `_packed` makes it of again."""
    optional = (packed.blocks, packed.scale)
    tensors = [packed.codes, packed.minimum, packed.step, *(t for t in optional if t is not None)]
    layout = [packed.bits, packed.width, packed.tokens, packed.channels]
    return tensors, layout + [int(t is not None) for t in optional]


def _packed(tensors: list[Tensor], layout: list[int]) -> Packed:
    optional = iter(tensors[3:])
    return Packed(*tensors[:3], *layout[:4], *(next(optional) if there else None for there in layout[4:]))


@torch.library.custom_op("tcw::kv_dequant_attention", mutates_args=())
def _op(
    queries: Tensor, keys: list[Tensor], key_layout: list[int], values: list[Tensor], value_layout: list[int],
    scaling: float, real: Tensor | None, bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation in plain torch: keys and values are unpacked, and rounded to the dtype of the queries."""
    k, v = (
        _rounded(_packed(side, layout).dequantize(), queries.dtype)
        for side, layout in ((keys, key_layout), (values, value_layout))
    )
    batch, heads, q, width = queries.shape
    groups, n = k.shape[1:3]
    grouped = queries.float().reshape(batch, groups, -1, width)
    logits = grouped @ k.transpose(-1, -2) * scaling
    if bias is not None:
        logits = logits + bias.float().reshape(logits.shape)
    if real is not None:
        logits = logits.masked_fill(~real[:, :, None], -torch.inf)
    if n == 0:
        return queries.new_zeros(batch, heads, q, v.shape[-1], dtype=torch.float32), _nothing(queries)
    weights = logits.softmax(-1).nan_to_num(0.0)
    return (weights @ v).reshape(batch, heads, q, -1), logits.logsumexp(-1).reshape(batch, heads, q)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, float32; a step may lead beyond what float16 holds, by less than itself."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).float()


def _nothing(queries: Tensor) -> Tensor:
    return torch.full(queries.shape[:3], -torch.inf, dtype=torch.float32, device=queries.device)


@_op.register_kernel("cuda")
def _on_gpu(
    queries: Tensor, keys: list[Tensor], key_layout: list[int], values: list[Tensor], value_layout: list[int],
    scaling: float, real: Tensor | None, bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from tcw.kernels.kv_dequant_attention import launch  # triton is there where CUDA is

    with torch.cuda.device(queries.device):
        return launch.attend(
            queries, _packed(keys, key_layout), _packed(values, value_layout), scaling, real, bias,
            _multiprocessors(queries.device),
        )  # fmt: skip


@_op.register_fake
def _shape_of(
    queries: Tensor, keys: list[Tensor], key_layout: list[int], values: list[Tensor], value_layout: list[int],
    scaling: float, real: Tensor | None, bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = queries.new_empty(*queries.shape[:3], value_layout[1], dtype=torch.float32)
    return out, queries.new_empty(queries.shape[:3], dtype=torch.float32)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
