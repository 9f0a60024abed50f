"""Hub ids, without a network: from a cache laid out as huggingface_hub does, and with every way to fail."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants, errors
from safetensors.numpy import save_file

from tcw.errors import SourceError, UsageError
from tcw.source import open_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds `org/name`: refs, blobs, and a snapshot of links into them."""
    repo = tmp_path / "hub" / "models--org--name"
    for folder in ("refs", "blobs", f"snapshots/{COMMIT}"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs" / "c").write_text(json.dumps({"model_type": "llama"}))
    save_file({"x": np.arange(5, dtype=np.float32)}, repo / "blobs" / "w")
    for name, blob in {"config.json": "c", "model.safetensors": "w"}.items():
        (repo / "snapshots" / COMMIT / name).symlink_to(f"../../blobs/{blob}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repo


@pytest.mark.parametrize("text", ["org/name", "org/name@main", f"org/name@{COMMIT}"])
def test_a_cached_model_opens_offline(cache: Path, text: str) -> None:
    source = open_source(text)
    assert (source.kind, source.id, source.revision) == ("hub", "org/name", COMMIT)
    assert source.read("x").data.view(np.float32).tolist() == [0, 1, 2, 3, 4]
    assert source.side_files() == [Path("config.json")]
    assert open_source("org/name", revision="main").revision == COMMIT
    with pytest.raises(UsageError, match="do not agree"):
        open_source(f"org/name@{COMMIT}", revision="main")


def test_a_local_folder_wins_over_the_hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = tmp_path / "org" / "name"
    local.mkdir(parents=True)
    (local / "config.json").write_text("{}")
    save_file({"mine": np.zeros(1)}, local / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert list(open_source("org/name").tensors()) == ["mine"]


def test_a_link_out_of_the_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    file = cache / "snapshots" / COMMIT / "model.safetensors"
    file.unlink()
    save_file({"x": np.zeros(1)}, tmp_path / "outside")
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(SourceError, match="link that leads out"):
        open_source("org/name")


def test_offline_and_not_cached(cache: Path) -> None:
    with pytest.raises(SourceError, match="`org/other` is not in the local cache, and HF_HUB_OFFLINE is set") as caught:
        open_source("org/other")
    assert "HF_HUB_OFFLINE" in caught.value.hint
    with pytest.raises(SourceError, match="not in the local cache"):
        open_source("org/name@v2")


class Answer:
    """As much of a response as huggingface_hub's errors look at."""

    status_code = 503
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


def http(kind: type, message: str = "no") -> Exception:
    return kind(message, response=Answer())


class Timeout(Exception):
    """An error of the network library."""


Timeout.__module__ = "httpx"


@pytest.mark.parametrize(("error", "words", "hint"), [
    (http(errors.GatedRepoError), "gated", "https://huggingface.co/org/other"),
    (http(errors.RepositoryNotFoundError), "no model on the hub called `org/other`", "spelling"),
    (http(errors.RevisionNotFoundError), "no revision `v9`", "tag"),
    (http(errors.HfHubHTTPError), "status 503", "later"),
    (errors.LocalEntryNotFoundError("x"), "cannot reach the hub", "demo:smollm2"),
    (Timeout(), "cannot reach the hub", "demo:smollm2"),
])  # fmt: skip
def test_failures_are_explained(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str, hint: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SourceError, match=words) as caught:
        open_source("org/other@v9")
    assert hint in caught.value.hint


def test_bugs_are_not_taken_for_a_missing_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise AttributeError("a bug")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(AttributeError):
        open_source("org/other")


def test_what_is_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **kwargs: Any) -> str:
        asked.update(kwargs, name=name)
        return str(cache / "snapshots" / COMMIT)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_source("org/name@main").revision == COMMIT
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("org/name", "main", False)
    files = ["model.safetensors", "config.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "LICENSE",
             "pytorch_model.bin", "model.onnx", "onnx/config.json", "consolidated.safetensors", "tf_model.h5",
             "original/params.json", "x.gguf", "rust_model.ot", "pytorch_model.bin.index.json"]  # fmt: skip
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    kept = list(huggingface_hub.utils.filter_repo_objects(files, **patterns))
    assert kept == files[:6]


def test_a_repository_without_safetensors(cache: Path) -> None:
    (cache / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="`org/name` has no safetensors on the hub"):
        open_source("org/name")
