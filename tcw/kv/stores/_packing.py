"""Codes of a few bits, packed into bytes along the last axis, so that tokens can be gathered and appended as they are.

A vector of D codes is a string of bits, low bits first: code d takes the bits d·b to d·b + b - 1, and the string is
padded to whole bytes.
"""

import torch
from torch import Tensor

WIDTHS = (1, 2, 3, 4, 8)  # bits a code may have
_AT_ONCE = 8  # codes that fill whole bytes whatever their width


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, uint8 [..., D] below 2^bits, into uint8 [..., ceil(D·bits / 8)]."""
    if bits == 8:
        return codes.contiguous()
    count = codes.shape[-1]
    together = 8 // bits if 8 % bits == 0 else _AT_ONCE  # codes that fill whole bytes
    codes = torch.nn.functional.pad(codes, (0, -count % together)).unflatten(-1, (-1, together))
    if together * bits == 8:
        packed = codes[..., 0].clone()
        for place in range(1, together):
            packed |= codes[..., place] << (place * bits)
        return packed
    word = codes[..., 0].int()
    for place in range(1, together):
        word |= codes[..., place].int() << (place * bits)
    packed = torch.stack([(word >> (8 * byte)) & 0xFF for byte in range(bits)], -1).to(torch.uint8).flatten(-2)
    return packed[..., : packed_width(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`: uint8 [..., bytes] to the `count` codes, uint8 [..., count], that were packed."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        codes = torch.stack([(packed >> (place * bits)) & mask for place in range(8 // bits)], -1)
    else:
        width = packed.shape[-1]
        octets = torch.nn.functional.pad(packed, (0, -width % bits)).unflatten(-1, (-1, bits)).int()
        word = octets[..., 0].clone()
        for byte in range(1, bits):
            word |= octets[..., byte] << (8 * byte)
        codes = torch.stack([(word >> (place * bits)) & mask for place in range(_AT_ONCE)], -1).to(torch.uint8)
    return codes.flatten(-2)[..., :count]
