"""Attention over packed keys and values gives what the slow one gives, on every case, each way it is computed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tcw.kernels.kv_dequant_attention import Packed, kv_dequant_attention
from tcw.kernels.kv_dequant_attention.cases import CASES, UNIT, Case, Inputs, make_inputs, on
from tcw.kernels.kv_dequant_attention.reference import attend, compare, unpack

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {case.name: case for case in CASES}
pytest.importorskip("triton", reason="triton has no wheel for this platform")


def run(code: str, **env: str) -> Any:
    """Run Python in a process of its own: Triton asks its environment when it is imported, and only then."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**kept, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


INTERPRETED = """
import json, torch
from dataclasses import replace
from tcw.kernels.kv_dequant_attention import check, launch
from tcw.kernels.kv_dequant_attention.cases import CASES
torch.use_deterministic_algorithms(True)
found = {case.name: check.error_of(case, "cpu") for case in CASES}
by_name = {case.name: case for case in CASES}
wrong, right = {}, launch.plan
launch.plan = lambda *a: replace(right(*a), tokens=right(*a).tokens - right(*a).block_n, splits=1)
wrong["a tile is left out"] = check.error_of(by_name["two-splits"], "cpu")
launch.plan = right
there = launch.attend
def broken(queries, keys, values, *rest):
    return there(queries, keys, replace(values, step=values.step.roll(1, 3)), *rest)
launch.attend = broken
wrong["steps are those of a neighbour"] = check.error_of(by_name["w4-token-r3-n70"], "cpu")
wrong["steps are those of a neighbour, in bf16"] = check.error_of(by_name["one-token-bf16"], "cpu")
launch.attend = lambda *a: there(*a[:4], None, *a[5:])
wrong["padding is seen"] = check.error_of(by_name["padding"], "cpu")
launch.attend, merged = there, launch.merged
launch.merged = lambda parts, lses: (parts.mean(0), lses.logsumexp(0))
wrong["parts are not weighted"] = check.error_of(by_name["many-splits"], "cpu")
print(json.dumps({"found": found, "wrong": wrong}))
"""


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Errors of the kernels in Triton's interpreter, as shares of what is allowed: as they are, and broken."""
    return dict(run(INTERPRETED, TRITON_INTERPRET="1"))


@pytest.mark.parametrize("name", BY_NAME)
def test_the_kernel_is_right_on_the_processor(interpreted: dict[str, dict[str, float]], name: str) -> None:
    assert interpreted["found"][name] <= 1.0


