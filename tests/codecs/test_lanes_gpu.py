"""Encoding on a GPU from the command line down: the GPU here is the processor, which runs the kernels' own source."""

import hashlib
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcw import cli, cuda, device, methods, pipeline, recipe
from tcw.calibration import Settings
from tcw.codecs import lanes, lanes_gpu
from tcw.errors import UsageError
from tcw.source import open_source
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import WeightMethod
from tcw.weights.dfloat11 import DFloat11
from tests.kernels.host import HostModule, compiler

WORDS = (np.random.default_rng(0).normal(0, 0.02, 10_000).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
Use = Callable[..., list[str]]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """use(module) -> names of the kernels as they are launched; from then on `module` is what tcw.cuda.module gives."""
    here = device.Device("a GPU", "cuda:0", "cuda", 1 << 30, 1 << 30, "found", 1)
    monkeypatch.setattr(device, "available", lambda: ["cuda:0", "cpu"])
    monkeypatch.setattr(device, "_cuda", lambda name, reason: here)
    monkeypatch.setattr(lanes_gpu, "_driver_is_here", lambda: True)
    lanes_gpu._said.clear()

    def use(module: Any) -> list[str]:
        launched: list[str] = []

        def open_module(op: str, where: torch.device) -> Any:
            assert (op, where) == ("lanes_encode", torch.device("cuda:0"))
            if isinstance(module, Exception):
                raise module
            return Watched(module, launched)

        monkeypatch.setattr(cuda, "module", open_module)
        return launched

    return use


class Watched:
    """A module that says what it launches, on a device that torch has here."""

    device = torch.device("cpu")
    multiprocessors = 2

    def __init__(self, module: Any, launched: list[str]) -> None:
        self.module, self.launched = module, launched

    def launch(self, name: str, *arguments: Any, **options: Any) -> None:
        self.launched.append(name)
        self.module.launch(name, *arguments, **options)


class OutOfMemory:
    """Says another number each time, as torch does."""

    times = itertools.count(1)

    def launch(self, name: str, *arguments: Any, **options: Any) -> None:
        if name.startswith("write"):
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {next(self.times)} GiB. GPU 0 has")


@pytest.fixture
def module() -> HostModule:
    if compiler() is None:
        pytest.skip("no C++ compiler: kernels cannot be run on the processor")
    return HostModule("lanes_encode")


def same(found: lanes.Stream, expected: lanes.Stream) -> bool:
    assert found.params == expected.params
    assert set(found.parts) == set(expected.parts)
    assert all(found.parts[k].dtype == part.dtype for k, part in expected.parts.items())
    return all(np.array_equal(found.parts[k], part) for k, part in expected.parts.items())


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_the_kernels_are_used_and_make_the_same_stream(use: Use, module: HostModule) -> None:
    launched = use(module)
    assert same(lanes_gpu.encode(WORDS, "bf16", "cuda:0"), lanes.encode(WORDS, "bf16"))
    assert launched == ["count_bf16", "measure_bf16", "write_bf16"]
    frozen = WORDS.copy()
    frozen.flags.writeable = False
    assert same(lanes_gpu.encode(frozen, "bf16", "cuda:0"), lanes.encode(WORDS, "bf16"))


def test_on_the_processor_no_kernel_is_asked_for(use: Use) -> None:
    use(AssertionError("asked for"))
    assert same(lanes_gpu.encode(WORDS, "bf16", "cpu"), lanes.encode(WORDS, "bf16"))


@pytest.mark.parametrize("asked", ["cuda", "auto"])
def test_compress_writes_the_same_artifact(
    use: Use, module: HostModule, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, asked: str
) -> None:
    launched = use(module)
    for name in ("cpu", asked):
        line = ["compress", tiny_llama, "--recipe", "lossless", "--device", name, "-o", tmp_path / name, "--quiet"]
        assert cli.execute([str(word) for word in line]) == 0
        assert bool(launched) == (name != "cpu")
    assert contents(tmp_path / asked) == contents(tmp_path / "cpu")
    assert len(launched) >= 3 * 14
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (cuda.NoGpu("the driver is too old", "install a newer one"), "the driver is too old"),
        (OutOfMemory(), "CUDA out of memory"),
        (ImportError("no module named cuda"), "no module named cuda"),
    ],
    ids=["NoGpu", "OutOfMemoryError", "ImportError"],
)
def test_a_gpu_that_fails_is_said_once_and_the_artifact_is_right(
    use: Use, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: Any, said: str
) -> None:
    use(broken)
    source = open_source(tiny_llama)
    for name in ("cpu", "cuda"):
        pipeline.compress(source, recipe.load("lossless"), tmp_path / name, calibration=Settings(device=name))
    assert contents(tmp_path / "cuda") == contents(tmp_path / "cpu")
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"`cuda:0` cannot encode, the processor does: {said}"
    ]


