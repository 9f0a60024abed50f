"""Coded tensors decoded on the device that a model goes to; a processor stands in for the GPU."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import tcw
from tcw import export
from tcw.artifact import Artifact
from tcw.cuda import NoGpu
from tcw.errors import FormatError
from tcw.pipeline import compress
from tcw.recipe import from_specs
from tcw.runtime import on_device, residency
from tcw.runtime.on_device import DeviceReader
from tcw.runtime.packed import to_torch
from tcw.runtime.state import lazy_state_dict
from tcw.source import Source, open_source
from tcw.weights import Encoded

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def artifact(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("on-device") / "lossless"
    compress(open_source(tiny_llama), from_specs(["dfloat11"]), folder)
    return Artifact.open(folder)


@pytest.fixture(scope="module")
def official(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("on-device") / "df11"
    export.export(open_source(tiny_llama), "dfloat11", folder)
    return open_source(folder)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("name", ["artifact", "official"])
def test_what_is_coded_comes_as_the_source_reads_it(name: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(name)
    reader = DeviceReader(source, CPU)
    found = {tensor: reader.read(tensor) for tensor in source.tensors()}
    coded = {tensor: values for tensor, values in found.items() if values is not None}
    assert len(coded) >= 14
    assert set(found) - set(coded) >= {"model.norm.weight"}
    assert all(same(values, to_torch(source.read(tensor))) for tensor, values in coded.items())


def test_a_model_is_loaded_through_it(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def watched(self: DeviceReader, name: str, right: Any = DeviceReader.read) -> torch.Tensor | None:
        read.append(name)
        return right(self, name)

    plain = tcw.load(artifact, device="cpu", residency="bf16")
    monkeypatch.setattr(DeviceReader, "read", watched)
    monkeypatch.setattr(residency, "KERNELS", {"cuda", "cpu"})
    loaded = tcw.load(artifact, device="cpu", residency="bf16")
    assert set(read) == set(artifact.tensors())
    for (name, a), b in zip(plain.named_parameters(), loaded.parameters(), strict=True):
        assert same(a.data, b.data), name


def test_without_kernels_the_processor_decodes_and_that_is_said_once(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_kernels(group: object) -> None:
        raise NoGpu("`cuda-core` is not installed", "pip install 'tcw[gpu]'")

    monkeypatch.setattr(on_device, "decode_checked", no_kernels)
    with caplog.at_level(logging.WARNING, "tcw"):
        tensors = {name: lazy[...] for name, lazy in lazy_state_dict(artifact, gpu=CPU).items()}
    assert all(torch.equal(values, to_torch(artifact.read(name))) for name, values in tensors.items())
    assert [record.message for record in caplog.records] == [
        "weights are decoded on the processor: `cuda-core` is not installed; pip install 'tcw[gpu]'"
    ]


def test_codes_that_end_elsewhere_are_refused(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    name, right = "model.layers.0.mlp.up_proj.weight", artifact.encoded

    def damaged(name: str) -> Any:
        encoded = right(name)
        encoded.parts["codes"] = encoded.parts["codes"].copy()
        encoded.parts["codes"][50:90] ^= 0x5A
        return encoded

    monkeypatch.setattr(artifact, "encoded", damaged)
    with pytest.raises(FormatError, match=r"up_proj.*does not end with its last code"):
        DeviceReader(artifact, CPU).read(name)


@pytest.mark.parametrize(("key", "value", "match"), [("split", "f16", "is BF16"), ("codec", "zip", "codec `zip`")])
def test_a_stream_of_something_else_is_refused(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, key: str, value: str, match: str
) -> None:
    name, right = "model.layers.0.mlp.up_proj.weight", artifact.encoded
    monkeypatch.setattr(artifact, "encoded", lambda n: Encoded(right(n).parts, {**right(n).params, key: value}))
    with pytest.raises(FormatError, match=rf"up_proj.*{match}"):
        DeviceReader(artifact, CPU).read(name)
