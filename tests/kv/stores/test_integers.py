"""Integer stores: a grid written in plain loops, error bounds, exact bytes, and that nothing is rounded twice."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tcw.kv.rope import Rope
from tcw.kv.stores._frames import LARGEST, SPREAD, Frame, signs
from tcw.kv.stores._grids import Grid, hadamard, round_down, step_of
from tcw.kv.stores._packing import WIDTHS, packed_width
from tcw.kv.stores.integers import Integers, IntegerStore

B, G, D = 2, 3, 16
ROPE = Rope(1 / 100 ** (torch.arange(0, 12, 2) / 12))  # 12 of the 16 elements are rotated
TURNED = Frame(centre=True, scale=SPREAD, turn=True, rope=ROPE)
MAKERS: dict[str, Callable[[int], IntegerStore]] = {
    "kivi": lambda bits: IntegerStore(Grid(bits, tokens=8, channels=1), Grid(bits, channels=8)),
    "ragged": lambda bits: IntegerStore(Grid(bits, tokens=5, channels=3), Grid(bits, tokens=3, channels=7)),
    "cst": lambda bits: IntegerStore(Grid(bits), Grid(bits), Frame(scale=LARGEST), Frame(scale=LARGEST)),
    "turned": lambda bits: IntegerStore(
        Grid(bits, symmetric=True), Grid(bits, symmetric=True), TURNED, Frame(centre=True, scale=SPREAD, turn=True)
    ),
    "clipped blocks": lambda bits: IntegerStore(
        Grid(bits, tokens=4, channels=8, symmetric=True), Grid(bits, channels=5, symmetric=True)
    ),
}


def drawn(m: int, seed: int = 0, dtype: torch.dtype = torch.float32, batch: int = B) -> Tensor:
    """Tokens [B, G, m, D] with an offset and a size for each channel."""
    made = torch.Generator().manual_seed(seed)
    channel = torch.randn(1, G, 1, D, generator=made)
    return (torch.randn(batch, G, m, D, generator=made) * channel.exp() + 4 * channel).to(dtype)


def places(m: int, first: int = 0, batch: int = B) -> Tensor:
    return torch.arange(first, first + m).expand(batch, 1, m)


def filled(make: Callable[[], IntegerStore], *sizes: int, dtype: torch.dtype = torch.float32) -> IntegerStore:
    """A store that got one text in pieces."""
    store, keys, values = make(), drawn(sum(sizes), 1, dtype), drawn(sum(sizes), 2, dtype)
    first = 0
    for size in sizes:
        piece = slice(first, first + size)
        assert store.append(keys[:, :, piece], values[:, :, piece], places(size, first)) is None
        first += size
    return store


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Bit for bit, but for keys in float32 that were rotated: cosines may differ in their last bit."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-5)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("tokens", "channels"), [(1, 0), (8, 1), (1, 8), (5, 3), (100, 1)])
def test_asymmetric_grid_in_plain_loops(bits: int, tokens: int, channels: int) -> None:
    x = drawn(19, batch=1)
    held = Integers(Grid(bits, tokens, channels), Frame())
    held.append(x, places(19, batch=1))
    found, levels, width = held.read(), 2**bits - 1, channels or D
    for g in range(G):
        for t0 in range(0, 19, tokens):
            for d0 in range(0, D, width):
                block = x[0, g, t0 : t0 + tokens, d0 : d0 + width].double()
                low, high = block.min().item(), block.max().item()
                where = (0, g, t0 // tokens, d0 // width)
                minimum, step = held.minimum[where].item(), held.step[where].item()
                assert low - abs(low) / 128 <= minimum <= low
                span = (high - minimum) / levels
                assert span * (1 - 1e-6) <= step <= span * (1 + 1 / 128)
                for t in range(t0, min(19, t0 + tokens)):
                    for d in range(d0, min(D, d0 + width)):
                        value = x[0, g, t, d].item()
                        code = min(levels, max(0, round((value - minimum) / step)))
                        assert found[0, g, t, d].item() == pytest.approx(minimum + code * step, abs=step * 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", ["kivi", "ragged", "cst"])
def test_error_is_half_a_step(name: str, bits: int, dtype: torch.dtype) -> None:
    store = filled(lambda: MAKERS[name](bits), 24, 8, 5, dtype=dtype)
    for held, x in zip((store.keys, store.values), (drawn(37, 1, dtype), drawn(37, 2, dtype)), strict=True):
        _, step = held._spread(held.grids, held.blocks, 37)
        scale = 1.0 if held.scale is None else held.scale.float()
        found = held.read().float()
        ulp = torch.maximum(x.float().abs(), found.abs()) * torch.finfo(dtype).eps + 1e-5
        assert ((found - x.float()).abs() <= step * scale / 2 + ulp).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", ["turned", "clipped blocks"])
def test_error_is_half_a_step_within_the_clip_and_never_more_than_without(name: str, bits: int) -> None:
    made = MAKERS[name](bits)
    for held, x in ((made.keys, drawn(37, 1)), (made.values, drawn(37, 2))):
        held.append(x, places(37))
        y = Integers(held.grid, held.frame.frame).frame.enter(x, places(37))
        minimum, step = held._spread(held.grids, held.blocks, 37)
        codes = held.grid.codes(y, minimum, step)
        error = (codes * step + minimum - y).abs()
        edge = step * 2 ** (bits - 1)
        assert (error <= torch.maximum(step / 2, y.abs() - edge + step / 2) + 1e-5).all()
        tiles = held.grid._tiles(y)
        span = tiles.abs().amax((3, 5)) * 2 / held.grid.levels
        steps = step_of(held.grids[0], held.unit)
        assert (steps <= span * 2 ** (1 / 8) * (1 + 1e-5)).all()
        assert (steps >= span * 2 ** (-(8 - bits) / 8) * (1 - 1e-5)).all()


def test_step_has_the_least_squared_error() -> None:
    """Against all steps that may be chosen, one block at a time."""
    x = drawn(6, 3, batch=1)
    held = Integers(Grid(2, symmetric=True), Frame())
    held.append(x, places(6, batch=1))
    found = held.read()
    unit = x.abs().amax((2, 3))
    for g in range(G):
        for t in range(6):
            token = x[0, g, t].double()
            widest = math.ceil(8 * math.log2(token.abs().max() * 2 / 3 / unit[0, g]) - 1e-4)
            errors = []
            for smaller in range(7):
                step = unit[0, g].double() * 2 ** ((widest - smaller) / 8)
                code = (token / step + 1.5).round().clamp(0, 3)
                errors.append(((code - 1.5) * step - token).square().sum().item())
            assert (found[0, g, t] - token).square().sum().item() == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_turned_tokens_err_by_the_norm(bits: int) -> None:
    """Rotations keep norms: what the frame's codes err by, the token errs by, up to the largest c."""
    x = drawn(40, 1)
    held = Integers(Grid(bits, symmetric=True), TURNED)
    held.append(x, places(40))
    y = Integers(Grid(bits, symmetric=True), TURNED).frame.enter(x, places(40))
    minimum, step = held._spread(held.grids, held.blocks, 40)
    error = (held.grid.codes(y, minimum, step) * step + minimum - y).norm(dim=-1)
    assert held.scale is not None
    largest = held.scale.float().amax(-1)
    assert ((held.read() - x).norm(dim=-1) <= error * largest * (1 + 1e-4) + 1e-5).all()


