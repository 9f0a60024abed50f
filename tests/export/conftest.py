"""Artifacts for the exports of quantised models: real ones, and hand-made ones whose codes are drawn at random."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tcw import pipeline, recipe
from tcw.artifact import RAW, Artifact
from tcw.artifact_writer import ArtifactWriter, Stored
from tcw.source import open_source
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Encoded, Statistics
from tcw.weights.fp8 import Fp8

Expected = dict[str, np.ndarray]  # name -> the words that a reader must get
_STORED = ("bits", "group_size", "grid", "scale")
Choose = Callable[[TensorInfo], tuple[str, dict[str, Any]] | None]


@pytest.fixture(scope="session")
def wide_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BF16 Llama whose matrices have sides that 128 divides; its head is tied."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "wide-llama"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_llama / name, folder / name)
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Artifact]:
    """Compress a model with specs: `small(model, "fp8", "dfloat11")`."""

    def make(model: Path, *specs: str) -> Artifact:
        out = tmp_path / "-".join(specs).replace(":", "-").replace("=", "-").replace(",", "-")
        pipeline.compress(open_source(model), recipe.from_specs(list(specs)), out)
        return Artifact(out)

    return make


def bits_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """The digits of codes [..., n], lowest first: [..., n * bits]."""
    digits = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    return digits.reshape(*codes.shape[:-1], -1)


def integers(info: TensorInfo, params: dict[str, Any], rng: np.random.Generator) -> tuple[dict[str, Any], np.ndarray]:
    """Random codes, scales and zeros in the stored form, and the weights that they stand for, by the formula."""
    (out, width), bits = info.shape, params["bits"]
    span = params["group_size"] or width
    groups = -(-width // span)
    codes = rng.integers(0, 1 << bits, (out, width), dtype=np.uint8)
    drawn = rng.uniform(0.1, 1, (out, groups)) * params.get("largest", 0.02)
    scale = TensorData.of_floats(TensorInfo("s", params["scale"], (out, groups)), drawn)
    stream = np.zeros((out, -(-width * bits // 32) * 32), np.uint8)
    stream[:, : width * bits] = bits_of(codes, bits)
    parts = {
        "codes": np.packbits(stream, axis=1, bitorder="little").view("<i4"),
        "scale": scale.data.view({"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[params["scale"]]),
    }
    parts["scale"] = parts["scale"].reshape(out, groups)
    zero = np.full((out, groups), {"midrise": ((1 << bits) - 1) / 2}.get(params["grid"], 1 << (bits - 1)), np.float64)
    if params["grid"] == "zero":
        zero = rng.integers(params.get("least", 1), 1 << bits, (out, groups), dtype=np.uint8)
        parts["zero"] = np.packbits(bits_of(zero.reshape(-1), bits), bitorder="little")
    each = [np.repeat(a.astype(np.float64), span, axis=1)[:, :width] for a in (zero, scale.floats())]
    values = (codes - each[0]) * each[1]
    return parts, TensorData.of_floats(info, values.astype(np.float32)).words


@pytest.fixture
def by_hand(tmp_path: Path) -> Callable[[Path, Choose], tuple[Artifact, Expected]]:
    """Make an artifact whose tensors are stored as `choose` says: (method, params) or None for raw.

    Integers are random, with zeros from `least` up and scales up to `largest` where params has these; FP8 is the method
    itself, its params are its options, and its inputs reached 3.5.
    """

    def make(model: Path, choose: Choose) -> tuple[Artifact, Expected]:
        source, rng, expected = open_source(model), np.random.default_rng(0), {}
        out = tmp_path / f"by-hand-{len(list(tmp_path.iterdir()))}"
        plan = {"name": "x", "method": [{"use": "int4"}]}
        names = ("codes", "scale", "zero")
        writer = ArtifactWriter(source, plan, out, lambda _: names, force=False, resume=False)
        try:
            for info in writer.order:
                data, chosen = source.read(info.name), choose(info)
                if chosen is None:
                    expected[info.name] = data.words
                    writer.add(Stored(info, RAW, data.sha256(), {"": data.data}))
                    continue
                method, params = chosen
                if method == "fp8":
                    encoded = Fp8(**params).encode(data, Statistics(input_max=3.5))
                    expected[info.name] = Fp8.decode(info, encoded).words
                else:
                    parts, expected[info.name] = integers(info, params, rng)
                    encoded = Encoded(parts, {k: v for k, v in params.items() if k in _STORED})
                writer.add(Stored(info, method, data.sha256(), encoded.parts, encoded.params))
            writer.finish({p.name: "0" * 64 for p in source.weight_files()})
        finally:
            writer.close()
        return Artifact(out), expected

    return make
