"""The kernels that encode make the codec's bytes: run on the processor from their own source, and in plain torch."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcw.kernels.lanes_encode import OPERATIONS, DeviceStream, encode, launch, reference
from tcw.kernels.lanes_encode.cases import CASES, Case, cost, make_inputs
from tcw.kernels.lanes_encode.stream import encode_with

from tcw.codecs import lanes, lanes_words
from tcw.folders import folder
from tests.kernels.host import HostError, HostModule

Host = Callable[..., HostModule]
BY_NAME = {case.name: case for case in CASES}
HARD = ["zero-runs", "tables-bf16", "12-bit-codes-u8", "weights-f32", "2000-symbols-u16", "ragged-129"]


def wrong(found: DeviceStream, expected: lanes.Stream) -> list[str]:
    """What differs from the codec's stream; empty where nothing does."""
    stream = found.numpy()
    if set(stream.parts) != set(expected.parts) or stream.params != expected.params:
        return ["names or parameters"]
    same = {k: part.dtype == expected.parts[k].dtype and np.array_equal(part, expected.parts[k])
            for k, part in stream.parts.items()}  # fmt: skip
    return [name for name, right in same.items() if not right]


def run(module: HostModule, case: Case) -> list[str]:
    words, expected = make_inputs(case)
    return wrong(encode(torch.from_numpy(words), case.split, segments=case.segments, module=module), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_make_the_codecs_bytes(host: Host, case: Case) -> None:
    assert run(host("lanes_encode"), case) == []


@pytest.mark.parametrize("order", ["reverse", 1, 2])
def test_the_order_of_threads_does_not_matter(host: Host, order: str | int) -> None:
    module = host("lanes_encode", order=order)
    assert {name: run(module, BY_NAME[name]) for name in HARD} == {name: [] for name in HARD}


@pytest.mark.parametrize("name", ["tables-bf16", "tables-f32", "2000-symbols-u16"])
def test_kernels_touch_no_memory_but_their_own(host: Host, name: str) -> None:
    assert run(host("lanes_encode", sanitize=True), BY_NAME[name]) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_operations_make_the_codecs_bytes(case: Case) -> None:
    words, expected = make_inputs(case)
    assert wrong(encode_with(OPERATIONS, torch.from_numpy(words), case.split, case.segments, 12), expected) == []


def test_a_processor_without_a_module_uses_the_codec() -> None:
    words, expected = make_inputs(BY_NAME["tables-bf16"])
    found = encode(torch.from_numpy(words), "bf16", segments=BY_NAME["tables-bf16"].segments)
    assert wrong(found, expected) == []
    assert found.nbytes == expected.nbytes


@pytest.mark.parametrize("name", ["weights-bf16", "weights-f32", "2000-symbols-u16"])
def test_operations_are_what_torch_expects(name: str) -> None:
    words, _ = make_inputs(BY_NAME[name])
    bits = torch.from_numpy(words).view(torch.int32 if words.itemsize == 4 else torch.int16)
    split, ops, checks = BY_NAME[name].split, torch.ops.tcw, ("test_schema", "test_faketensor")
    table = torch.full((lanes.SPLITS[split].mask + 1,), 1 << reference.LENGTH, dtype=torch.int32)
    lane_bytes, _, _ = ops.lanes_measure(bits, table, split)
    sizes = lane_bytes.view(-1, 32).sum(1, dtype=torch.int32)
    base = (sizes.cumsum(0, dtype=torch.int32) - sizes).view(torch.uint32)
    codes = torch.empty(int(sizes.sum()), dtype=torch.uint8)
    torch.library.opcheck(ops.lanes_count.default, (bits, split), test_utils=checks)
    torch.library.opcheck(ops.lanes_measure.default, (bits, table, split), test_utils=checks)
    torch.library.opcheck(
        ops.lanes_write.default, (bits, table, split, lane_bytes, base, 528, codes), test_utils=checks
    )


def test_a_weight_of_any_shape_wherever_it_begins(host: Host) -> None:
    module = host("lanes_encode")
    weight = torch.randn(37, 113, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    words = weight.view(torch.uint16).numpy().reshape(-1)
    assert wrong(encode(weight, "bf16", module=module), lanes.encode(words, "bf16")) == []
    turned = words.reshape(37, 113).T.reshape(-1)
    assert wrong(encode(weight.T, "bf16", module=module), lanes.encode(turned, "bf16")) == []
    for first in (1, 2, 3, 4):
        part = weight.view(-1)[first:]
        assert wrong(encode(part, "bf16", module=module), lanes.encode(words[first:], "bf16")) == []


def test_the_widest_codes_fill_every_lane(host: Host) -> None:
    words = np.random.default_rng(0).permutation(np.arange(3 * 4096, dtype=np.uint16) % 4096)
    found = encode(torch.from_numpy(words), "u16", module=host("lanes_encode"))
    assert found.parts["lane_bytes"].tolist() == [192] * 96
    assert wrong(found, lanes.encode(words, "u16")) == []


@pytest.mark.parametrize("split", ["bf16", "u16"])
def test_few_blocks_take_many_chunks(host: Host, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    """A large tensor on a small device, and one that is counted in several parts."""
    monkeypatch.setattr(launch, "_BLOCKS", 1)
    monkeypatch.setattr(launch, "COUNTED", 4096)
    module = host("lanes_encode")
    monkeypatch.setattr(module, "multiprocessors", 1)
    words = (np.random.default_rng(0).standard_normal(70_001).astype(np.float32).view(np.uint32) >> 16).astype(
        np.uint16
    )
    words = words if split == "bf16" else words // 64
    assert launch.count(module, torch.from_numpy(words).view(torch.int16), split).shape[0] == 18
    assert wrong(encode(torch.from_numpy(words), split, module=module), lanes.encode(words, split)) == []


def stays_in_its_bytes(module: HostModule, begin: int) -> bool:
    """Write one chunk to byte `begin` among others; say whether it is right and leaves the others alone."""
    words = torch.from_numpy(make_inputs(BY_NAME["eight-warps-and-more"])[0]).view(torch.int16)[:4096]
    table = torch.arange(256, dtype=torch.int32) % 64 | 6 << reference.LENGTH
    lane_bytes = torch.full((32,), 96, dtype=torch.uint8)
    found, expected = (torch.full((begin + 3072 + 40,), 0xEE, dtype=torch.uint8) for _ in range(2))
    base = torch.tensor([begin], dtype=torch.int32).view(torch.uint32)
    arguments = words, table, "bf16", lane_bytes, base, 3088
    launch.write(module, *arguments, found)
    reference.write(*arguments, expected)
    assert (expected[:begin] == 0xEE).all()
    assert (expected[begin + 3072 :] == 0xEE).all()
    return torch.equal(found, expected)


def test_a_chunk_is_written_into_its_own_bytes(host: Host) -> None:
    """Chunks begin anywhere: neighbours share words and vectors, which one must not write for the other."""
    assert all(stays_in_its_bytes(host("lanes_encode"), begin) for begin in (0, 1, 15, 16, 17, 250))


@st.composite
def streams(draw: st.DrawFn) -> tuple[np.ndarray, str, list[int], int]:
    split = draw(st.sampled_from(sorted(lanes.SPLITS)))
    sizes = draw(st.lists(st.sampled_from([0, 1, 3, 127, 130, 4096, 5001]), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    width, few = lanes.SPLITS[split].word, draw(st.integers(1, 200))
    pool = rng.integers(0, np.iinfo(width).max, few, dtype=width, endpoint=True)
    skew = rng.random(sum(sizes)) ** draw(st.sampled_from([1, 8]))
    return pool[(skew * few).astype(int)], split, sizes, draw(st.integers(8, 12))


@given(stream=streams())
@settings(max_examples=40, deadline=None)
def test_any_words(host: Host, stream: tuple[np.ndarray, str, list[int], int]) -> None:
    words, split, sizes, max_length = stream
    expected = lanes.encode(words, split, segments=sizes, max_length=max_length)
    module = host("lanes_encode")
    found = encode(torch.from_numpy(words), split, segments=sizes, max_length=max_length, module=module)
    assert wrong(found, expected) == []


def test_what_cannot_be_coded(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    module = host("lanes_encode")
    with pytest.raises(lanes.NotCodable, match="4097 symbols"):
        encode(torch.arange(4097, dtype=torch.int16), "u16", module=module)
    words, expected = make_inputs(BY_NAME["tables-bf16"])
    size = expected.parts["codes"].size
    monkeypatch.setattr(lanes_words, "MAX_CODES", size - 1)
    with pytest.raises(lanes.NotCodable, match=f"{size} bytes of codes"):
        encode(torch.from_numpy(words), "bf16", segments=BY_NAME["tables-bf16"].segments, module=module)


def test_arguments_that_do_not_fit(host: Host) -> None:
    module, weight = host("lanes_encode"), torch.zeros(8, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="4 bytes"):
        encode(weight, "f32", module=module)
    with pytest.raises(ValueError, match="segments"):
        encode(weight, "bf16", segments=[63], module=module)
    with pytest.raises(ValueError, match="codes are 1 to 12 bits"):
        encode(weight, "bf16", max_length=13, module=module)


BROKEN = {
    "the warps' counters are not added up": ("warp < WARPS; ++warp) sum", "warp < 1; ++warp) sum"),
    "words behind the last four are not counted": ("if (thread < count % GROUP)", "if (thread + 1 < count % GROUP)"),
    "nothing waits for the table": ("        __syncthreads();\n        return near;", "        return near;"),
    "the copy is not cleared": ("make_uint4(0, 0, 0, 0);", "make_uint4(0, 0, 0, 1u << 31);"),
    "nothing waits for the cleared copy": (
        "        __syncwarp();\n        const typename Split::Word* here", "        const typename Split::Word* here"),
    "nothing waits for the other lanes' codes": ("        __syncwarp();\n        copy_out(", "        copy_out("),
    "words are overwritten": ("if (bits) atomicOr(to, bits);", "if (bits) *to = bits;"),
    "nothing waits for words that others fill": ("        __syncwarp();\n        if (bits)", "        if (bits)"),
    "vectors overlap the next chunk": ("last = end / VECTOR * VECTOR;", "last = (end + 15) / VECTOR * VECTOR;"),
    "the first bytes are left out": ("at >= begin && at < min(first, end)", "at > begin && at < min(first, end)"),
    "mantissa and sign are mixed up": ("(low & 0x7F7F7F7F)", "(low & 0xFFFFFFFF)"),
}  # fmt: skip


OTHERS = re.compile(r'extern "C" __global__ void __launch_bounds__\(256\) \w+_(f16|f32|u8|u16)\([^{]*\{[^}]*\}')


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_noticed(host: Host, tmp_path: Path, name: str) -> None:
    source = (folder("kernels") / "lanes_encode" / "kernel.cu").read_text(encoding="utf-8")
    old, new = BROKEN[name]
    assert source.count(old) == 1
    (tmp_path / "kernel.cu").write_text(OTHERS.sub("", source.replace(old, new)), encoding="utf-8")
    module = host(tmp_path / "kernel.cu", sanitize=True)  # what it writes astray must not hit this process
    with contextlib.suppress(HostError):  # a report of the sanitizer's is a notice as well
        assert not all(stays_in_its_bytes(module, begin) for begin in (1, 15)) or any(
            fails(module, BY_NAME[case], order)
            for case in ("zero-runs", "tables-bf16", "ragged-129", "eight-warps-and-more")
            for order in ("forward", "reverse")
        )


def fails(module: HostModule, case: Case, order: str) -> bool:
    module.order = order
    try:
        return run(module, case) != []
    except HostError:
        return True


def test_cost_counts_both_ways() -> None:
    case = BY_NAME["weights-bf16"]
    assert 2 * case.numel + case.numel * 10 / 8 < cost(case) < 2 * case.numel + case.numel * 12 / 8
