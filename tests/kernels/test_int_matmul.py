"""Every way to multiply with packed integers gives what the slow one gives, on every case."""

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
from tcw.kernels.int_matmul import Weight, int_matmul, layout_of, repack, turned
from tcw.kernels.int_matmul.cases import CASES, SUMS, UNIT, Case, Inputs, cost, make_inputs
from tcw.kernels.int_matmul.reference import Expected, matmul, weights

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {case.name: case for case in CASES}
pytest.importorskip("triton", reason="triton has no wheel for this platform")


def weight_of(inputs: Inputs) -> Weight:
    layout = layout_of(inputs.bits, inputs.x.shape[1], inputs.group_size)
    zero = None if inputs.zero is None else turned(inputs.zero)
    return Weight(repack(inputs.codes, layout), turned(inputs.scale), zero, layout, inputs.grid)


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
from tcw.kernels.int_matmul import check, launch
from tcw.kernels.int_matmul.cases import CASES
torch.use_deterministic_algorithms(True)
found = {case.name: check.error_of(case, "cpu") for case in CASES}
case, right = next(c for c in CASES if c.name == "w4-gemv-3-bias"), launch.plan
launch.plan = lambda *a: right(*a).__class__(**{**vars(right(*a)), "tiles": right(*a).tiles - 1})
wrong = {"a tile is left out": check.error_of(case, "cpu")}
launch.plan = right
check.turned = lambda values: values.T.roll(1, 0).contiguous()
wrong["scales are those of a neighbour"] = check.error_of(case, "cpu")
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
    assert min(interpreted["wrong"].values()) > 100


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_operation_in_plain_torch_is_right(case: Case) -> None:
    inputs = make_inputs(case)
    expected = matmul(inputs)
    y = int_matmul(inputs.x, weight_of(inputs), inputs.bias)
    assert y.dtype == inputs.x.dtype
    # the sums of the processor's matrix product in float16 are its own business: one more rounding each
    limit = UNIT[case.dtype] * (expected.y.abs() + 2 * expected.size) + SUMS * expected.span + 1e-30
    assert bool(((y.double() - expected.y).abs() <= limit).all())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_weights_are_the_stored_ones_to_the_last_bit(case: Case) -> None:
    inputs = make_inputs(case)
    exact = weights(inputs)
    found = weight_of(inputs).dequantize().T.numpy()
    assert found.dtype == np.float32
    if inputs.grid == "float":  # two roundings
        np.testing.assert_allclose(found, exact, rtol=0, atol=2.0**-22 * np.abs(exact).max())
    else:
        np.testing.assert_array_equal(found, exact.astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(1, 5), columns=st.integers(1, 300),
    group=st.sampled_from([0, 8, 16, 24, 40, 64, 128]), seed=st.integers(0, 99),
)  # fmt: skip
def test_repacking_moves_every_code_and_loses_none(bits: int, rows: int, columns: int, group: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns))
    stored = torch.from_numpy(stored_as(codes, bits))
    layout = layout_of(bits, columns, group)
    words = repack(stored, layout)
    assert words.shape == (layout.rows, rows)
    assert words.is_contiguous()
    ones = torch.ones(layout.groups, rows)
    found = Weight(words, ones, None, layout, "symmetric").codes()
    np.testing.assert_array_equal(found.T.numpy(), codes)


def stored_as(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes packed along rows, from the words of the format's description."""
    words = -(-codes.shape[1] * bits // 32)
    rows = [sum(int(q) << (i * bits) for i, q in enumerate(row)).to_bytes(4 * words, "little") for row in codes]
    return np.frombuffer(b"".join(rows), np.int32).reshape(len(codes), words).copy()


def test_a_large_tensor_is_repacked_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    from tcw.kernels.int_matmul import layout as module

    inputs = make_inputs(Case("slabs", 3, 1, 50, 70, 16))
    whole = repack(inputs.codes, layout_of(3, 70, 16))
    monkeypatch.setattr(module, "_SLAB", 71)
    assert torch.equal(repack(inputs.codes, layout_of(3, 70, 16)), whole)


def test_sizes_that_do_not_fit_are_refused() -> None:
    inputs = make_inputs(Case("any", 4, 1, 5, 100, 32, "zero"))
    layout, weight = layout_of(4, 100, 32), weight_of(inputs)
    for codes in (inputs.codes[:, :-1], inputs.codes.long()):
        with pytest.raises(ValueError, match="codes are"):
            repack(codes, layout)
    for bits, columns, group in ((5, 100, 32), (4, 0, 32), (4, 100, -8)):
        with pytest.raises(ValueError, match="no layout"):
            layout_of(bits, columns, group)
    with pytest.raises(ValueError, match="do not fit"):
        replace(weight, scale=weight.scale[:-1])
    for grid, zero in (("zero", None), ("symmetric", weight.zero)):
        with pytest.raises(ValueError, match="zero"):
            replace(weight, grid=grid, zero=zero)


def test_a_product_has_as_many_axes_as_its_input() -> None:
    inputs = make_inputs(Case("axes", 4, 6, 9, 64, 32, "zero", "F32", True))
    weight = weight_of(inputs)
    flat = int_matmul(inputs.x, weight, inputs.bias)
    torch.testing.assert_close(int_matmul(inputs.x.view(2, 3, 64), weight, inputs.bias), flat.view(2, 3, 9))
    assert int_matmul(inputs.x[:0], weight).shape == (0, 9)
    torch.testing.assert_close(int_matmul(inputs.x[0], weight, inputs.bias), flat[0])


def test_the_operation_is_known_to_torch_compile() -> None:
    inputs = make_inputs(Case("compiled", 2, 3, 9, 64, 32, "zero", "F32", True))
    weight = weight_of(inputs)
    arguments = (inputs.x, weight.words, weight.scale, weight.zero, inputs.bias, 2, 32, "zero")
    torch.library.opcheck(torch.ops.tcw.int_matmul.default, arguments, test_utils=("test_schema", "test_faketensor"))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return int_matmul(x * 2, weight, inputs.bias) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs.x), layer(inputs.x))