def test_frame_comes_back() -> None:
    x = drawn(30, 4)
    for frame in (Frame(), Frame(centre=True), Frame(scale=LARGEST), Frame(turn=True), Frame(rope=ROPE), TURNED):
        framed = Integers(Grid(4), frame).frame
        y = framed.enter(x[:, :, :20], places(20)), framed.enter(x[:, :, 20:], places(10, 70_000))
        torch.testing.assert_close(framed.leave(torch.cat(y, 2)), x, rtol=1e-5, atol=1e-5)


def test_keys_before_rope_are_what_the_frame_rounds() -> None:
    before = drawn(25, 5)
    at = places(25, 3)
    y = Integers(Grid(4), Frame(rope=ROPE)).frame.enter(ROPE.rotate(before, at), at)
    # positions are kept modulo 2^16 and the first of them is 0: all are turned alike
    torch.testing.assert_close(y, before, rtol=1e-4, atol=1e-4)


def test_signs_differ_from_place_to_place() -> None:
    drawn_signs = signs(torch.arange(-(2**15), 2**15, 32, dtype=torch.int16), 50)
    assert drawn_signs.shape == (2048, 50)
    assert set(drawn_signs.unique().tolist()) == {-1.0, 1.0}
    alike = drawn_signs @ drawn_signs.T / 50
    assert (alike - torch.eye(2048)).mean().abs() < 1e-3
    assert (alike - torch.eye(2048)).square().mean() == pytest.approx(1 / 50, rel=0.05)  # as independent signs have it
    assert drawn_signs.mean(0).abs().max() < 0.1


