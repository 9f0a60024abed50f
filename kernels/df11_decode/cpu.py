"""The op on a processor: the codec's own loops (tcw/codecs/df11_stream.py), over the tensors of a group."""

from collections.abc import Sequence

import numpy as np
import torch

from tcw.codecs import df11
from tcw.errors import FormatError


def decode(tensors: Sequence[torch.Tensor], stream_bytes: int) -> torch.Tensor:
    """Decode the tensors of a group to BF16 [numel]. Raises FormatError where they contradict each other."""
    stream, gaps, positions, rest, luts, _ = (tensor.numpy() for tensor in tensors)
    bounds = positions.astype(np.int64)
    if rest.size == 0:
        return torch.empty(0, dtype=torch.bfloat16)
    if rest.size != bounds[-1] or not 0 < stream_bytes <= stream.size:
        raise FormatError("the arrays of a DFloat11 group do not have the sizes that belong together")
    where = df11.span(bounds, stream_bytes, 0, rest.size)
    words = df11.decode_span(where, luts, bounds, stream[slice(*where.stream)], gaps[slice(*where.gaps)], rest)
    return torch.from_numpy(words).view(torch.bfloat16)
