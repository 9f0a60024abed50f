"""Every kind of model gets inputs that it can take, and a reason for what is left out."""

from pathlib import Path

import pytest
import torch
import transformers as hf

from tcw.source import open_source
from tcw.verify import verify

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = SMALL | {"vocab_size": 90, "max_position_embeddings": 64}
T5 = {"vocab_size": 90, "d_model": 32, "d_ff": 48, "d_kv": 16, "num_layers": 1, "num_heads": 2}
WHISPER = {
    "vocab_size": 90, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 96,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "suppress_tokens": [], "begin_suppress_tokens": [],
}  # fmt: skip
CLIP = {
    "text_config": TEXT | {"eos_token_id": 2, "bos_token_id": 1},
    "vision_config": SMALL | {"image_size": 16, "patch_size": 8}, "projection_dim": 16,
}  # fmt: skip
WAVE = SMALL | {
    "conv_dim": [16, 16], "conv_kernel": [10, 8], "conv_stride": [5, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 20,
}  # fmt: skip


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return {
        "causal": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=90, n_embd=32, n_layer=1, n_head=2, n_positions=40)
        ),
        "mixture of experts": lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
        ),
        "recurrent": lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, state_size=4)
        ),
        "encoder": lambda: hf.BertModel(hf.BertConfig(**TEXT)),
        "classifier": lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, num_labels=3)),
        "masked": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)),
        "encoder-decoder": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)),
        "vision": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, image_size=16, patch_size=8)),
        "text and picture": lambda: hf.CLIPModel(hf.CLIPConfig(**CLIP)),
        "speech": lambda: hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER)),
        "wave": lambda: hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**WAVE)),
    }[kind]()


GENERATES = {"causal", "mixture of experts", "recurrent", "encoder-decoder"}
NO_LOGITS = {"encoder", "text and picture"}
KINDS = [
    "causal", "mixture of experts", "recurrent", "encoder", "classifier", "masked", "encoder-decoder", "vision",
    "text and picture", "speech", "wave",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_kind(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path / "model")
    source = open_source(tmp_path / "model")
    verdict = verify(source, source, device="cpu")
    shown = verdict.to_json()
    assert verdict.verdict == "identical"
    assert shown["logits"]["bit_identical"] is True
    assert (shown["logits"]["mean_kl"] is None) == (kind in NO_LOGITS)
    assert len(verdict.sequences) >= 8
    assert all(s.positions > 0 for s in verdict.sequences)
    assert (shown["generation"]["tokens"] is not None) == (kind in GENERATES)
    assert (kind in GENERATES) != ("generation" in verdict.skipped)
    assert "perplexity" in verdict.skipped, "there is no tokenizer"


def test_a_decoder_without_a_start_is_compared_without_generation(tmp_path: Path) -> None:
    hf.T5ForConditionalGeneration(hf.T5Config(**T5)).save_pretrained(tmp_path / "m")
    source = open_source(tmp_path / "m")
    verdict = verify(source, source)
    assert verdict.verdict == "identical"
    assert verdict.sections["logits"]["bit_identical"]
    assert "which token its decoder starts with" in verdict.skipped["generation"]


@pytest.mark.parametrize("kind", ["vision", "text and picture", "encoder-decoder"])
def test_a_changed_weight_shows_in_the_output(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + torch.rand_like(parameter) / 10)
    model.save_pretrained(tmp_path / "two")
    one, two = open_source(tmp_path / "one"), open_source(tmp_path / "two")
    shown = verify(two, one, device="cpu").to_json()
    assert shown["verdict"] == "different"
    assert shown["logits"]["bit_identical"] is False
    assert shown["logits"]["max_abs_diff"] > 0


def test_minilm_with_its_tokenizer(minilm: Path) -> None:
    source = open_source(minilm)
    verdict = verify(source, source, device="cpu")
    assert verdict.verdict == "identical"
    assert verdict.sequences[0].label.startswith("The harbour")
    assert set(verdict.skipped) == {"generation", "perplexity"}