def test_centre_and_scale_are_measured_on_real_tokens() -> None:
    x, at = drawn(20, 6), places(20).clone()
    at[0, 0, :7] = -1
    noisy = x.clone()
    noisy[0, :, :7] = 1e4
    for mine, theirs in ((x, noisy), (x[:1, :, 7:], noisy[:1])):
        found, expected = Integers(Grid(4), TURNED).frame, Integers(Grid(4), TURNED).frame
        found.enter(theirs, at[: len(theirs)])
        expected.enter(mine, at[: len(mine), :, 20 - mine.shape[2] :])
        torch.testing.assert_close(found.centre, expected.centre, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(found.scale, expected.scale, rtol=1e-2, atol=1e-2)


def test_padding_widens_no_channel() -> None:
    x, at = drawn(16, 7), places(16).clone()
    at[0, 0, :11] = -1
    noisy = x.clone()
    noisy[0, :, :11] = 1e4
    held = Integers(Grid(4, tokens=8, channels=1), Frame())
    held.append(noisy, at)
    assert (held.step.float().amax() < 100).all()
    assert torch.isfinite(held.read()).all()
    alone = Integers(Grid(4, tokens=8, channels=1), Frame())
    alone.append(x[:1, :, 11:], at[:1, :, 11:])
    assert torch.equal(held.read()[:1, :, 11:], alone.read())


@pytest.mark.parametrize(("dim", "block"), [(1, 1), (2, 2), (64, 64), (80, 16), (7, 1), (96, 32)])
def test_hadamard_is_its_definition(dim: int, block: int) -> None:
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    x = torch.randn(5, dim, generator=torch.Generator().manual_seed(dim))
    expected = (x.unflatten(-1, (-1, block)) @ matrix / block**0.5).flatten(-2)
    torch.testing.assert_close(hadamard(x), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_below() -> None:
    x = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,)), torch.tensor([0.0, 1.0, -1.0, 6e4])])
    below = round_down(x)
    assert (below.float() <= x).all()
    assert (x - below.float() <= x.abs() / 128).all()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("sizes", [(8, 16, 8), (24, 8), (32,)])
def test_pieces_are_the_whole(name: str, sizes: tuple[int, ...]) -> None:
    """What is rounded stays so; with the same first tokens to measure and the same blocks, so does everything else."""
    make = lambda: MAKERS[name](3)  # noqa: E731
    whole, pieces = filled(make, *sizes), make()
    keys, values = drawn(32, 1), drawn(32, 2)
    for end in [sum(sizes[:i]) for i in range(len(sizes) + 1)][1:]:
        before = pieces.read() if len(pieces) else None
        part = slice(len(pieces), end)
        pieces.append(keys[:, :, part], values[:, :, part], places(end - part.start, part.start))
        if before is not None:
            assert_same(tuple(t[:, :, : part.start] for t in pieces.read()), before)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), pieces.tensors(), strict=True))
    if name == "kivi":
        at_once = filled(make, 32)
        assert all(torch.equal(a, b) for a, b in zip(at_once.tensors(), pieces.tensors(), strict=True))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("sizes", [(32,), (13, 8, 11), (1, 1, 1), (40, 3)])
