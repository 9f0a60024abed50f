"""What a reader must refuse: every hostile or damaged artifact has its own message, and none is believed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcw import pipeline, recipe
from tcw.artifact import Artifact, plain_name
from tcw.errors import FormatError, TcwError
from tcw.source import open_source

WEIGHT = "model.layers.0.mlp.up_proj.weight"
SHARD = "model-00001-of-00001.safetensors"
Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def sound(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound") / "artifact"
    pipeline.compress(open_source(tiny_llama), recipe.load("lossless"), out)
    return out


@pytest.fixture
def artifact(sound: Path, tmp_path: Path) -> Path:
    """A fresh copy to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "artifact"))


def edit(folder: Path, change: Callable[[Manifest], Any]) -> None:
    path = folder / "tcw.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def entry(change: dict[str, Any]) -> Callable[[Manifest], Any]:
    return lambda m: m["tensors"][WEIGHT].update(change)


MANIFEST_ATTACKS: dict[str, tuple[Callable[[Manifest], Any], str]] = {
    "future version": (lambda m: m.update(format="2.0"), "newer tcw"),
    "no version": (lambda m: m.pop("format"), "no valid `format`"),
    "version of words": (lambda m: m.update(format="one"), "impossible format version"),
    "no tensors": (lambda m: m.pop("tensors"), "no valid `tensors`"),
    "tensors a list": (lambda m: m.update(tensors=[]), "no valid `tensors`"),
    "no recipe": (lambda m: m.pop("recipe"), "no valid `recipe`"),
    "no source": (lambda m: m.pop("source"), "no valid `source`"),
    "path that climbs": (lambda m: m["files"].update({"../up.safetensors": m["files"][SHARD]}), "leaves the folder"),
    "absolute path": (lambda m: m["files"].update({"/etc/passwd": m["files"][SHARD]}), "leaves the folder"),
    "windows path": (lambda m: m["files"].update({"..\\up": m["files"][SHARD]}), "leaves the folder"),
    "lists a missing file": (lambda m: m["files"].update({"gone.json": m["files"][SHARD]}), "is missing"),
    "wrong file size": (lambda m: m["files"][SHARD].update(bytes=1), "the manifest says 1"),
    "file size a string": (lambda m: m["files"][SHARD].update(bytes="9"), "no valid `bytes`"),
    "file hash of words": (lambda m: m["files"][SHARD].update(sha256="no"), "impossible sha256"),
    "forgets the shard": (lambda m: m["files"].pop(SHARD), "is missing from the safetensors files"),
    "entry a string": (lambda m: m["tensors"].update({WEIGHT: "raw"}), "no valid `method`"),
    "negative shape": (entry({"shape": [-1, 64]}), "impossible shape"),
    "shape of true": (entry({"shape": [True, 64]}), "impossible shape"),
    "enormous shape": (entry({"shape": [1 << 60, 1 << 60]}), "impossible shape"),
    "unknown dtype": (entry({"dtype": "BF17"}), "unknown dtype"),
    "hash too short": (entry({"sha256": "ab"}), "impossible sha256"),
    "parts that climb": (entry({"parts": ["../codes"]}), "impossible part names"),
    "no parts": (entry({"parts": []}), "impossible part names"),
    "a part too many": (entry({"parts": ["codes", "ghost"]}), "is missing from the safetensors files"),
    "a part too few": (lambda m: m["tensors"][WEIGHT]["parts"].pop(), "not in the manifest"),
    "crc of words": (entry({"crc32": "no"}), "no valid `crc32`"),
    "params a list": (entry({"params": []}), "no valid `params`"),
    "tensor forgotten": (lambda m: m["tensors"].pop("model.norm.weight"), "not in the manifest"),
    "alias of nothing": (
        lambda m: m["tensors"].update(x={**m["tensors"][WEIGHT], "method": "same", "as": "?"}), "does not fit",
    ),
    "alias of another shape": (
        lambda m: m["tensors"].update(x={**m["tensors"][WEIGHT], "method": "same", "as": "model.norm.weight"}),
        "does not fit",
    ),
    "alias of itself": (
        lambda m: m["tensors"].update(x={**m["tensors"][WEIGHT], "method": "same", "as": "x"}), "does not fit",
    ),
    "raw tensor of another shape": (lambda m: m["tensors"]["model.norm.weight"].update(shape=[32]), "in the manifest"),
    "bits per weight a string": (entry({"bits_per_weight": "few"}), "is no number"),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFEST_ATTACKS)