def test_a_wrong_kernel_is_noticed(interpreted: dict[str, dict[str, float]]) -> None:
    assert len(interpreted["wrong"]) == 5
    assert {name: error for name, error in interpreted["wrong"].items() if error < 3} == {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_operation_in_plain_torch_is_right(case: Case) -> None:
    inputs = make_inputs(case)
    out, lse = kv_dequant_attention(**vars(inputs))
    assert compare(out, lse, attend(inputs), UNIT[case.dtype]) <= 1.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_unpacking_in_plain_torch_is_right(case: Case) -> None:
    inputs = make_inputs(case)
    for packed in (inputs.keys, inputs.values):
        found, (exact, span) = packed.dequantize(), unpack(packed)
        assert found.dtype == torch.float32
        assert found.shape == exact.shape
        assert bool((np.abs(found.numpy() - exact) <= 2.0**-22 * span).all())


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 3, 4, 8]), n=st.integers(0, 40), width=st.integers(1, 40),
    tokens=st.sampled_from([1, 4, 16, 100]), channels=st.sampled_from([1, 2, 32, 50]), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_number_has_its_code_and_its_step(
    bits: int, n: int, width: int, tokens: int, channels: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (2, 3, n, width))
    minimum, step = random.normal(size=(2, 2, 3, -(-n // tokens), -(-width // channels))).astype(np.float32)
    packed = Packed(
        torch.from_numpy(stored_as(codes, bits)), torch.from_numpy(minimum), torch.from_numpy(step),
        bits, width, tokens, channels,
    )  # fmt: skip
    np.testing.assert_array_equal(packed.unpack().numpy(), codes)
    t, d = np.arange(n)[:, None] // tokens, np.arange(width) // channels
    np.testing.assert_array_equal(
        packed.dequantize().numpy(), minimum[:, :, t, d] + step[:, :, t, d] * np.float32(codes)
    )


def stored_as(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [B, G, n, width] packed along rows, from the words of the layout's description."""
    size = -(-codes.shape[-1] * bits // 8)
    rows = [
        sum(int(q) << (i * bits) for i, q in enumerate(row)).to_bytes(size, "little")
        for row in codes.reshape(-1, codes.shape[-1])
    ]
    return np.frombuffer(b"".join(rows), np.uint8).reshape(*codes.shape[:-1], size).copy()


def test_the_reference_agrees_with_itself_by_hand() -> None:
    """Keys 1 and 3 of two bits, values 0 and 4; the logits differ by ln 3: weights 1/4 and 3/4."""
    one = torch.ones(1, 1, 1, 1)
    keys = Packed(torch.tensor([[[[0b00], [0b10]]]], dtype=torch.uint8), one, one, 2, 1, 2, 1)
    values = Packed(torch.tensor([[[[0b00], [0b10]]]], dtype=torch.uint8), 0 * one, 2 * one, 2, 1, 2, 1)
    scaling = float(np.log(3) / 2)
    found = attend(Inputs(one.double(), keys, values, scaling))
    assert found.out.item() == pytest.approx(3.0)
    assert found.lse.item() == pytest.approx(np.log(np.exp(scaling) + np.exp(3 * scaling)))


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("bits", 5), ("bits", 2), ("width", 60), ("tokens", 24), ("tokens", 16), ("channels", 24), ("channels", 2),
        ("codes", torch.zeros(2, 2, 33, 16, dtype=torch.int32)), ("codes", torch.zeros(2, 2, 33, 17).byte()),
        ("step", torch.ones(2, 2, 2, 63, dtype=torch.float16)), ("step", torch.ones(2, 2, 2, 64)),
        ("minimum", torch.ones(2, 1, 2, 64, dtype=torch.float16)), ("blocks", torch.zeros(3, 1, 33, dtype=torch.int32)),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused(field: str, wrong: Any) -> None:
    keys = make_inputs(BY_NAME["w4-kivi-r1-n33"]).keys
    with pytest.raises(ValueError, match=r"codes of|minima|power of two|blocks"):
        replace(keys, **{field: wrong})


def test_calls_that_do_not_fit_are_refused() -> None:
    inputs = make_inputs(BY_NAME["bias"])
    other = make_inputs(replace(BY_NAME["bias"], n=80))
    assert inputs.bias is not None
    for change, said in (
        ({"queries": inputs.queries[..., :32]}, "do not fit"), ({"values": other.values}, "do not fit"),
        ({"queries": inputs.queries[:, :3]}, "do not fit"), ({"bias": inputs.bias[..., :80]}, "bias"),
        ({"queries": inputs.queries.repeat(1, 1, 20, 1)}, "more than 32"),
        ({"real": torch.ones(1, 1, 90)}, "not bool"), ({"real": torch.ones(1, 3, 90, dtype=torch.bool)}, "not bool"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            kv_dequant_attention(**{**vars(inputs), **change})


def test_shapes_are_known_without_computing() -> None:
    inputs = make_inputs(BY_NAME["keys-2-values-8-narrow"])
    there = on(inputs, "meta")
    out, lse = kv_dequant_attention(there.queries.half(), there.keys, there.values, 0.1)
    assert (out.shape, lse.shape) == ((1, 2, 1, 32), (1, 2, 1))
    assert out.dtype == lse.dtype == torch.float32
    flat = [[p.codes, p.minimum, p.step] for p in (inputs.keys, inputs.values)]
    layouts = [[p.bits, p.width, p.tokens, p.channels, 0, 0] for p in (inputs.keys, inputs.values)]
    arguments = (inputs.queries, flat[0], layouts[0], flat[1], layouts[1], 0.1, None, None)
    torch.library.opcheck(torch.ops.tcw.kv_dequant_attention.default, arguments)


AHEAD = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tcw.kernels.kv_dequant_attention import kernel

POINTERS = {"codes": "*u8", "minimum": "*bf16", "step": "*bf16", "real": "*u8", "q": "*bf16"}
def side(name, bits, tokens, channels, width=128):
    return {f"{name}_BITS": bits, f"{name}_WIDTH": width, f"{name}_TOKENS": tokens, f"{name}_CHANNELS": channels,
            f"{name}_SCALED": False, f"BLOCK_{name}": width}
plain = {"HAS_REAL": False, "HAS_BIAS": False, "BLOCK_R": 16, "BLOCK_N": 64, "WIDE": False}
kivi = {name: {**plain, **side("K", bits, 32, 1), **side("V", bits, 1, 32)} for name, bits in
        (("kivi2", 2), ("kivi4", 4), ("kivi8", 8), ("kivi3", 3))}
whole = {**plain, **side("K", 4, 1 << 30, 1), **side("V", 2, 1, 128), "K_SCALED": True, "V_SCALED": True}
wide = {**kivi["kivi4"], "HAS_REAL": True, "HAS_BIAS": True, "BLOCK_R": 32}
small = {**plain, "BLOCK_N": 32, **side("K", 4, 32, 1, 64), **side("V", 4, 1, 32, 64)}
merge = {"WIDTH": 128, "BLOCK": 128}
every = [("attend", name, sizes, "*bf16", 4) for name, sizes in (*kivi.items(), ("whole", whole))]
every += [("attend", "blocks", {**kivi["kivi4"], "K_TOKENS": 0, "BLOCK_N": 32}, "*bf16", 4)]
every += [("attend", "wide", wide, "*fp16", 8), ("attend", "f32", small, "*fp32", 4), ("merge", "merge", merge, "", 4)]
found = {}
for capability, which in ((80, [one for one in every if one[1] in ("kivi2", "kivi4", "f32", "merge")]), (90, every)):
    for function, name, constants, query, warps in which:
        function = getattr(kernel, function)
        names = function.arg_names
        def type_of(n):
            if n in constants: return "constexpr"
            if n == "q_ptr": return query
            if n == "scaling": return "fp32"
            if n in ("k_blocks_ptr", "v_blocks_ptr"): return "*i16"
            if not n.endswith("_ptr"): return "i32"
            return POINTERS.get(n[2:-4], POINTERS.get(n[:-4], "*fp32"))
        source = ASTSource(
            fn=function, signature={n: type_of(n) for n in names},
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr")},
        )
        options = {"num_warps": warps, "enable_fp_fusion": True}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx = made.asm["ptx"]
        loop = made.asm["ttgir"].split("scf.for")[-1].split("scf.yield")[0]
        found[f"{name}-{capability}"] = {
            "cubin": len(made.asm["cubin"]), "shared": made.metadata.shared, "moved": loop.count("convert_layout"),
            "tensor_cores": ptx.count("mma"), "ahead": ptx.count("cp.async"), "loads": ptx.count("ld.global"),
        }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What Triton compiles for GPUs that are not here: facts about each kernel's machine code."""
    import triton

    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this triton brings no assembler for NVIDIA GPUs")
    return dict(run(AHEAD, TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))))


def test_the_kernel_compiles_for_gpus(ahead: dict[str, dict[str, int]]) -> None:
    assert len(ahead) == 13
    assert all(facts["cubin"] > 1000 for facts in ahead.values())
    assert all(facts["shared"] <= 100 << 10 for facts in ahead.values())
    assert {key.partition("-")[0] for key, facts in ahead.items() if not facts["tensor_cores"]} == {"merge"}


def test_codes_are_fetched_ahead_of_their_use(ahead: dict[str, dict[str, int]]) -> None:
    for key in ("kivi2-80", "kivi4-80", "kivi2-90", "kivi4-90"):
        assert ahead[key]["ahead"] > 0  # while one tile is multiplied the next is on its way
        assert ahead[key]["moved"] == 0  # what shares a step lies in the thread that has the step
        assert ahead[key]["loads"] <= 2  # the queries: nothing in the loop waits for memory


@pytest.mark.gpu
def test_the_kernel_is_right_on_a_gpu() -> None:
    found = run("from tcw.kernels.kv_dequant_attention.check import main; main()")
    assert {name: error for name, error in found.items() if error > 1.0} == {}


@pytest.mark.gpu
def test_a_graph_holds_the_operation() -> None:
    inputs = on(make_inputs(BY_NAME["many-splits"]), "cuda")
    expected = kv_dequant_attention(**vars(inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = kv_dequant_attention(**vars(inputs))
    graph.replay()
    assert all(map(torch.equal, found, expected))