def test_keep_gathers(name: str, sizes: tuple[int, ...]) -> None:
    store = filled(lambda: MAKERS[name](2), *sizes)
    for kept, seed in ((len(store), 0), (max(1, len(store) // 3), 1), (1, 2)):
        made = torch.Generator().manual_seed(seed)
        index = torch.rand(B, G, len(store), generator=made).argsort(-1)[..., :kept].sort(-1).values
        expected = tuple(x.gather(2, index[..., None].expand(-1, -1, -1, D)) for x in store.read())
        store.keep(index)
        assert len(store) == kept
        assert_same(store.read(), expected)  # type: ignore[arg-type]
    keys = drawn(9, 8)
    before = store.read()
    store.append(keys, keys, places(9, 50))
    after = store.read()
    assert len(store) == 10
    assert_same(tuple(x[:, :, :1] for x in after), before)  # type: ignore[arg-type]
    assert (after[1][:, :, 1:] - keys).abs().mean() < 2 * keys.std()


def test_blocks_that_nobody_uses_are_forgotten() -> None:
    store = filled(lambda: MAKERS["kivi"](4), 64)
    index = torch.tensor([0, 3, 17, 30, 31]).expand(B, G, 5)  # of the blocks 0, 2 and 3 of 8
    store.keep(index)
    assert store.keys.minimum.shape == (B, G, 3, D)
    assert store.keys.blocks is not None
    assert store.keys.blocks.dtype == torch.uint8
    assert store.keys.blocks[0, 0].tolist() == [0, 0, 1, 2, 2]


def test_more_blocks_than_a_byte_can_number() -> None:
    held = Integers(Grid(4, tokens=2, channels=1), Frame())
    x = drawn(601, 9, batch=1)
    held.append(x, places(601, batch=1))
    assert held.blocks is None
    held.append(x[:, :, :1], places(1, batch=1))
    assert held.blocks is not None
    assert held.blocks.dtype == torch.int16
    assert (held.read()[:, :, -1] - x[:, :, 0]).abs().max() < 1e-2 * x.abs().max()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bytes_by_the_formula(name: str, bits: int) -> None:
    m = 32
    store = filled(lambda: MAKERS[name](bits), m)
    expected = 0
    for held in (store.keys, store.values):
        grid, frame = held.grid, held.frame.frame
        expected += B * G * m * packed_width(D, bits)
        blocks = math.ceil(m / grid.tokens) * math.ceil(D / (grid.channels or D))
        expected += B * G * (blocks + 4 if grid.symmetric else blocks * 4)
        expected += B * G * D * 2 * (frame.centre + bool(frame.scale))
    expected += B * m * 2 * any(held.frame.frame.places for held in (store.keys, store.values))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in store.tensors()}
    assert sum(storages.values()) == sum(t.nbytes for t in store.tensors()) == expected


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_is_a_view_of_more(name: str) -> None:
    store = filled(lambda: MAKERS[name](3), 16, 3)
    for step in (
        lambda: store.keep(torch.arange(0, 19, 2).expand(B, G, -1)),
        lambda: store.select_rows(torch.tensor([1])),
        lambda: store.append(drawn(2, 3)[:1], drawn(2, 4)[:1], places(2, 30)[:1]),
    ):
        step()
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in store.tensors())


@pytest.mark.parametrize("name", MAKERS)
def test_rows(name: str) -> None:
    for forgotten in (False, True):
        store = filled(lambda: MAKERS[name](3), 16, 5)
        if forgotten:
            store.keep(torch.stack([torch.arange(0, 20, 2), torch.arange(1, 21, 2)])[:, None].expand(B, G, -1))
        keys, values = store.read()
        rows = torch.tensor([1, 1, 0])
        store.select_rows(rows)
        assert_same(store.read(), (keys[rows], values[rows]))
        store.append(drawn(3, 5)[rows], drawn(3, 6)[rows], places(3, 40)[rows])
        assert store.read()[0].shape[0] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MAKERS)
