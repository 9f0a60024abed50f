"""Tiers against plain Python: which token goes where, in what order they lie, and that nothing else happens to them."""

import pytest
import torch
from torch import Tensor

from tcw.kv.stores import DenseStore
from tcw.kv.stores._grids import Grid
from tcw.kv.stores.integers import IntegerStore
from tcw.kv.stores.tiered import TieredStore

B, G, D = 2, 2, 4


def tiered(share: float) -> TieredStore:
    return TieredStore(DenseStore, DenseStore, share)


def tokens(m: int, first: int = 0) -> Tensor:
    """Keys that say where they come from."""
    return torch.arange(first, first + m).float()[:, None].expand(B, G, m, D).clone()


def positions(m: int, first: int = 0) -> Tensor:
    return torch.arange(first, first + m).expand(B, 1, m).clone()


def drawn(m: int, seed: int = 0, levels: int = 1000) -> Tensor:
    return torch.randint(levels, (B, G, m), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("levels", [1000, 2])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.6, 1.0])
def test_who_goes_where(share: float, levels: int) -> None:
    store, sizes = tiered(share), (10, 7, 1)
    highs: list[list[list[int]]] = [[[] for _ in range(G)] for _ in range(B)]
    lows: list[list[list[int]]] = [[[] for _ in range(G)] for _ in range(B)]
    first = 0
    for seed, size in enumerate(sizes):
        scores = drawn(size, seed, levels)
        before = store.read()[0][..., 0] if first else torch.zeros(B, G, 0)
        order = store.append(tokens(size, first), -tokens(size, first), positions(size, first), scores)
        named = torch.cat([before, tokens(size, first)[..., 0]], 2)
        for b in range(B):
            for g in range(G):
                ranked = sorted(range(size), key=lambda t: (scores[b, g, t].item(), t), reverse=True)
                chosen = ranked[: round(share * size)]
                highs[b][g] += [first + t for t in sorted(chosen)]
                lows[b][g] += [first + t for t in range(size) if t not in chosen]
                expected = highs[b][g] + lows[b][g]
                assert store.read()[0][b, g, :, 0].tolist() == expected
                assert store.read()[1][b, g, :, 0].tolist() == [-t for t in expected]
                assert named[b, g][order[b, g]].tolist() == expected
        first += size
    assert store.segments == (len(highs[0][0]), len(lows[0][0]))
    assert len(store) == sum(sizes)


def test_padding_is_low() -> None:
    store, at = tiered(0.5), positions(6)
    at[0, 0, :3] = -1
    scores = torch.arange(6, 0, -1).float().expand(B, G, 6)
    store.append(tokens(6), tokens(6), at, scores)
    assert store.high.read()[0][0, 0, :, 0].tolist() == [3, 4, 5]
    assert store.high.read()[0][1, 0, :, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kept", [13, 9, 2, 1])
def test_keep(kept: int) -> None:
    store = tiered(0.6)
    store.append(tokens(13), tokens(13), positions(13), drawn(13))
    highs, lows = store.segments
    salient = round(kept * highs / 13)
    index = torch.cat([torch.arange(salient), highs + torch.arange(lows)[lows - (kept - salient) :]]).expand(B, G, -1)
    expected = store.read()[0].gather(2, index[..., None].expand(-1, -1, -1, D))
    store.keep(index)
    assert store.segments == (salient, kept - salient)
    assert torch.equal(store.read()[0], expected)
    assert store.append(tokens(4, 50), tokens(4, 50), positions(4, 50), drawn(4, 3)) is not None
    assert len(store) == kept + 4


def test_codes_in_two_widths_take_what_they_say() -> None:
    store = TieredStore(lambda: IntegerStore(Grid(4), Grid(4)), lambda: IntegerStore(Grid(2), Grid(2)), 0.25)
    store.append(tokens(16), tokens(16), positions(16), drawn(16))
    assert sum(t.untyped_storage().nbytes() for t in store.tensors()) == 2 * B * G * (4 * 2 + 12 * 1 + 16 * 4)
    store.select_rows(torch.tensor([1, 0, 1]))
    assert store.read()[0].shape == (3, G, 16, D)


def test_shapes_without_data() -> None:
    store = TieredStore(lambda: IntegerStore(Grid(4, 8, 1), Grid(4)), lambda: IntegerStore(Grid(2, 8, 1), Grid(2)), 0.6)
    for size in (20, 7):
        x = tokens(size).to("meta")
        order = store.append(x, x, positions(size).to("meta"), drawn(size).to("meta"))
    assert order is not None
    assert order.shape == (B, G, 27)
    assert store.segments == (16, 11)
    store.keep(torch.arange(10, device="meta").expand(B, G, 10))
    assert store.segments == (6, 4)
    assert store.read()[0].shape == (B, G, 10, D)
