"""A zoo of tiny random models of many families, each as a plain folder and as an artifact."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import tcw
from tcw.recipe import from_specs

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_position_embeddings": 128,
}  # fmt: skip
SEQ2SEQ = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 256,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "bos_token_id": 0,
           "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": None}  # fmt: skip


def _decoder(kind: str, **more: Any) -> tuple[Any, str]:
    return getattr(hf, f"{kind}Config")(**{**TINY, "num_key_value_heads": 2, **more}), f"{kind}ForCausalLM"


MODELS = {
    "llama": lambda: _decoder("Llama"),
    "llama-tied": lambda: _decoder("Llama", tie_word_embeddings=True),
    "mixtral": lambda: _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": lambda: _decoder(
        "Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    "qwen3-moe": lambda: _decoder(
        "Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16
    ),
    "gpt-neox": lambda: (hf.GPTNeoXConfig(**TINY), "GPTNeoXForCausalLM"),
    "bert": lambda: (hf.BertConfig(**TINY), "BertForMaskedLM"),
    "vit": lambda: (
        hf.ViTConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=16,
                     patch_size=4), "ViTForImageClassification",
    ),
    "t5": lambda: (
        hf.T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, vocab_size=256, pad_token_id=2,
                    eos_token_id=1, decoder_start_token_id=0), "T5ForConditionalGeneration",
    ),
    "bart": lambda: (hf.BartConfig(**SEQ2SEQ, max_position_embeddings=64), "BartForConditionalGeneration"),
    "whisper": lambda: (
        hf.WhisperConfig(**SEQ2SEQ, num_mel_bins=8, max_source_positions=16, max_target_positions=64,
                         suppress_tokens=None, begin_suppress_tokens=None), "WhisperForConditionalGeneration",
    ),
}  # fmt: skip
GENERATING = ("llama", "llama-tied", "mixtral", "qwen2-moe", "qwen3-moe", "gpt-neox", "t5", "bart")


@dataclass(frozen=True)
class Animal:
    """A model of the zoo."""

    name: str
    folder: Path
    artifact: Path
    cls: Any

    def plain(self, **kwargs: Any) -> Any:
        """The model as transformers loads it from the plain folder."""
        return self.cls.from_pretrained(str(self.folder), **kwargs)

    def inputs(self) -> dict[str, torch.Tensor]:
        """One fixed input of the model."""
        ids = torch.arange(3, 15).reshape(1, -1) * 7 % 256
        if self.name == "vit":
            return {"pixel_values": _ramp(1, 3, 16, 16)}
        if self.name == "whisper":
            return {"input_features": _ramp(1, 8, 32), "decoder_input_ids": ids}
        if self.name in ("t5", "bart"):
            return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
        return {"input_ids": ids}


def _ramp(*shape: int) -> torch.Tensor:
    numel = torch.Size(shape).numel()
    return (torch.arange(numel) % 17 / 17).reshape(shape).to(torch.bfloat16)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the model of a name, made once."""
    made: dict[str, Animal] = {}
    root = tmp_path_factory.mktemp("zoo")

    def get(name: str) -> Animal:
        if name not in made:
            config, class_name = MODELS[name]()
            cls = getattr(hf, class_name)
            torch.manual_seed(0)
            model = cls(config).to(torch.bfloat16)
            with torch.no_grad():
                for path, parameter in model.named_parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(0.5 if name in ("t5",) else 4)
                    elif "norm" not in path.lower():
                        parameter.normal_(0, 0.02)
            model.save_pretrained(root / name)
            if name == "bert":
                _old_names(root / name)
            tcw.compress(tcw.open_model(root / name), from_specs(["dfloat11"]), root / f"{name}.tcw")
            made[name] = Animal(name, root / name, root / f"{name}.tcw", cls)
        return made[name]

    return get


def _old_names(folder: Path) -> None:
    """Rename layer norms to gamma and beta, as checkpoints from TensorFlow have them."""
    tensors = load_file(folder / "model.safetensors")
    swap = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in swap.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    assert any("gamma" in name for name in tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
