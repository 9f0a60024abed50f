"""Official folders read group by group give what the source gives tensor by tensor."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tcw.kernels.df11_decode import folder
from tcw.kernels.df11_decode.folder import FolderDecoder
from tcw.kernels.df11_decode.group import group_of

from tcw import export
from tcw.errors import FormatError, SourceError
from tcw.kernels import df11_decode
from tcw.source import open_source


@pytest.fixture(scope="module")
def coded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("df11") / "tiny-df11"
    export.export(open_source(tiny_llama), "dfloat11:files=one", path)
    return path


def test_each_tensor_comes_out_and_each_group_is_decoded_once(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, groups = open_source(coded), []
    monkeypatch.setattr(folder, "decode", lambda group: groups.append(group) or df11_decode.decode(group))
    decoder = FolderDecoder(source, "cpu")
    with ThreadPoolExecutor(4) as pool:
        tensors = dict(zip(source.coded, pool.map(decoder.read, source.coded), strict=True))
    assert len(groups) == len({matrix.group for matrix in source.coded.values()}) < len(source.coded)
    assert not decoder._decoded
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) == source.coded[name].info.shape
        np.testing.assert_array_equal(tensor.view(torch.int16).numpy().view(np.uint16).ravel(), source.read(name).words)
    assert torch.equal(decoder.read(name), tensors[name])  # once more: it is decoded again


def test_matrices_of_a_group_are_its_views(coded: Path) -> None:
    source = open_source(coded)
    matrix = source.coded["model.layers.0.mlp.down_proj.weight"]
    group = group_of(**source.arrays(matrix.group))
    members = [m for m in source.coded.values() if m.group == matrix.group]
    assert group.sizes == tuple(m.last - m.first for m in members)


def test_a_device_that_is_no_processor_checks_first(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, seen = open_source(coded), []
    monkeypatch.setattr(folder, "check", lambda group: seen.append("check"))
    monkeypatch.setattr(folder, "decode", lambda group: seen.append("decode") or torch.empty(group.numel))
    FolderDecoder(source, "meta").read(next(iter(source.coded)))
    assert seen == ["check", "decode"]


def test_what_is_not_coded_and_what_is_damaged(coded: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not a coded tensor"):
        FolderDecoder(open_source(coded), "cpu").read("model.norm.weight")
    (copy := tmp_path / "copy").mkdir()
    for file in coded.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    file, slot = open_source(copy).stored["model.layers.1.gaps"]
    data = bytearray(file.read_bytes())
    data[slot.start : slot.end] = bytes(slot.end - slot.start)
    file.write_bytes(data)
    with pytest.raises(FormatError, match=r"`model.layers.1` of `copy`: block 0 of"):
        FolderDecoder(open_source(copy), "cpu").read("model.layers.1.self_attn.q_proj.weight")
