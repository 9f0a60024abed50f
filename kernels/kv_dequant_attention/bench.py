"""Is attention over packed keys and values right here, and how fast is it? `tcw bench kv_dequant_attention`."""

from collections.abc import Iterator

import torch
from tcw.kernels.kv_dequant_attention import kv_dequant_attention
from tcw.kernels.kv_dequant_attention.cases import CASES, UNIT, Case, Inputs, make_inputs
from tcw.kernels.kv_dequant_attention.reference import attend, compare

from tcw.bench import Timed

_SHAPES = ((1, 8, 4, 128, 8192), (1, 8, 4, 128, 32768), (16, 8, 4, 128, 8192))  # [B, G, r, D], tokens
_SMALL = ((1, 2, 4, 64, 2048),)


def check(device: torch.device) -> dict[str, str]:
    """Every case against the reference: the Triton kernel on a GPU, plain torch on the CPU."""
    errors = {case.name: _error(case, device) for case in CASES}
    return {name: "" if error <= 1.0 else f"{error:.3g} times the error allowed" for name, error in errors.items()}


def _error(case: Case, device: torch.device) -> float:
    """The largest error, as a share of what is allowed."""
    if device.type == "cuda":
        from tcw.kernels.kv_dequant_attention.check import error_of  # triton is there where CUDA is

        return error_of(case, str(device))
    inputs = make_inputs(case)
    found = kv_dequant_attention(inputs.queries, inputs.keys, inputs.values, inputs.scaling, inputs.real, inputs.bias)
    return compare(*found, attend(inputs), UNIT[case.dtype])


def timed(device: torch.device) -> Iterator[Timed]:
    """One query a head: keys and values of 2, 4 and 8 bits beside plain ones, and unpacked first."""
    gpu = device.type == "cuda"
    dtype = "BF16" if gpu else "F32"
    for batch, groups, r, width, n in _SHAPES if gpu else _SMALL:
        for bits in (2, 4, 8):
            case = Case("timed", bits, n, r, width, batch, groups, dtype=dtype, stored="BF16")
            yield from _ways(f"{bits}-bit n={n} b={batch}", make_inputs(case, str(device)))


def _ways(name: str, inputs: Inputs) -> Iterator[Timed]:
    query, sides = inputs.queries, (inputs.keys, inputs.values)

    def dense(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, scale=inputs.scaling, enable_gqa=query.shape[1] > keys.shape[1]
        )

    def unpacked() -> list[torch.Tensor]:
        return [side.dequantize().to(query.dtype) for side in sides]

    held = unpacked()
    packed = sum(t.nbytes for side in sides for t in (side.codes, side.minimum, side.step))
    around = 2 * query.nbytes  # as much comes out as queries went in
    yield Timed(name, "packed", lambda: kv_dequant_attention(query, *sides, inputs.scaling), packed + around)
    yield Timed(name, "dense", lambda: dense(*held), sum(t.nbytes for t in held) + around)
    yield Timed(name, "unpack", lambda: dense(*unpacked()), packed + around)