def test_constants_zeros_and_what_is_huge(name: str, dtype: torch.dtype) -> None:
    m, far = 16, 1.3 if name == "turned" else 0.35  # a channel may begin to vary after it was measured
    for x in (
        torch.zeros(B, G, m, D), torch.full((B, G, m, D), -3.3), torch.full((B, G, m, D), 65504.0),
        drawn(m).sign() * 6e4, drawn(m) * 1e-6, torch.cat([torch.zeros(B, G, 8, D), drawn(8)], 2),
    ):  # fmt: skip
        x = x.to(dtype)
        store = MAKERS[name](4)
        store.append(x[:, :, :8], x[:, :, :8], places(8))
        store.append(x[:, :, 8:], x[:, :, 8:], places(8, 8))
        for found in store.read():
            assert found.dtype == dtype
            assert torch.isfinite(found).all()
            assert (found.float() - x.float()).abs().max() <= far * x.float().abs().max() + 1e-6
    if name in ("kivi", "ragged", "cst"):
        store = MAKERS[name](2)
        constant = torch.full((B, G, m, D), -3.3, dtype=dtype)
        store.append(constant, constant, places(m))
        torch.testing.assert_close(store.read()[0], constant, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", MAKERS)
def test_a_single_token(name: str) -> None:
    store = filled(lambda: MAKERS[name](4), 1)
    assert store.read()[0].shape == (B, G, 1, D)
    assert (store.read()[1] - drawn(1, 2)).abs().max() < 0.2 * drawn(1, 2).abs().max()


@pytest.mark.parametrize("name", MAKERS)
def test_shapes_without_data(name: str) -> None:
    """A plan runs the same code on tensors without data, and counts the same bytes."""
    real, plan = MAKERS[name](3), MAKERS[name](3)
    for first, size in pairwise((0, 16, 21, 40)):
        for store, device in ((real, "cpu"), (plan, "meta")):
            x = drawn(size - first).to(device)
            store.append(x, x, places(size - first, first).to(device))
    assert [(t.shape, t.dtype) for t in real.tensors()] == [(t.shape, t.dtype) for t in plan.tensors()]
    index = torch.arange(0, 40, 3).expand(B, G, -1)
    real.keep(index)
    plan.keep(index.to("meta"))
    plan.select_rows(torch.tensor([1, 0], device="meta"))
    assert plan.read()[0].shape == real.read()[0].shape
    assert sum(t.nbytes for t in real.tensors()) <= sum(t.nbytes for t in plan.tensors())


def test_a_rotation_wider_than_a_token_is_left_out() -> None:
    x = drawn(20)[..., :10]
    held = Integers(Grid(4, symmetric=True), TURNED)
    held.append(x, places(20))
    assert (held.read() - x).abs().max() < 0.2 * x.abs().max()


def test_which_stores_a_kernel_can_read() -> None:
    assert [name for name in MAKERS if MAKERS[name](4).fusible] == ["kivi", "ragged", "cst"]
    assert MAKERS["kivi"](4).block == 8
    assert MAKERS["turned"](4).block == 1


@pytest.mark.parametrize("bits", [2, 3])
def test_turning_and_centring_help_where_channels_differ(bits: int) -> None:
    x = drawn(128, 10)
    errors = {}
    for name, grid, frame in (
        ("plain", Grid(bits), Frame()),
        ("turned", Grid(bits, symmetric=True), Frame(centre=True, scale=SPREAD, turn=True)),
    ):
        held = Integers(grid, frame)
        held.append(x, places(128))
        errors[name] = (held.read() - x).square().mean().item()
    assert errors["turned"] < errors["plain"] / 4
