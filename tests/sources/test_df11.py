"""Official DFloat11 folders as a source: what comes out is what went in, and lies are refused."""

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tcw import export
from tcw.errors import FormatError, SourceError
from tcw.safetensors_file import StreamWriter, header_bound, read_header, read_slot
from tcw.source import open_source
from tcw.sources.df11 import DF11Source
from tcw.tensor import TensorInfo

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def coded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("df11") / "tiny-df11"
    export.export(open_source(tiny_llama), "dfloat11", folder)
    return folder


@pytest.fixture
def copy(coded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(coded, tmp_path / "copy"))


def same_tensors(a, b) -> None:
    assert {i.name: i for i in a.tensors().values()} == {i.name: i for i in b.tensors().values()}
    for name in a.tensors():
        assert np.array_equal(a.read(name).data, b.read(name).data), name


@pytest.mark.parametrize("files", ["one", "group"])
def test_what_went_in_comes_out(tiny_llama, tmp_path, files):
    original = open_source(tiny_llama)
    export.export(original, f"dfloat11:files={files}", tmp_path / "df11")
    source = open_source(tmp_path / "df11")
    assert isinstance(source, DF11Source)
    assert (source.kind, source.id) == ("df11", "df11")
    assert Q in source.coded
    same_tensors(source, original)


def test_back_to_plain_safetensors(tiny_llama, coded, tmp_path):
    export.export(open_source(coded), "hf", tmp_path / "back")
    back = open_source(tmp_path / "back")
    assert back.kind == "folder"
    same_tensors(back, open_source(tiny_llama))


def test_picklable_and_read_by_threads_at_once(tiny_llama, coded):
    source, original = pickle.loads(pickle.dumps(open_source(coded))), open_source(tiny_llama)
    names = list(source.tensors()) * 3
    with ThreadPoolExecutor(4) as pool:
        for name, got in zip(names, pool.map(source.read, names), strict=True):
            assert np.array_equal(got.data, original.read(name).data)


def test_samples_are_runs_of_the_tensor(tiny_llama, coded):
    source, words = open_source(coded), open_source(tiny_llama).read(Q).words
    assert np.array_equal(source.sample(Q, 10**9).words, words)
    part = source.sample(Q, 1000)
    assert part.info == TensorInfo(Q, "BF16", (500,))
    assert np.array_equal(part.words, words[:500])
    many = source.sample("lm_head.weight", 20_000).words
    rows = open_source(tiny_llama).read("lm_head.weight").words
    assert many.size == 10_000
    assert np.array_equal(many[:5000], rows[:5000])
    assert np.array_equal(many[5000:], rows[-5000:])


