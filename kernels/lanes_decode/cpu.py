"""Decoding a group on the processor, with the codec's own loops (tcw/codecs/lanes_decode.py), on all cores."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from tcw.kernels.lanes_decode import tables as pair_tables

from tcw.codecs.compiled import readonly
from tcw.codecs.lanes_decode import decode_table, decode_units
from tcw.codecs.lanes_layout import SPLITS
from tcw.codecs.pieces import run

_WORDS = {np.uint8: torch.uint8, np.uint16: torch.uint16, np.uint32: torch.uint32}


def decode(tensors: Sequence[torch.Tensor], split: str, out: torch.Tensor) -> int:
    """Decode the tensors of a `Group` into `out`, of the split's dtype, [numel].

    Returns:
        0, or 1 + the largest number (chunk * 32 + lane) that was found of a lane that does not end with its last code.
        Words of a unit with such a lane are undefined.
    """
    how = SPLITS[split]
    width = np.dtype(how.symbol).itemsize
    codes, lane_bytes, chunk_base, units, tables, raw, low = [
        *(tensor.numpy() for tensor in tensors),
        np.empty(0, np.uint8),
        np.empty(0, np.uint16),
    ][:7]
    code_lengths = np.array([pair_tables.lengths(row, split) for row in tables])
    wide = np.array([decode_table(row, 0, width) for row in code_lengths])
    index = readonly(codes), 0, readonly(lane_bytes), readonly(chunk_base)
    raw, low, symbols = readonly(raw), readonly(low), np.empty(0, dtype=how.symbol)
    words = out.view(_WORDS[how.word]).numpy()
    bad = [-1]

    def piece(unit: np.ndarray) -> None:
        _, _, first, end, _, *other = unit.tolist()
        place = other[0] if other else first
        work = unit[None, :5] - [0, 0, first, first, 0]  # its words count from its first one
        side, to = (raw[first:end], low[first:end], symbols), words[place : place + end - first]
        bad.append(decode_units(how.code, *index, work, 0, 1, wide, code_lengths, *side, to))

    run([functools.partial(piece, unit) for unit in units])
    return max(bad) + 1