AHEAD = """
import json, warnings, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tcw.kernels.int_matmul import kernel, launch

TYPES = {"x_ptr": "*bf16", "words_ptr": "*i32", "scale_ptr": "*bf16", "zero_ptr": "*u8", "bias_ptr": "*bf16"}
sizes = {"BITS": 2, "GRID": "zero", "HAS_BIAS": False, "BLOCK_M": 1, "BLOCK_W": 4, "BLOCK_N": 256}
wide = {**sizes, "BLOCK_M": 64, "BITS": 4, "BLOCK_W": 8, "BLOCK_N": 128, "HAS_BIAS": True, "WIDE": False}
plain = {"BITS": 3, "GRID": "float", "BLOCK_W": 4, "BLOCK_N": 128}
found = {}
every = (
    ("gemv", sizes, "*fp32", 4), ("gemm", wide, "*bf16", 8), ("gemv", {**sizes, "BITS": 3, "BLOCK_M": 4}, "*fp32", 4),
    ("gemm", {**wide, "BITS": 3, "BLOCK_M": 16, "BLOCK_W": 4}, "*fp32", 4),
    ("dequantize", plain, "*bf16", 4), ("reduce", {"HAS_BIAS": True, "BLOCK": 512}, "*fp16", 4),
)
for capability, which in ((80, every[:2]), (90, every)):
    for name, constants, out, warps in which:
        function = getattr(kernel, name)
        types = {**TYPES, "out_ptr": out, "partial_ptr": "*fp32"}
        if constants.get("GRID") == "float":
            types["zero_ptr"] = "*bf16"
        names = function.arg_names
        source = ASTSource(
            fn=function,
            signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n.endswith("_ptr") or n == "N"},
        )
        options = {"num_warps": warps, "enable_fp_fusion": True}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        ptx = made.asm["ptx"]
        key = f"{name}{constants.get('BITS', '')}-{capability}"
        loop = made.asm["ttgir"].split("scf.for")[-1].split("scf.yield")[0]
        found[key] = {
            "cubin": len(made.asm["cubin"]), "shared": made.metadata.shared, "moved": loop.count("convert_layout"),
            "tensor_cores": ptx.count("mma"), "wide_loads": ptx.count("ld.global.v4"),
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
    assert len(ahead) == 8
    assert all(facts["cubin"] > 1000 for facts in ahead.values())
    assert all(facts["shared"] <= 100 << 10 for facts in ahead.values())
    assert {key.partition("-")[0] for key, facts in ahead.items() if facts["tensor_cores"]} == {"gemm3", "gemm4"}


def test_the_inner_loop_of_a_product_with_a_vector_moves_nothing_between_threads(ahead: Any) -> None:
    for key in ("gemv2-80", "gemv2-90", "gemv3-90"):
        assert ahead[key]["moved"] == 0
        assert ahead[key]["wide_loads"] >= 1  # 16 bytes of words at a time


def test_cost_counts_what_must_move() -> None:
    moved, operations = cost(Case("cost", 4, 2, 128, 256, 64, "zero"))
    assert operations == 2 * 2 * 128 * 256
    assert moved == 128 * 256 // 2 + 128 * 4 * 3 + 2 * 256 * 2 + 2 * 128 * 2


def test_the_reference_agrees_with_itself_by_hand() -> None:
    """w = (q - z) s with q = 3, 0, 1 of two bits, z = 1, s = 2: w = 4, -2, 0."""
    codes = torch.tensor([[0b01_00_11]], dtype=torch.int32)
    one = torch.ones(1, 1)
    inputs = Inputs(torch.tensor([[1.0, 10.0, 100.0]]), codes, 2 * one, one.byte(), None, 2, 0, "zero")
    found: Expected = matmul(inputs)
    assert weights(inputs).tolist() == [[4.0, -2.0, 0.0]]
    assert (found.y.item(), found.size.item()) == (-16.0, 24.0)


@pytest.mark.gpu
def test_the_kernel_is_right_on_a_gpu() -> None:
    found = run("from tcw.kernels.int_matmul.check import main; main()")
    assert {name: error for name, error in found.items() if error > 1.0} == {}


@pytest.mark.gpu
def test_a_graph_holds_the_operation() -> None:
    inputs = make_inputs(Case("graph", 4, 1, 300, 512, 64, "zero", "BF16", True))
    weight = weight_of(inputs)
    weight = Weight(
        weight.words.cuda(), weight.scale.cuda(), None if weight.zero is None else weight.zero.cuda(), weight.layout,
        weight.grid,
    )  # fmt: skip
    x, bias = inputs.x.cuda(), inputs.bias
    assert bias is not None
    bias = bias.cuda()
    expected = int_matmul(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = int_matmul(x, weight, bias)
    graph.replay()
    assert torch.equal(y, expected)
