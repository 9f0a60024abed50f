"""Packed weights are the weights, and the product with them is that of the same kernel with plain ones, to the bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tcw.kernels.packed_matmul import launch, layout, pack, packed_matmul, raw_matmul, unpack
from tcw.kernels.packed_matmul.cases import CASES, Case, make_inputs
from tcw.kernels.packed_matmul.check import fault
from tcw.kernels.packed_matmul.layout import CODES, TILE_BYTES, PackedWeight
from tcw.kernels.packed_matmul.reference import decode

from tests.kernels.host import HostModule

CPU = torch.device("cpu")
BY_NAME = {case.name: case for case in CASES}
FORMS = tuple(CODES)
Host = Callable[..., HostModule]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def packed(weight: torch.Tensor, form: str) -> PackedWeight:
    found = pack(weight, form, most=float("inf"))
    assert found is not None
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_is_right(host: Host, case: Case) -> None:
    assert fault(case, CPU, host("packed_matmul")) == ""


@pytest.mark.parametrize("order", ["reverse", 1, 2])
@pytest.mark.parametrize("name", ["k576", "n48-wide", "crowded-tiles", "shared-out-wide"])
def test_the_order_of_threads_does_not_matter(host: Host, name: str, order: str | int) -> None:
    assert fault(BY_NAME[name], CPU, host("packed_matmul", order=order)) == ""


@pytest.mark.parametrize("name", ["one-column", "k72", "n17-wide", "a-tile-for-each-warp", "crowded-tiles", "any-bits"])
def test_nothing_is_read_or_written_outside(host: Host, name: str) -> None:
    assert fault(BY_NAME[name], CPU, host("packed_matmul", sanitize=True)) == ""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_operations_in_plain_torch_are_right(case: Case) -> None:
    assert fault(case, CPU) == ""


BROKEN = {
    "an escape goes to the wrong half": ("i >= spot.first() ?", "i > spot.first() ?"),
    "escapes are put in too early": ("    __syncwarp(ALL);\n#pragma unroll 1", "#pragma unroll 1"),
    "a sign is that of a neighbour": ("sign << (6 - 2 * j)", "sign << (7 - 2 * j)"),
    "the ring is overwritten too early": ("start((stage + STAGES - 1) % STAGES,", "start(stage,"),
    "warps do not wait for each other": ("__syncthreads();\n    for", "for"),
    "the last share is left out": ("split < splits", "split + 1 < splits"),
    "the window is not moved": ("window = tile;", "window = window == 0 ? tile : window;"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_noticed(host: Host, tmp_path: Path, name: str) -> None:
    right = Path(layout.__file__).with_name("kernel.cu")
    old, new = BROKEN[name]
    text = right.read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "kernel.cu").write_text(text.replace(old, new), encoding="utf-8")
    module = host(tmp_path / "kernel.cu", order=1, sanitize=True)  # what it writes astray must not hit this process
    cases = ("k576", "n48-wide", "crowded-tiles", "shared-out", "more-than-a-window", "one-exponent")
    assert any(noticed(BY_NAME[c], module) for c in cases)


def noticed(case: Case, module: HostModule) -> bool:
    try:
        return fault(case, CPU, module) != ""
    except RuntimeError:
        return True


def test_cases_cover_what_they_say() -> None:
    assert len(BY_NAME) == len(CASES)
    splits = {c.name: launch.plan(c.m, c.n, c.k, c.multiprocessors).splits for c in CASES}
    assert (splits["shared-out"], splits["shared-out-wide"]) == (2, 4)
    for name, warps in (("more-than-a-window", 8), ("more-than-a-window-wide", 4)):
        assert splits[name] == 1
        assert -(-BY_NAME[name].k // 64) // warps > 32
    counts = {name: escapes_of(packed(make_inputs(BY_NAME[name]).weight, "p3")) for name in BY_NAME}
    assert max(counts["one-exponent"]) == 0
    assert max(counts["any-bits"]) > 900
    crowded = [word & 0xFFFFF for word in packed(make_inputs(BY_NAME["crowded-tiles"]).weight, "p4").index.tolist()]
    assert {0, 512 | 512 << 10, 3, 32 << 10} <= set(crowded)


def escapes_of(weight: PackedWeight) -> list[int]:
    return [(word & 1023) + (word >> 10 & 1023) for word in weight.index.tolist()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["one-weight", "k65", "n48-wide", "zeros-among-weights", "crowded-tiles", "any-bits"])
def test_the_layout_is_what_its_text_says(name: str, form: str) -> None:
    weight = make_inputs(BY_NAME[name]).weight
    found = packed(weight, form)
    assert torch.equal(bits(decode(found)), bits(weight))
    tiles = -(-weight.shape[0] // 16) * -(-weight.shape[1] // 64)
    assert found.tiles.shape == (tiles, TILE_BYTES[form])
    assert (found.index.numel(), found.base.numel()) == (tiles, -(-tiles // 4))
    assert found.escapes.numel() == max(8, -(-sum(escapes_of(found)) // 8) * 8)
    assert found.nbytes == tiles * (TILE_BYTES[form] + 4) + 4 * found.base.numel() + 2 * found.escapes.numel()


@pytest.mark.parametrize("form", FORMS)
def test_a_large_weight_is_packed_in_slabs(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    weight = make_inputs(BY_NAME["zeros-among-weights"]).weight
    whole = packed(weight, form)
    monkeypatch.setattr(layout, "_SLAB", 16 * 300)
    assert [len(range(*rows.indices(40))) for rows in layout.slabs(weight.shape)] == [16, 16, 8]
    parts = packed(weight, form)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), parts.tensors(), strict=True))
    assert torch.equal(bits(unpack(parts)), bits(weight))


def test_weights_of_a_model_pay_and_others_do_not() -> None:
    random = torch.Generator().manual_seed(3)
    weight = (torch.randn(256, 1024, generator=random) * 0.02).to(torch.bfloat16)
    sizes = {form: packed(weight, form).nbytes * 8 / weight.numel() for form in FORMS}
    assert 12.03 < sizes["p4"] < 12.06
    assert 11.3 < sizes["p3"] < 11.4
    for form in FORMS:
        assert pack(weight, form) is not None
        assert pack(weight, form, most=sizes[form] / 16 - 1e-6) is None
        assert pack(make_inputs(BY_NAME["any-bits"]).weight, form) is None
        assert pack(weight.float(), form) is None
        assert pack(weight[0], form) is None
        assert pack(weight[:, :0], form) is None
    with pytest.raises(ValueError, match="no form"):
        pack(weight, "p5")


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_contiguous_is_packed_as_it_is_read(form: str) -> None:
    weight = make_inputs(BY_NAME["k576"]).weight.T
    assert torch.equal(bits(unpack(packed(weight, form))), bits(weight.contiguous()))


def test_rows_of_tiles_are_packed_weights_too() -> None:
    """Rows of tiles with the parts of the index that are theirs, as a look-up in an embedding takes them."""
    weight = (torch.randn(64, 512, generator=torch.Generator().manual_seed(4)) * 0.02).to(torch.bfloat16)
    for form in FORMS:
        whole, wanted = packed(weight, form), torch.tensor([3, 0, 3])
        parts = [t.view(4, -1, *t.shape[1:])[wanted].flatten(0, 1) for t in whole.tensors()[:3]]
        found = unpack(PackedWeight(form, (48, 512), whole.palette, *parts, whole.escapes))
        assert torch.equal(bits(found), bits(weight.view(4, 16, 512)[wanted].view(48, 512)))


def test_memory_is_all_that_changes_when_a_weight_moves() -> None:
    weight = packed(make_inputs(BY_NAME["m8"]).weight, "p4")
    moved = weight.with_tensors(tuple(t.clone() for t in weight.tensors())).to("cpu")
    assert (moved.form, moved.shape, moved.palette, moved.device) == (weight.form, weight.shape, weight.palette, CPU)
    assert all(torch.equal(a, b) for a, b in zip(moved.tensors(), weight.tensors(), strict=True))
    with pytest.raises(ValueError, match="zip"):
        weight.with_tensors(weight.tensors()[:3])


@pytest.mark.parametrize("shape", [(8, 192), (2, 3, 192), (17, 192), (0, 192), (192,)])
def test_a_product_has_as_many_axes_as_its_input(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(BY_NAME["not-finite"])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected = torch.nn.functional.linear(x, inputs.weight, inputs.bias)
    assert torch.equal(bits(raw_matmul(x, inputs.weight, inputs.bias)), bits(expected))
    for form in FORMS:
        assert torch.equal(bits(packed_matmul(x, packed(inputs.weight, form), inputs.bias)), bits(expected))


def test_operands_that_do_not_fit_are_refused() -> None:
    inputs = make_inputs(BY_NAME["m2"])
    weight, x = packed(inputs.weight, "p4"), inputs.x
    assert inputs.bias is not None
    for wrong in (x[:, :-1], x.float(), x[0, 0]):
        with pytest.raises(ValueError, match="x is"):
            packed_matmul(wrong, weight)
        with pytest.raises(ValueError, match="x is"):
            raw_matmul(wrong, inputs.weight)
    for wrong in (inputs.bias[:-1], inputs.bias.float(), inputs.bias[None]):
        with pytest.raises(ValueError, match="the bias is"):
            packed_matmul(x, weight, wrong)
    with pytest.raises(ValueError, match="not a BF16 matrix"):
        raw_matmul(x, inputs.weight.float())
    for wrong in (torch.empty(33, 128), torch.empty(33, 127).bfloat16(), torch.empty(128, 33).bfloat16().T):
        with pytest.raises(ValueError, match="out is"):
            unpack(weight, wrong)


def test_unpacking_writes_where_it_is_told() -> None:
    weight = make_inputs(BY_NAME["k65"]).weight
    out = torch.empty_like(weight)
    assert unpack(packed(weight, "p3"), out) is out
    assert torch.equal(bits(out), bits(weight))
    scratch = torch.zeros(1200, 2, dtype=torch.bfloat16)
    x = torch.ones(17, 65, dtype=torch.bfloat16)
    assert torch.equal(packed_matmul(x, packed(weight, "p4"), None, scratch), torch.nn.functional.linear(x, weight))
    assert torch.equal(bits(scratch.view(-1)[: weight.numel()]), bits(weight.view(-1)))


def test_operands_anywhere_in_memory_give_the_same_bits(host: Host) -> None:
    inputs, module = make_inputs(BY_NAME["k576"]), host("packed_matmul")
    expected = launch.matmul(module, inputs.x, inputs.weight, None)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape).copy_(tensor)

    x, weight = shifted(inputs.x), shifted(inputs.weight)
    assert x.data_ptr() % 16 != 0
    assert torch.equal(bits(launch.matmul(module, x, weight, None)), bits(expected))
    found = packed(inputs.weight, "p4")
    apart = found.with_tensors((found.tiles, found.index, found.base, shifted(found.escapes)))
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        launch.matmul(module, x, apart, None)
    out = shifted(inputs.weight).zero_()
    launch.unpack(module, found, out)
    assert torch.equal(bits(out), bits(weight))


def test_a_product_with_nothing_launches_nothing() -> None:
    weight = make_inputs(BY_NAME["m2"]).weight
    assert launch.matmul(None, weight[:0], weight, None).shape == (0, 33)


@pytest.mark.parametrize("rows", [1, 8, 9, 16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (1024, 4096), (4096, 14336), (28672, 8192), (128256, 4096)])
def test_a_plan_uses_the_device_and_no_more(rows: int, n: int, k: int) -> None:
    chosen = launch.plan(rows, n, k, 132)
    assert chosen.blocks * chosen.wide * 16 >= n > (chosen.blocks - 1) * chosen.wide * 16
    assert chosen.splits == 1 or chosen.blocks * chosen.splits <= 264
    assert chosen.splits == 1 or k // 64 // chosen.splits >= 4 * chosen.warps
    for form in ("raw", *FORMS):  # what a block may have on any of the architectures
        assert launch.shared_bytes(form, chosen.wide) <= 64 << 10


def test_the_operations_are_known_to_torch_compile() -> None:
    inputs = make_inputs(BY_NAME["m8"])
    weight = packed(inputs.weight, "p3")
    palette = list(weight.palette)
    product = (inputs.x, *weight.tensors(), inputs.bias, palette, weight.shape[0])
    torch.library.opcheck(torch.ops.tcw.packed_matmul.default, product)
    torch.library.opcheck(torch.ops.tcw.raw_matmul.default, (inputs.x, inputs.weight, inputs.bias))
    out = torch.zeros_like(inputs.weight)
    torch.library.opcheck(torch.ops.tcw.packed_unpack.default, (*weight.tensors(), palette, out))


@pytest.mark.parametrize("rows", [3, 20])
def test_a_layer_is_compiled_as_one_graph(rows: int) -> None:
    inputs = make_inputs(BY_NAME["m8"])
    weight = packed(inputs.weight, "p4")

    def layer(x: torch.Tensor) -> torch.Tensor:
        return packed_matmul(x * 2, weight, inputs.bias) + raw_matmul(x, inputs.weight)

    x = inputs.x[:1].expand(rows, -1).contiguous()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_is_right_on_a_gpu(case: Case) -> None:
    from tcw import cuda

    assert fault(case, torch.device("cuda")) == ""
    assert fault(case, torch.device("cuda"), cuda.module("packed_matmul", torch.device("cuda"))) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_packing_on_a_gpu_gives_the_same_bytes(form: str) -> None:
    weight = make_inputs(BY_NAME["zeros-among-weights"]).weight
    here, there = packed(weight, form), packed(weight.cuda(), form)
    assert here.palette == there.palette
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here.tensors(), there.tensors(), strict=True))


@pytest.mark.gpu
def test_a_graph_holds_the_operations() -> None:
    inputs = make_inputs(BY_NAME["shared-out"], "cuda")
    weight = packed(inputs.weight, "p4")
    expected, plain = packed_matmul(inputs.x, weight, inputs.bias), unpack(weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, again = packed_matmul(inputs.x, weight, inputs.bias), unpack(weight)
    graph.replay()
    assert torch.equal(bits(y), bits(expected))
    assert torch.equal(bits(again), bits(plain))
