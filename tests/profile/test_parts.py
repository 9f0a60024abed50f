"""Names as transformers 5 spells them, each with the part that a reader of its modelling code would say."""

import pytest

from tcw.profile.parts import PARTS, block_of, is_input_side, is_routed_expert, part_of

EXPECTED = {
    "embedding": [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "shared.weight",
        "embeddings.word_embeddings.weight",
        "embeddings.position_embeddings",
        "embeddings.cls_token",
        "embeddings.patch_embeddings.projection.weight",
        "gpt_neox.embed_in.weight",
        "visual.patch_embed.proj.weight",
        "transformer.word_embeddings.weight",
        "encoder.embed_positions.weight",
    ],
    "attention": [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.31.self_attn.o_proj.bias",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.1.self_attn.sinks",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.self_attention.query_key_value.weight",
        "transformer.h.0.self_attention.dense.weight",
        "encoder.layer.0.attention.self.query.weight",
        "encoder.layer.0.attention.output.dense.weight",
        "decoder.block.0.layer.1.EncDecAttention.k.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "decoder.layers.0.encoder_attn.out_proj.weight",
        "transformer.layer.0.attention.q_lin.weight",
        "layers.0.attn.Wqkv.weight",
        "layers.0.attn.Wo.weight",
        "visual.blocks.0.attn.qkv.weight",
        "model.layers.0.linear_attn.in_proj_qkvz.weight",
        "rwkv.blocks.0.attention.key.weight",
    ],
    "mlp": [
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.gate.weight",
        "model.layers.3.mlp.shared_experts.down_proj.weight",
        "model.layers.0.block_sparse_moe.experts.7.w1.weight",
        "model.layers.0.mlp.router.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "transformer.h.0.mlp.c_fc.weight",
        "encoder.layer.0.intermediate.dense.weight",
        "encoder.layer.0.output.dense.bias",
        "encoder.block.0.layer.1.DenseReluDense.wo.weight",
        "decoder.layers.0.fc1.weight",
        "transformer.layer.0.ffn.lin2.weight",
        "layers.0.mlp.Wo.weight",
        "transformer.blocks.0.ffn.up_proj.weight",
        "encoder.albert_layer_groups.0.albert_layers.0.ffn.weight",
        "model.layers.0.feed_forward.router.weight",
        "rwkv.blocks.0.feed_forward.key.weight",
        "model.layers.0.mlp.gate_proj.weight_scale_inv",
    ],
    "norm": [
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "transformer.ln_f.weight",
        "transformer.h.0.ln_1.bias",
        "embeddings.LayerNorm.weight",
        "vision_model.pre_layrnorm.weight",
        "encoder.layer.0.attention.output.LayerNorm.weight",
        "encoder.block.0.layer.0.layer_norm.weight",
        "backbone.norm_f.weight",
        "decoder.layernorm_embedding.weight",
        "visual.blocks.0.norm1.weight",
        "rwkv.blocks.0.ln1.weight",
        "rwkv.blocks.0.pre_ln.weight",
        "model.layers.0.self_attn.kv_a_layernorm.weight",
        "bn1.running_mean",
        "layers.0.mlp_norm.weight",
    ],
    "head": [
        "lm_head.weight",
        "embed_out.weight",
        "score.weight",
        "classifier.dense.weight",
        "cls.predictions.transform.dense.weight",
        "pooler.dense.weight",
        "qa_outputs.bias",
        "visual_projection.weight",
        "logit_scale",
        "head.weight",
        "proj_out.weight",
        "vocab_projector.weight",
        "output.weight",
    ],
    "other": [
        "backbone.layers.0.mixer.A_log",
        "backbone.layers.0.mixer.out_proj.weight",
        "model.layers.0.mamba.in_proj.weight",
        "encoder.conv1.weight",
        "model.rotary_emb.inv_freq",
        "model.multi_modal_projector.linear.weight",
        "weight",
    ],
}


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, names in EXPECTED.items() for name in names])
def test_part(part: str, name: str) -> None:
    assert part_of(name) == part


def test_every_part_is_tried() -> None:
    assert set(EXPECTED) == set(PARTS)


def test_block() -> None:
    assert block_of("model.layers.3.mlp.experts.12.w1.weight") == "model.layers.3"
    assert block_of("model.embed_tokens.weight") == "model.embed_tokens"
    assert block_of("logit_scale") == "logit_scale"


def test_experts_and_encoders() -> None:
    assert is_routed_expert("model.layers.0.mlp.experts.down_proj")
    assert not is_routed_expert("model.layers.0.mlp.shared_experts.down_proj.weight")
    assert is_input_side("model.vision_tower.encoder.layers.0.mlp.fc1.weight")
    assert is_input_side("encoder.block.0.layer.0.SelfAttention.q.weight")
    assert not is_input_side("model.layers.0.mlp.up_proj.weight")
