"""FP8 stores against E4M3 by its definition."""

import pytest
import torch

from tcw.kv.stores.float8 import Float8Store

B, G, D = 2, 2, 6
E4M3 = sorted(
    {m * 2.0**-9 for m in range(8)} | {(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)} - {480.0}
)


def drawn(m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(B, G, m, D, generator=torch.Generator().manual_seed(seed)) * 3


def filled(*sizes: int, dtype: torch.dtype = torch.float32) -> Float8Store:
    store, first = Float8Store(), 0
    keys, values = drawn(sum(sizes), 1).to(dtype), drawn(sum(sizes), 2).to(dtype)
    for size in sizes:
        piece = slice(first, first + size)
        positions = torch.arange(first, first + size).expand(B, 1, size)
        assert store.append(keys[:, :, piece], values[:, :, piece], positions) is None
        first += size
    return store


def test_the_nearest_e4m3() -> None:
    found = filled(9).read()[0]
    x = drawn(9, 1).double()
    for b in range(B):
        for g in range(G):
            scale = x[b, g].abs().max().item() * 8 / 448
            for exact, rounded in zip(x[b, g].flatten().tolist(), found[b, g].flatten().tolist(), strict=True):
                distance = min(abs(abs(exact) / scale - level) for level in E4M3)
                assert abs(exact - rounded) / scale == pytest.approx(distance, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bound(dtype: torch.dtype) -> None:
    store = filled(20, 7, dtype=dtype)
    x, found = drawn(27, 2).to(dtype).float(), store.read()[1].float()
    assert store.values.scale is not None
    ulp = x.abs() * torch.finfo(dtype).eps * 2
    assert ((found - x).abs() <= torch.maximum(x.abs() / 16, store.values.scale / 1024) * (1 + 1e-5) + ulp).all()


def test_pieces_keep_rows_and_bytes() -> None:
    pieces, first = filled(20, 5, 6), Float8Store()
    keys, values = pieces.read()
    first.append(drawn(31, 1)[:, :, :20], drawn(31, 2)[:, :, :20], torch.arange(20).expand(B, 1, 20))
    assert torch.equal(keys[:, :, :20], first.read()[0])
    assert torch.equal(values[:, :, :20], first.read()[1])
    assert sum(t.untyped_storage().nbytes() for t in pieces.tensors()) == 2 * B * G * (31 * D + 4)
    index = torch.stack([torch.arange(0, 30, 3), torch.arange(1, 31, 3)]).expand(B, G, -1)
    pieces.keep(index)
    at = index[..., None].expand(-1, -1, -1, D)
    assert torch.equal(pieces.read()[0], keys.gather(2, at))
    assert torch.equal(pieces.read()[1], values.gather(2, at))
    pieces.select_rows(torch.tensor([1, 1, 0]))
    assert torch.equal(pieces.read()[0], keys.gather(2, at)[[1, 1, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_saturates_and_is_never_nan(dtype: torch.dtype) -> None:
    store = Float8Store()
    small, huge = torch.full((1, 1, 4, D), 0.1, dtype=dtype), torch.full((1, 1, 4, D), -6e4, dtype=dtype)
    store.append(small, huge, torch.arange(4)[None, None])
    store.append(huge, huge, torch.arange(4)[None, None])
    keys, values = store.read()
    torch.testing.assert_close(keys[:, :, 4:].float(), torch.full((1, 1, 4, D), -0.8), rtol=1e-2, atol=0)
    torch.testing.assert_close(values.float(), torch.full((1, 1, 8, D), -6e4), rtol=0.07, atol=0)


def test_zeros() -> None:
    store = Float8Store()
    zeros = torch.zeros(1, 1, 3, D)
    store.append(zeros, zeros, torch.arange(3)[None, None])
    store.append(zeros + 1, zeros, torch.arange(3)[None, None])
    keys, values = store.read()
    assert (values == 0).all()
    torch.testing.assert_close(keys[:, :, 3:], zeros + 1, rtol=0.07, atol=0)


def test_shapes_without_data() -> None:
    store = Float8Store()
    x = torch.empty(B, G, 5, D, device="meta")
    store.append(x, x, torch.arange(5, device="meta").expand(B, 1, 5))
    store.keep(torch.arange(3, device="meta").expand(B, G, 3))
    assert store.read()[0].shape == (B, G, 3, D)
    assert sum(t.nbytes for t in store.tensors()) == 2 * B * G * (3 * D + 4)
