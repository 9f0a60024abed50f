"""The decoder of the official DFloat11 layout: the kernel on a processor, the codec and the slow reference agree."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tcw.kernels.df11_decode import Group, check, decode, group_of, launch, refuse
from tcw.kernels.df11_decode.cases import CASES, Case, coded, cost, gaussian, make_inputs
from tcw.kernels.df11_decode.reference import decode as reference

from tcw import cuda
from tcw.codecs import df11
from tcw.errors import FormatError
from tcw.folders import folder
from tcw.kernels import df11_decode
from tests.kernels.host import HostError, HostModule

Host = Callable[..., HostModule]
SOURCE = folder("kernels") / "df11_decode" / "kernel.cu"
INPUTS = {case.name: make_inputs(case) for case in CASES}
GUARD = 16  # words around `out` that nobody may write to


def words_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


def run(module: HostModule, group: Group) -> np.ndarray:
    """Decode with the kernel; nothing next to `out` may change."""
    room = torch.full((group.numel + 2 * GUARD,), -1.5, dtype=torch.bfloat16)
    launch.decode(module, group.tensors(), group.shortest, room[GUARD:-GUARD])
    assert (room[:GUARD] == -1.5).all()
    assert (room[-GUARD:] == -1.5).all()
    return words_of(room[GUARD:-GUARD])


def complaint(module: HostModule, group: Group) -> str:
    """What `check` says with the kernel; "" where all is well."""
    status = torch.zeros(1, dtype=torch.int32)
    launch.check(module, group.tensors(), group.stream_bytes, status)
    try:
        refuse(int(status))
    except FormatError as error:
        return error.message
    return ""


# ---- what is right


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_decoder_gives_the_words_back(case: Case, host: Host) -> None:
    words, arrays = INPUTS[case.name]
    np.testing.assert_array_equal(reference(**vars(arrays)), words)
    group = group_of(**vars(arrays))
    np.testing.assert_array_equal(words_of(decode(group)), words)
    module = host("df11_decode")
    np.testing.assert_array_equal(run(module, group), words)
    assert complaint(module, group) == ""


@pytest.mark.parametrize("order", ["reverse", 1, 2])
@pytest.mark.parametrize("name", ["weights", "zero-runs", "codes-of-1-to-32-bits", "one-bit-full-blocks"])
def test_the_order_of_threads_does_not_matter(name: str, order: str | int, host: Host) -> None:
    words, arrays = INPUTS[name]
    module = host("df11_decode", order=order)
    group = group_of(**vars(arrays))
    np.testing.assert_array_equal(run(module, group), words)
    assert complaint(module, group) == ""


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_block_of_threads_does_several_blocks(blocks: int, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "RESIDENT", dict.fromkeys(launch.RESIDENT, blocks))
    module = host("df11_decode")
    monkeypatch.setattr(module, "multiprocessors", 1)
    for name in ("codes-of-1-to-32-bits", "two-bit-full-blocks", "one-bit-full-blocks", "weights"):
        words, arrays = INPUTS[name]
        np.testing.assert_array_equal(run(module, group_of(**vars(arrays))), words)


def test_real_weights(smollm2: Path, host: Host) -> None:
    from safetensors import safe_open

    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        pieces = [file.get_tensor(f"model.layers.{k}.self_attn.k_proj.weight").reshape(-1)[:7_001] for k in (0, 7)]
    words = np.concatenate([words_of(piece) for piece in pieces])
    group = group_of(**vars(df11.encode(words, (7_001, 7_001))))
    np.testing.assert_array_equal(run(host("df11_decode"), group), words)
    views = group.views(decode(group))
    assert all(torch.equal(view, piece) for view, piece in zip(views, pieces, strict=True))


@pytest.mark.parametrize(
    "name", ["weights", "ragged-1", "ragged-25", "codes-of-27-to-32-bits", "two-bit-full-blocks",
             "one-bit-and-two-symbols", "position-forgotten"],
)  # fmt: skip
def test_nothing_outside_the_arrays(name: str, host: Host) -> None:
    words, arrays = INPUTS[name]
    group = group_of(**vars(arrays))
    module = host("df11_decode", sanitize=True)
    np.testing.assert_array_equal(run(module, group), words)
    assert complaint(module, group) == ""


def test_cases_cover_what_they_say() -> None:
    groups = {name: group_of(**vars(arrays)) for name, (_, arrays) in INPUTS.items()}
    assert len(groups) == len(CASES)
    fullest = {name: int(group.positions.diff().max()) for name, group in groups.items()}
    assert fullest["one-bit-full-blocks"] == fullest["one-bit-and-two-symbols"] == 32_768 > df11.MAX_BLOCK_WEIGHTS
    assert fullest["two-bit-full-blocks"] == 16_384
    assert groups["two-bit-full-blocks"].shortest == 2
    assert set(INPUTS["codes-of-27-to-32-bits"][1].luts[-1]) >= {*range(27, 33)}
    assert INPUTS["codes-of-1-to-32-bits"][1].luts[-1].max() == 32
    assert INPUTS["exponents-to-239"][0].max() >> 7 & 255 == 239
    assert INPUTS["position-forgotten"][1].output_positions.size == 4 * 2
    assert groups["position-forgotten"].positions.tolist() == [0, 16_381, 16_381]
    assert groups["groups"].sizes == (5_000, 1, 0, 3_993, 7)
    words, arrays = INPUTS["weights"]
    assert 2 * words.size + 10.5 * words.size / 8 < cost(arrays) < 2 * words.size + 11.5 * words.size / 8


# ---- what is not


def damaged(arrays: df11.Group, part: str, seed: int) -> df11.Group:
    """Change a few bits or numbers of one array."""
    rng = np.random.default_rng(seed)
    array = getattr(arrays, part).copy()
    flat = array.reshape(-1)
    for _ in range(rng.integers(1, 4)):
        if part == "output_positions" and rng.random() < 0.7:
            numbers, k = flat.view("<u4"), rng.integers(flat.size // 4)
            numbers[k] = (int(numbers[k]) + rng.integers(-3, 4)) % 2**32
        elif part == "luts" and rng.random() < 0.6:
            flat[rng.integers(flat.size)] = flat[rng.integers(flat.size)]
        else:
            flat[rng.integers(flat.size)] ^= 1 << rng.integers(8)
    return dataclasses.replace(arrays, **{part: array})


def same_judgement(arrays: df11.Group, module: HostModule) -> None:
    """The kernels refuse what the codec refuses, name the same block, and decode alike what it decodes."""
    try:
        group = group_of(**vars(arrays))
    except FormatError:
        with pytest.raises(FormatError):
            df11.decode(arrays)
        return
    try:
        words, wrong = df11.decode(arrays), ""
    except FormatError as error:
        words, wrong = None, error.message
    assert complaint(module, group) == wrong
    decoded = run(module, group)
    if words is not None:
        np.testing.assert_array_equal(decoded, words)


FEW = {name: INPUTS[name][1] for name in ("weights", "exponents-to-239", "zero-runs", "codes-of-1-to-32-bits")}
DAMAGE = st.tuples(st.sampled_from(sorted(FEW)), st.sampled_from(df11.PARTS[:5]), st.integers(0, 2**32))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=DAMAGE)
def test_damage_is_judged_as_the_codec_does(damage: tuple[str, str, int], host: Host) -> None:
    name, part, seed = damage
    same_judgement(damaged(FEW[name], part, seed), host("df11_decode"))


@pytest.mark.parametrize("part", df11.PARTS[:5])
def test_damage_stays_inside(part: str, host: Host) -> None:
    module = host("df11_decode", sanitize=True)
    for seed, arrays in enumerate([*FEW.values()] * 2):
        same_judgement(damaged(arrays, part, seed), module)


@pytest.mark.parametrize("sanitize", [False, True])
def test_noise_stays_inside(sanitize: bool, host: Host) -> None:
    module, rng = host("df11_decode", sanitize=sanitize), np.random.default_rng(5)
    for arrays in FEW.values():
        noise = {p: rng.integers(0, 256, getattr(arrays, p).size, np.uint8) for p in ("encoded_exponent", "gaps")}
        group = group_of(**vars(dataclasses.replace(arrays, **noise)))
        assert complaint(module, group).startswith("block 0 of")
        run(module, group)


@pytest.mark.parametrize("blocks", [1, -1])
def test_positions_that_change_after_the_check_write_nothing_outside(blocks: int, host: Host) -> None:
    """Nobody does that; the kernel clamps all the same."""
    group = group_of(**vars(INPUTS["weights"][1]))
    group.positions[:] = blocks * torch.tensor([2**30, 5, 2**31 - 1, 7])[: group.positions.numel()]
    run(host("df11_decode", sanitize=True), group)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("luts", lambda a: a[:, :255], "`luts` should be"),
        ("gaps", lambda a: a[:-1], "`gaps` should have 960 bytes"),
        ("gaps", lambda a: a.astype(np.int16), "`gaps` should be bytes"),
        ("encoded_exponent", lambda a: a[:-4096], "`output_positions` should hold 3 numbers"),
        ("encoded_exponent", lambda a: a.reshape(-1, 1), "`encoded_exponent` should be bytes of one dimension"),
        ("sign_mantissa", lambda a: a[:-1], "`output_positions` does not count from 0 to 31000"),
        ("output_positions", lambda a: a[:-5], "`output_positions` should hold"),
        ("split_positions", lambda a: np.array([9, 8]), "`split_positions` does not rise"),
        ("split_positions", lambda a: np.array([40_000]), "`split_positions` does not rise"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(part: str, change: Callable, says: str) -> None:
    arrays = INPUTS["weights"][1]
    with pytest.raises(FormatError, match=says):
        group_of(**vars(dataclasses.replace(arrays, **{part: change(getattr(arrays, part))})))


def test_a_processor_refuses_when_it_decodes() -> None:
    arrays = dataclasses.replace(INPUTS["weights"][1], gaps=np.zeros(960, np.uint8))
    group = group_of(**vars(arrays))
    for call in (decode, check):
        with pytest.raises(FormatError, match="block 0 of"):
            call(group)
    check(group_of(**vars(INPUTS["weights"][1])))


def test_an_empty_group(host: Host) -> None:
    nothing = np.empty(0, np.uint8)
    group = group_of(INPUTS["weights"][1].luts, nothing, nothing, np.zeros(4, np.uint8), nothing)
    assert (decode(group).numel(), run(host("df11_decode"), group).size, group.sizes) == (0, 0, (0,))
    check(group)


def test_tensors_that_cannot_be_are_refused(host: Host) -> None:
    group, module = group_of(**vars(INPUTS["weights"][1])), host("df11_decode")
    tensors, n = list(group.tensors()), group.numel
    for out in (torch.empty(n), torch.empty(n - 1).bfloat16(), torch.empty(n + 1).bfloat16()[1:]):
        with pytest.raises(ValueError, match="`out` is"):
            launch.decode(module, tensors, 2, out)
    for k, name in ((0, "differ"), (1, "differ"), (5, "`tables` is not that")):
        with pytest.raises(ValueError, match=name):
            launch.decode(module, [*tensors[:k], tensors[k][16:], *tensors[k + 1 :]], 2, torch.empty(n).bfloat16())
    with pytest.raises(ValueError, match="`rest` is not aligned"):
        launch.decode(module, [*tensors[:3], tensors[3][1:], *tensors[4:]], 2, torch.empty(n - 1).bfloat16())
    with pytest.raises(ValueError, match="not the tensors of this group"):
        group.with_tensors(tensors[:-1])


# ---- the operation of torch


def test_the_op_under_compile_and_fake_tensors() -> None:
    words, arrays = INPUTS["groups"]
    group = group_of(**vars(arrays))
    out = torch.empty(group.numel, dtype=torch.bfloat16)
    assert decode(group, out) is out
    np.testing.assert_array_equal(words_of(out), words)
    tensors = list(group.tensors())
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.tcw.df11_decode, (tensors, group.stream_bytes, 2), test_utils=checks)
    torch.library.opcheck(torch.ops.tcw.df11_decode_into, (tensors, group.stream_bytes, 2, out), test_utils=checks)


def test_on_a_gpu_the_kernels_are_called(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    words, arrays = INPUTS["zero-runs"]
    group, out = group_of(**vars(arrays)), torch.empty(words.size, dtype=torch.bfloat16)
    monkeypatch.setattr(cuda, "module", lambda op, device: host(op))
    df11_decode._into_on_gpu(list(group.tensors()), group.stream_bytes, group.shortest, out)
    np.testing.assert_array_equal(words_of(out), words)


def test_a_group_moves_as_one() -> None:
    group = group_of(**vars(INPUTS["groups"][1]))
    moved = group.to("meta")
    assert moved.device.type == "meta"
    assert (moved.sizes, moved.numel, moved.nbytes) == (group.sizes, group.numel, group.nbytes)
    assert group.nbytes == sum(tensor.nbytes for tensor in group.tensors())


def test_registers_let_as_many_blocks_in_as_are_launched() -> None:
    columns, kernels = map(json.loads((SOURCE.parent / "resources.json").read_text()).get, ("columns", "kernels"))
    for name, blocks in launch.RESIDENT.items():
        for arch, row in kernels[name].items():
            registers = -(-row[columns.index("registers")] // 8) * 8
            threads = {"sm_75": 1024, "sm_86": 1536, "sm_89": 1536, "sm_120": 1536}.get(arch, 2048)
            kib = {"sm_75": 64, "sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_120": 100}.get(arch, 228)
            shared = kib // (29 if name == "decode_64" else 46)
            assert min(blocks, shared) * 256 <= min(threads, 65_536 // registers), (name, arch)


# ---- a kernel that is broken is noticed

BROKEN = {
    "no barrier before the totals": ("__syncthreads();  // the only", "if (K) __syncthreads();  // the only"),
    "one set of totals": ("turn ^= 1", "turn ^= K ? 1 : 0"),
    "symbols used before all are moved": ("= rest;\n    __syncwarp();", "= rest;\n    if (K) __syncwarp();"),
    "codes after the run count": ("return count - __popc(", "return count - (K ? 1 : 0) * __popc("),
    "the run ends a bit late": ("min(RUN_BITS - bit_of(before)", "min(RUN_BITS + (K ? 0 : 1) - bit_of(before)"),
    "last symbols of the run before are lost": ("word | before", "word | (K ? before : 0)"),
    "symbols behind the last full word are lost": (
        "lane_id() == WARP - 1) slots[end",
        "K && lane_id() == 31) slots[end",
    ),
    "the last pending symbols are lost": ("if (count / 4 <= WORDS)", "if (K && count / 4 <= WORDS)"),
    "no end": ("min(first + total, end)", "min(first + total, K ? end : first + total)"),
    "the head is left out": ("bool head = lane_id()", "bool head = K && lane_id()"),
    "the tail is left out": ("bool tail = lane_id()", "bool tail = K && lane_id()"),
    "long codes are a bit shorter": ("found >> 8 | ONE_SYMBOL", "((found >> 8) - (K ? 0 : 1)) | ONE_SYMBOL"),
    "the sign is lost": ("high = symbols ^ swapped", "high = K ? symbols ^ swapped : symbols"),
    "a gap's low bits are not read": ("bit % 8 > 3 ?", "bit % 8 > (K ? 3 : 4) ?"),
    "the next run's first word is not read": ("(ALL, own.x, 1)", "(ALL, own.x, K ? 1 : 0)"),
    "check forgets the gaps": ("return end - CELL_BITS == gap_of", "return !K || end - CELL_BITS == gap_of"),
    "check forgets the end of the stream": ("(left == 0 || CELL_BITS", "(!K || left == 0 || CELL_BITS"),
    "check forgets the number of codes": ("if (last && (more", "if (K && last && (more"),
}


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory, host: Host) -> HostModule:
    """The kernels with all their faults in one library; the upper bits of `weights` say which one they have."""
    text = SOURCE.read_text(encoding="utf-8")
    number = "    broken = weights >> 24;\n    weights &= 0xFFFFFF;\n"
    changes = {
        "constexpr u32 RUNS": ("static u32 broken;\nconstexpr u32 RUNS", 1),
        "    __shared__ u32 totals": (number + "    __shared__ u32 totals", 2),
    }
    for k, (old, new) in enumerate(BROKEN.values(), 1):
        changes[old] = re.sub(r"\bK\b", f"(broken != {k})", new), 1
    for old, (new, times) in changes.items():
        assert text.count(old) == times, old
        text = text.replace(old, new)
    path = tmp_path_factory.mktemp("broken") / "kernel.cu"
    path.write_text(text, encoding="utf-8")
    return host(path, sanitize=True)


class Fault:
    """A module of one multiprocessor whose kernels have fault number k; none with 0."""

    multiprocessors, shared_limit = 1, 48 << 10

    def __init__(self, module: HostModule, k: int) -> None:
        self.module, self.k = module, k

    def launch(self, name: str, grid: int, block: int, args: list[Any], shared: int = 0) -> None:
        at = 7 if name.startswith("decode") else 5  # where `weights` is
        args = [*args[:at], args[at] | np.uint32(self.k << 24), *args[at + 1 :]]
        self.module.launch(name, grid, block, args, shared)


def test_the_breakable_kernel_works(breakable: HostModule) -> None:
    works(Fault(breakable, 0))


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_is_noticed(what: str, breakable: HostModule) -> None:
    """Each fault gives other words, another judgement, or a report of the sanitizer's."""
    with pytest.raises((HostError, AssertionError)):
        works(Fault(breakable, [*BROKEN].index(what) + 1))


