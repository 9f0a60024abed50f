"""A method that rounds coarsely and writes down what it was told, and tiny models of many architectures."""

import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers

from tcw import methods
from tcw.artifact import method_class
from tcw.methods import option
from tcw.tensor import TensorData, TensorInfo
from tcw.weights import Curve, Encoded, Statistics, WeightMethod
from tcw.weights._linears import is_embedding, is_linear

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "head_dim": 16, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SLIDING = {**SMALL, "sliding_window": 8}
EXPERTS = {**SMALL, "num_experts": 8, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "mlp_only_layers": []}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SMALL, "mistral": SLIDING, "qwen2": SMALL, "qwen3": SMALL, "gemma": SMALL, "gemma2": SLIDING,
    "gemma3_text": {**SLIDING, "sliding_window_pattern": 2}, "phi3": SMALL, "gpt_neox": SMALL, "olmo2": SMALL,
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 256, "n_positions": 128},
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 256},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 256},
    "mixtral": {**SMALL, "num_local_experts": 4}, "qwen3_moe": EXPERTS, "bert": SMALL,
}  # fmt: skip


def make_model(kind: str, folder: Path, **changes: Any) -> Path:
    """Save a random float32 model of an architecture, with weights large enough that layers matter."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**CONFIGS[kind], **changes})
    auto = transformers.AutoModel if kind == "bert" else transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Coarse(WeightMethod):
    """Round to a coarse grid, and remember the statistics."""

    needs_calibration: ClassVar[bool] = True
    paper: ClassVar[str] = "none"
    seen: ClassVar[dict[str, Statistics]] = {}
    step: float = option(0.02, "the grid's step")
    drift: bool = option(False, "ask for drift")
    allocate_bits: bool = option(False, "allocate")
    kv: str = option("off", "scales of the cache")
    smooth: bool = option(False, "scale inputs")
    embeddings: bool = option(False, "take embeddings and heads, too")

    def wants(self, info: TensorInfo) -> bool:
        return is_linear(info) or (self.embeddings and is_embedding(info))

    def part_names(self, info: TensorInfo) -> tuple[str, ...]:
        return ("grid", "step")

    def encode(self, tensor: TensorData, statistics: Statistics | None = None) -> Encoded | None:
        Coarse.seen[tensor.info.name] = statistics or Statistics()
        grid = np.rint(tensor.floats() / self.step).astype(np.int16)
        return Encoded({"grid": grid, "step": np.array([self.step], np.float32)})

    def predict(self, tensor: TensorData) -> int:
        return 2 * tensor.info.numel + 4

    @classmethod
    def decode(cls, info: TensorInfo, encoded: Encoded) -> TensorData:
        return TensorData.of_floats(info, encoded.parts["grid"].astype(np.float32) * encoded.parts["step"])

    def wants_drift(self) -> bool:
        return self.drift

    def allocates(self) -> bool:
        return self.allocate_bits

    def probe(self, tensor: TensorData, statistics: Statistics) -> dict[float, np.ndarray]:
        error = tensor.floats() - self.step * np.rint(tensor.floats() / self.step)
        hessian = np.eye(error.shape[1]) if statistics.hessian is None else statistics.hessian
        return {16.0: ((error @ hessian) * error).sum(1).astype(np.float64)}

    def share_out(self, curves: list[Curve]) -> dict[str, float]:
        return {curve.name: 16.0 for curve in curves}

    def prescales(self) -> bool:
        return self.smooth

    def prescale(self, weights: list[np.ndarray], statistics: Statistics) -> np.ndarray | None:
        assert statistics.hessian is not None
        return np.linspace(0.5, 2.0, weights[0].shape[1], dtype=np.float32)


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Coarse]]:
    """The method, known as `coarse` while a test runs."""
    module = types.ModuleType("tcw_coarse")
    module.Coarse = Coarse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tcw_coarse", module)
    known = methods._locations()
    monkeypatch.setattr(methods, "_locations", lambda: {**known, "coarse": ("weights", "tcw_coarse:Coarse")})
    Coarse.seen.clear()
    method_class.cache_clear()
    yield Coarse
    method_class.cache_clear()


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Make a random model of an architecture."""
    return lambda kind, **changes: make_model(kind, tmp_path / kind, **changes)