def test_a_changed_file_is_noticed(copy):
    source = open_source(copy)
    with (copy / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(SourceError, match="changed while it was read"):
        source.read(Q)


def test_stored_parts_are_no_tensors(coded):
    source = open_source(coded)
    with pytest.raises(SourceError, match=r"`model.layers.1.luts` of `tiny-df11` is a part"):
        source.read("model.layers.1.luts")


def test_unescaped_dots_of_version_0_2(copy):
    change_config(copy, pattern_dict=lambda p: {k.replace(r"\.", "."): v for k, v in p.items()})
    assert open_source(copy).read(Q).info.shape == (64, 64)


def test_an_index_is_ignored(copy):
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert Q in open_source(copy).tensors()


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    table = config["dfloat11_config"]
    for key, change in changes.items():
        table[key] = change(table[key])
    (folder / "config.json").write_text(json.dumps(config))


def change_part(folder: Path, name: str, change) -> None:
    """Rewrite model.safetensors with one tensor replaced by what `change` makes of it, or left out for None."""
    path = folder / "model.safetensors"
    tensors = [(s.info, read_slot(path, s)) for s in read_header(path).tensors.values()]
    path.unlink()
    with StreamWriter(path, header_bound(i for i, _ in tensors) + 1000) as writer:
        for info, data in tensors:
            if info.name == name:
                data = change(data)
                if data is None:
                    continue
                wide = data.size == info.nbytes and info.dtype == "U8" and len(info.shape) == 2
                shape = info.shape if wide or info.dtype == "I64" else (data.size,)
                info = TensorInfo(name, info.dtype, shape if info.dtype == "U8" else (data.size // 8,))
            writer.append(info, data)


def read_all(folder: Path) -> None:
    source = open_source(folder)
    for name in source.tensors():
        source.read(name)


BLOCK = "model.layers.1."
FAR = np.array([2**40]).view(np.uint8)
BAD_PARTS = {
    "no gaps": ("gaps", lambda a: None, "no `model.layers.1.gaps`"),
    "no split_positions": ("split_positions", lambda a: None, "no `model.layers.1.split_positions`"),
    "short gaps": ("gaps", lambda a: a[:-320], "gaps` has"),
    "short positions": ("output_positions", lambda a: a[:4], "output_positions"),
    "wild positions": ("output_positions", lambda a: a ^ 255, "output_positions"),
    "flat luts": ("luts", lambda a: a[:300], "should be U8 of 2 dimensions"),
    "bad luts": ("luts", lambda a: a * 0 + 240, "luts` has"),
    "one weight more": ("sign_mantissa", lambda a: np.append(a, a[:1]), "which shape|disagree|positions"),
    "no weights": ("sign_mantissa", lambda a: a[:0], "does not rise"),
    "cut stream": ("encoded_exponent", lambda a: a[:-100], "does not decode|does not count"),
    "other stream": ("encoded_exponent", lambda a: a ^ 85, "does not decode"),
    "splits beyond": (
        "split_positions",
        lambda a: np.append(a[:-8], FAR),
        "does not rise",
    ),
    "negative split": ("split_positions", lambda a: np.append(np.array([-5]).view(np.uint8), a[8:]), "does not rise"),
    "too few splits": ("split_positions", lambda a: a[:-8], "has 6 matrices, and `pattern_dict` names 7"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_lying_parts_are_refused(copy, name):
    part, change, message = BAD_PARTS[name]
    change_part(copy, BLOCK + part, change)
    with pytest.raises((FormatError, SourceError), match=message):
        read_all(copy)


BAD_CONFIGS = {
    "no table": (lambda c: c.update(dfloat11_config=7), "512 threads of 8 bytes"),
    "other cells": (lambda c: c["dfloat11_config"].update(bytes_per_thread=16), "512 threads of 8 bytes"),
    "other threads": (lambda c: c["dfloat11_config"].update(threads_per_block=[256]), "512 threads of 8 bytes"),
    "no patterns": (lambda c: c["dfloat11_config"].pop("pattern_dict"), "no usable `pattern_dict`"),
    "paths no list": (lambda c: c["dfloat11_config"].update(pattern_dict={"a": "b"}), "something else than modules"),
    "paths odd": (lambda c: c["dfloat11_config"].update(pattern_dict={"a": ["../b"]}), "something else than modules"),
    "none matches": (lambda c: c["dfloat11_config"].update(pattern_dict={"a": []}), "0 patterns of `pattern_dict`"),
    "two match": (lambda c: c["dfloat11_config"]["pattern_dict"].update({"lm.head": []}), "2 patterns of"),
    "other model": (lambda c: c.update(intermediate_size=32), "in which shape the 10240 weights of"),
    "unknown model": (lambda c: c.update(model_type="no-such"), "transformers cannot make the model"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_lying_configs_are_refused(copy, name):
    change, message = BAD_CONFIGS[name]
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises((FormatError, SourceError), match=message):
        open_source(copy)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|aa)*b",
        "a*b*c*d*",
        "(?=a)b",
        r"(a)\1",
        "(?P<n>a)",
        "a{1000000}",
        "[",
        "(" * 50,
        "a" * 20_000,
        ".*.*.*x",
    ],
)
def test_patterns_that_could_run_for_ever_are_refused(copy, pattern):
    change_config(copy, pattern_dict=lambda p: {**p, pattern: []})
    with pytest.raises(FormatError, match="a pattern that tcw does not run"):
        open_source(copy)


@pytest.mark.parametrize(
    "pattern", [r"transformer_blocks\.\d+", "model.layers.[0-9]+", r"(single|double)_blocks\.\d+", ".*"]
)
def test_patterns_of_published_models_are_fine(copy, pattern):
    """They are read, and only then found not to be this model's."""
    change_config(copy, pattern_dict=lambda p: {pattern: []})
    with pytest.raises(FormatError, match=r"patterns of `pattern_dict`|matrices, and"):
        open_source(copy)


def test_pickles_of_version_0_1_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "model.pkl")
    with pytest.raises(SourceError, match=r"of dfloat11 0\.1") as error:
        open_source(copy)
    assert "0.2" in error.value.hint


def test_a_folder_without_weights_is_refused(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="no safetensors file"):
        open_source(copy)


def test_tensors_stored_twice_are_refused(copy):
    info = TensorInfo(Q, "BF16", (64, 64))
    with StreamWriter(copy / "more.safetensors", header_bound([info])) as writer:
        writer.append(info, np.zeros(info.nbytes, np.uint8))
    with pytest.raises(FormatError, match="stored twice"):
        open_source(copy)
