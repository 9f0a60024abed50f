"""Is what is decoded here right, and how fast is it? `tcw bench lanes_decode`."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from tcw.kernels.lanes_decode import Group, decode, group, integers, launch
from tcw.kernels.lanes_decode.cases import CASES, Case, make_inputs

from tcw.bench import Timed
from tcw.codecs import lanes

_SHAPES = ((4096, 4096), (14336, 4096))  # [N, K], of a model of 8 billion weights
_SMALL = ((1024, 1024),)
_PLANS = [launch.Plan(chunks, warps, buffers) for chunks in (1, 2) for warps in (4, 8, 16) for buffers in (1, 2)]
_UNITS = (8, 16, 32, 64)  # chunks that a block works on
_WORDS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


def words_of(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a tensor, as unsigned integers, on the CPU."""
    return tensor.view(_WORDS[tensor.element_size()]).cpu().numpy()


def check(device: torch.device) -> dict[str, str]:
    """Every case: the kernel on a GPU, the codec's loops on the CPU."""
    return {case.name: _wrong(case, device) for case in CASES}


def _wrong(case: Case, device: torch.device) -> str:
    values, stream = make_inputs(case)
    if case.split == "integers":
        found = (
            integers.decode_integers(integers.read(stream.parts, stream.params, case.numel).to(device)).cpu().numpy()
        )
    else:
        found = words_of(decode(group([(stream.parts, stream.params, case.numel)]).to(device)))
    return "" if np.array_equal(found, values) else f"{np.count_nonzero(found != values)} of {case.numel} differ"


def timed(device: torch.device) -> Iterator[Timed]:
    """BF16 weights; on a GPU with every plan and size of unit that might be the best, on the CPU beside the codec."""
    gpu = device.type == "cuda"
    for n, k in _SHAPES if gpu else _SMALL:
        case = Case("timed", "weights", "bf16", n * k)
        values, stream = make_inputs(case)
        streams = group([(stream.parts, stream.params, n * k)]).to(device)
        out = torch.empty(n * k, dtype=torch.bfloat16, device=device)
        moved = streams.nbytes + out.nbytes
        name = f"{n}x{k}"
        yield Timed(name, "decode", lambda streams=streams, out=out: decode(streams, out), moved)
        if gpu:
            yield from _variants(name, stream, out, moved)
            plain = torch.from_numpy(values).view(torch.bfloat16).to(device)
            yield Timed(name, "copy", lambda out=out, plain=plain: out.copy_(plain), 2 * out.nbytes)
        else:
            buffer = np.empty(n * k, np.uint16)
            reader = lanes.reader(stream.parts, stream.params, n * k)
            yield Timed(name, "codec", lambda reader=reader, buffer=buffer: reader.decode(buffer), moved)


def _variants(name: str, stream: lanes.Stream, out: torch.Tensor, moved: int) -> Iterator[Timed]:
    """All plans with units of 16 chunks, then all sizes of unit with the first plan."""
    for unit_chunks in _UNITS:
        cut = group([(stream.parts, stream.params, out.numel())], unit_chunks).to(out.device)
        for plan in _PLANS if unit_chunks == 16 else _PLANS[:1]:
            way = f"chunks={plan.chunks} warps={plan.warps} buffers={plan.buffers} unit={unit_chunks}"
            yield Timed(name, way, _run(cut, out, plan), moved)


def _run(streams: Group, out: torch.Tensor, plan: launch.Plan) -> Callable[[], None]:
    from tcw import cuda

    module = cuda.module("lanes_decode", out.device)
    return lambda: launch.decode(module, streams.tensors(), streams.split, streams.shared, out, None, plan)
