"""Is the product with packed BF16 weights right here, and how fast beside plain ones? `tcw bench packed_matmul`."""

from collections.abc import Iterator

import torch
from tcw.kernels.packed_matmul import PackedWeight, pack, packed_matmul, raw_matmul, unpack
from tcw.kernels.packed_matmul.cases import CASES
from tcw.kernels.packed_matmul.check import fault
from torch.nn.functional import linear

from tcw import cuda
from tcw.bench import Timed

_SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096))  # [N, K] of Llama-3.1-8B
_SMALL = ((256, 512),)
_ROWS = (1, 4, 16)


def check(device: torch.device) -> dict[str, str]:
    """Every case against the reference: the CUDA kernels on a GPU, plain torch on the CPU."""
    if device.type != "cuda":
        return {case.name: fault(case, device) for case in CASES}
    kernels = cuda.module("packed_matmul", device)  # with K shared out as finely as a case asks for
    return {case.name: fault(case, device) or fault(case, device, kernels) for case in CASES}


def timed(device: torch.device) -> Iterator[Timed]:
    """The products of a layer: p4, p3, the same kernel with plain weights, and torch's product; and unpacking."""
    random = torch.Generator(device).manual_seed(1)
    for n, k in _SHAPES if device.type == "cuda" else _SMALL:
        weight = (torch.randn(n, k, generator=random, device=device) * 0.02).to(torch.bfloat16)
        forms = {form: packed for form in ("p4", "p3") if (packed := pack(weight, form)) is not None}
        for m in _ROWS:
            x = torch.randn(m, k, generator=random, device=device).to(torch.bfloat16)
            yield from _products(f"{n}x{k} m={m}", x, weight, forms)
        yield from _unpacking(f"unpack {n}x{k}", weight, forms)


def _products(name: str, x: torch.Tensor, weight: torch.Tensor, forms: dict[str, PackedWeight]) -> Iterator[Timed]:
    around = x.nbytes + 2 * x.shape[0] * weight.shape[0]
    for form, packed in forms.items():
        yield Timed(name, form, lambda packed=packed: packed_matmul(x, packed), packed.nbytes + around)
    yield Timed(name, "raw kernel", lambda: raw_matmul(x, weight), weight.nbytes + around)
    yield Timed(name, "F.linear", lambda: linear(x, weight), weight.nbytes + around)


def _unpacking(name: str, weight: torch.Tensor, forms: dict[str, PackedWeight]) -> Iterator[Timed]:
    out = torch.empty_like(weight)
    for form, packed in forms.items():
        yield Timed(name, form, lambda packed=packed: unpack(packed, out), packed.nbytes + out.nbytes)
    yield Timed(name, "copy", lambda: out.copy_(weight), weight.nbytes + out.nbytes)
