"""Models and artifacts to judge, and a lossy method that exists only here."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tcw import methods, recipe
from tcw.artifact import Artifact
from tcw.pipeline import compress
from tcw.source import Source, open_source
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Encoded, Statistics, WeightMethod


@dataclass(frozen=True)
class Coarse(WeightMethod):
    """Keep the upper bits of every BF16 word."""

    drop: int = methods.option(4, "low bits to lose")
    lossless: ClassVar[bool] = False

    def wants(self, info: TensorInfo) -> bool:
        return info.dtype == "BF16" and len(info.shape) == 2

    def part_names(self, info: TensorInfo) -> tuple[str, ...]:
        return ("words",)

    def encode(self, tensor: TensorData, statistics: Statistics | None = None) -> Encoded:
        return Encoded({"words": tensor.words >> self.drop}, {"drop": self.drop})

    @classmethod
    def decode(cls, info: TensorInfo, encoded: Encoded) -> TensorData:
        words = encoded.parts["words"].reshape(-1) << encoded.params["drop"]
        return TensorData(info, words.astype(np.uint16).view(np.uint8))


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the lossy method, while a test runs."""
    monkeypatch.setitem(methods._locations(), "coarse", ("weights", __name__))
    monkeypatch.setattr(methods, "get", lambda name, get=methods.get: Coarse if name == "coarse" else get(name))
    return "coarse"


@pytest.fixture(scope="session")
def tiny(tiny_llama: Path) -> Source:
    return open_source(tiny_llama)


@pytest.fixture(scope="session")
def lossless_folder(tiny: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "lossless"
    compress(tiny, recipe.load("lossless"), folder)
    return folder


@pytest.fixture
def lossless(lossless_folder: Path, tmp_path: Path) -> Artifact:
    """A fresh copy of an artifact: a test may damage it."""
    shutil.copytree(lossless_folder, tmp_path / "lossless")
    return Artifact.open(tmp_path / "lossless")


@pytest.fixture
def lossy(tiny: Source, tmp_path: Path, coarse: str) -> Callable[[int], Artifact]:
    """Makes an artifact that lost some bits of every matrix."""

    def make(drop: int) -> Artifact:
        made = recipe.Recipe("lossy", (recipe.make_step(coarse, {"drop": drop}),), limits={"max_kl": 0.5})
        return Artifact.open(compress(tiny, made, tmp_path / f"lossy{drop}").artifact)

    return make