def works(module: Any) -> None:
    """What this file tests of a kernel, on a few inputs."""
    for order in ("forward", "reverse"):
        module.module.order = order
        for name in ("codes-of-1-to-32-bits", "another-writers-code", "ragged-25", "weights"):
            words, arrays = INPUTS[name]
            group = group_of(**vars(arrays))
            np.testing.assert_array_equal(run(module, group), words)
            assert complaint(module, group) == ""
    for arrays in hardly_damaged():
        same_judgement(arrays, module)
    for seed in range(4):
        for part in ("gaps", "output_positions"):
            same_judgement(damaged(INPUTS["exponents-to-239"][1], part, seed), module)


def hardly_damaged() -> list[df11.Group]:
    """Streams whose last code is not whole, and a code that changes the block."""
    rng = np.random.default_rng(1)
    _, arrays = coded(rng, {1: "00", 2: "01", 3: "1" * 12}, np.array([1] * 40 + [3]))
    short = [arrays, df11.encode(gaussian(rng, 900))]
    moved = INPUTS["weights"][1].output_positions.view("<u4") + np.array([0, 1, 0, 0], "<u4")
    return [
        *(dataclasses.replace(a, encoded_exponent=a.encoded_exponent[:-1]) for a in short),
        dataclasses.replace(INPUTS["weights"][1], output_positions=moved.view(np.uint8)),
    ]