def test_hostile_manifest_is_refused_with_its_own_message(artifact: Path, name: str) -> None:
    change, message = MANIFEST_ATTACKS[name]
    edit(artifact, change)
    with pytest.raises(FormatError) as caught:
        Artifact.open(artifact)
    assert message in caught.value.message


DECODE_ATTACKS: dict[str, Callable[[Manifest], Any]] = {
    "larger shape": entry({"shape": [160, 640]}),
    "far larger shape": entry({"shape": [1 << 30, 1 << 10]}),
    "smaller shape": entry({"shape": [16, 64]}),
    "other dtype": entry({"dtype": "F32", "shape": [80, 64]}),
    "unknown method": entry({"method": "zstd"}),
    "no params": entry({"params": {}}),
    "params that lie": lambda m: m["tensors"][WEIGHT]["params"].update(symbols=1 << 40),
    "symbols a string": lambda m: m["tensors"][WEIGHT]["params"].update(symbols="all"),
    "alphabet that lies": lambda m: m["tensors"][WEIGHT]["params"].update(alphabet=1 << 20, first_symbol=-5),
    "another split": lambda m: m["tensors"][WEIGHT]["params"].update(split="f32"),
    "no such split": lambda m: m["tensors"][WEIGHT]["params"].update(split="eval"),
}


@pytest.mark.parametrize("name", DECODE_ATTACKS)
def test_parts_that_disagree_with_the_shape_are_refused(artifact: Path, name: str) -> None:
    edit(artifact, DECODE_ATTACKS[name])
    with pytest.raises(TcwError):
        Artifact.open(artifact).read(WEIGHT)


def test_not_json_not_utf8_and_duplicate_keys(artifact: Path) -> None:
    for text in (b"{", b"\xff\xfe", b'{"format": "1.0", "format": "1.0"}', b"[" * 100_000, b"3"):
        (artifact / "tcw.json").write_bytes(text)
        with pytest.raises(FormatError):
            Artifact.open(artifact)


def test_missing_and_truncated_files(artifact: Path) -> None:
    shard = artifact / SHARD
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(FormatError, match="the manifest says"):
        Artifact.open(artifact)
    shard.unlink()
    with pytest.raises(FormatError, match="is missing"):
        Artifact.open(artifact)


def test_every_flipped_byte_of_a_stored_part_is_noticed(artifact: Path) -> None:
    """The codec refuses the parts, or the decoded bytes have another hash; the file's hash always differs."""
    opened = Artifact.open(artifact)
    shard = artifact / SHARD
    whole = shard.read_bytes()
    for part in opened.entries[WEIGHT].parts:
        _, slot = opened.stored[f"{WEIGHT}.{part}"]
        for at in {slot.start, (slot.start + slot.end) // 2, slot.end - 1}:
            shard.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
            damaged = Artifact.open(artifact)
            assert dict(damaged.check_files())[SHARD] is False
            with pytest.raises(FormatError):
                damaged.read(WEIGHT)
            with pytest.raises(FormatError, match="CRC-32"):
                damaged.encoded(WEIGHT)


def test_verdict_is_stored_and_nothing_else_changes(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    before = json.loads((artifact / "tcw.json").read_text())
    opened.record_verdict({"verdict": "identical"})
    after = json.loads((artifact / "tcw.json").read_text())
    assert after.pop("verdict") == {"verdict": "identical"}
    assert before.pop("verdict") is None
    assert before == after
    assert all(ok for _, ok in Artifact.open(artifact).check_files())


@pytest.mark.parametrize(
    ("name", "plain"),
    [("a.json", True), ("sub/a.json", True), ("../a", False), ("a/../../b", False), ("/a", False), ("", False),
     ("a\\b", False), ("a\0b", False)],
)  # fmt: skip
def test_plain_names_stay_inside(name: str, plain: bool) -> None:
    assert plain_name(name) is plain
