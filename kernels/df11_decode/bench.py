"""Is an official DFloat11 group decoded right here, and how fast, beside a plain copy? `tcw bench df11_decode`."""

from collections.abc import Iterator

import numpy as np
import torch
from tcw.kernels.df11_decode import decode, group_of
from tcw.kernels.df11_decode.cases import CASES, Case, cost, gaussian, make_inputs

from tcw.bench import Timed
from tcw.codecs import df11
from tcw.errors import FormatError
from tcw.kernels import df11_decode

_BLOCK = (4096 * 4096, 1024 * 4096, 1024 * 4096, 4096 * 4096, *(14336 * 4096,) * 3)  # of a model of 8 billion weights
_SMALL = (40_000, 5_000)


def check(device: torch.device) -> dict[str, str]:
    """Every case: "" where its words come out and its stream is found valid, else what is wrong."""
    return {case.name: _fault(case, device) for case in CASES}


def _fault(case: Case, device: torch.device) -> str:
    words, arrays = make_inputs(case)
    group = group_of(**vars(arrays)).to(device)
    try:
        df11_decode.check(group)
    except FormatError as error:
        return error.message
    wrong = int((_words(decode(group)) != words).sum())
    return f"{wrong} of {words.size} weights differ" if wrong else ""


def _words(weights: torch.Tensor) -> np.ndarray:
    return weights.cpu().view(torch.int16).numpy().view(np.uint16)


def timed(device: torch.device) -> Iterator[Timed]:
    """One transformer block of Gaussian weights, decoded; and as many weights copied."""
    sizes = _BLOCK if device.type == "cuda" else _SMALL
    # one draw of 4 million weights, again and again: the coder looks at one exponent at a time
    drawn = gaussian(np.random.default_rng(20_26), min(sum(sizes), 1 << 22))
    arrays = df11.encode(np.resize(drawn, sum(sizes)), sizes)
    group = group_of(**vars(arrays)).to(device)
    out, other = torch.empty(2, group.numel, dtype=torch.bfloat16, device=device)
    name = f"block of {group.numel / 1e6:.3g} M weights"
    yield Timed(name, "decode", lambda: decode(group, out), cost(arrays))
    yield Timed(name, "copy", lambda: other.copy_(out), 2 * out.nbytes)