def test_what_cannot_be_coded_is_no_failure(
    use: Use, module: HostModule, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(module)
    with pytest.raises(lanes.NotCodable):
        lanes_gpu.encode(np.arange(5000, dtype=np.uint16), "u16", "cuda:0")
    monkeypatch.setattr("tcw.codecs.lanes_words.MAX_CODES", 10)
    tensor = TensorData(TensorInfo("w", "BF16", (100, 100)), WORDS.view(np.uint8))
    assert DFloat11().encode_on("cuda:0", tensor) is None
    assert not caplog.records


def test_what_does_not_pay_stays_raw(use: Use, module: HostModule) -> None:
    launched = use(module)
    noise = np.random.default_rng(0).integers(0, 1 << 16, 10_000, dtype=np.uint16)
    assert DFloat11().encode_on("cuda:0", TensorData(TensorInfo("w", "BF16", (100, 100)), noise.view(np.uint8))) is None
    assert "write_bf16" in launched


@pytest.mark.parametrize("asked", ["cpu", "CPU", "mps", "cuda", "cuda:0", "auto"])
def test_where_tensors_are_encoded(use: Use, asked: str) -> None:
    assert lanes_gpu.place(asked) == ("cuda:0" if asked in ("cuda", "cuda:0", "auto") else "cpu")


def test_a_gpu_that_is_not_here_is_an_error(use: Use, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cuda:3"):
        pipeline.compress(
            open_source(tiny_llama), recipe.load("lossless"), tmp_path / "out", calibration=Settings(device="cuda:3")
        )
    assert not list(tmp_path.iterdir())


def test_without_a_driver_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(lanes_gpu.ctypes, "CDLL", missing)
    monkeypatch.setattr(device, "available", lambda: pytest.fail("torch was asked"))
    assert lanes_gpu.place("auto") == "cpu"


def test_a_recipe_that_uses_no_gpu_does_not_look_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_gpu, "place", lambda asked: asked)
    steps = {name: recipe.from_specs([name]).steps for name in ("dfloat11", "int4")}
    assert pipeline._encoding_device(steps["int4"], Settings(device="cuda")) == "cpu"
    assert pipeline._encoding_device(steps["dfloat11"], Settings(device="cuda")) == "cuda"


@pytest.mark.parametrize("name", methods.names("weights"))
def test_every_method_can_be_asked_to_encode_on_a_device(name: str) -> None:
    method = methods.build(name, {})
    assert isinstance(method, WeightMethod)
    tensor = TensorData(TensorInfo("model.layers.0.mlp.up_proj.weight", "BF16", (100, 100)), WORDS.view(np.uint8))
    where = "cpu" if method.encodes_on_gpu() else "cuda:0"  # of which it takes no notice
    found, expected = method.encode_on(where, tensor), method.encode(tensor)
    assert found is not None
    assert expected is not None
    assert found.params == expected.params
    assert all(np.array_equal(part, found.parts[key]) for key, part in expected.parts.items())
