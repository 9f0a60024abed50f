"""Packed codes against a string of bits written out digit by digit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcw.kv.stores._packing import WIDTHS, pack, packed_width, unpack


def digits(codes: list[int], bits: int) -> list[int]:
    """Bytes of the bit string, low bits first, padded with zeros."""
    string = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    string += "0" * (-len(string) % 8)
    return [int(string[i : i + 8][::-1], 2) for i in range(0, len(string), 8)]


@given(st.sampled_from(WIDTHS), st.integers(1, 70), st.integers(0, 2**32))
def test_a_string_of_bits(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.tolist() == [digits(row, bits) for row in codes.tolist()]
    assert packed.shape[-1] == packed_width(count, bits)
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_token_is_bytes_of_its_own(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, 3, 9, 13)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.is_contiguous()
    assert packed.untyped_storage().nbytes() == 2 * 3 * 9 * packed_width(13, bits)
    index = torch.tensor([7, 0, 0])
    assert torch.equal(unpack(packed[:, :, index], bits, 13), codes[:, :, index])


@pytest.mark.parametrize("bits", WIDTHS)
def test_shapes_without_data(bits: int) -> None:
    packed = pack(torch.empty(2, 1, 5, 11, dtype=torch.uint8, device="meta"), bits)
    assert packed.shape == (2, 1, 5, packed_width(11, bits))
    assert unpack(packed, bits, 11).shape == (2, 1, 5, 11)


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_tokens(bits: int) -> None:
    packed = pack(torch.empty(1, 2, 0, 8, dtype=torch.uint8), bits)
    assert packed.shape == (1, 2, 0, bits)
    assert unpack(packed, bits, 8).shape == (1, 2, 0, 8)
