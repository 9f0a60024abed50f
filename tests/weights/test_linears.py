"""Which tensors are linear layers and which are embeddings, over the architectures that people compress."""

import pytest

from tcw.tensor import TensorInfo
from tcw.weights._linears import is_embedding, is_linear, wanted

LINEAR = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.11.mlp.down_proj.weight",
    "model.language_model.layers.3.mlp.gate_proj.weight",
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.0.mlp.experts.63.up_proj.weight",
    "model.layers.0.mlp.shared_expert.gate_proj.weight",
    "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "model.layers.0.mlp.c_fc.weight",
    "gpt_neox.layers.0.attention.query_key_value.weight",
    "gpt_neox.layers.0.mlp.dense_h_to_4h.weight",
    "model.layers.0.self_attn.dense.weight",
    "model.layers.0.mlp.fc1.weight",
    "model.layers.0.mlp.gate_up_proj.weight",
    "model.layers.0.feed_forward.w1.weight",
    "model.layers.0.attention.wqkv.weight",
    "transformer.h.0.self_attention.query_key_value.weight",
    "transformer.h.0.attn.q_proj.weight",
    "transformer.blocks.0.ffn.up_proj.weight",
    "bert.encoder.layer.0.attention.self.query.weight",
    "bert.encoder.layer.0.attention.output.dense.weight",
    "bert.encoder.layer.0.intermediate.dense.weight",
    "encoder.layer.0.output.dense.weight",
    "vit.encoder.layer.0.attention.attention.key.weight",
    "model.visual.blocks.0.attn.qkv.weight",
    "model.encoder.layers.0.fc2.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "decoder.block.0.layer.2.DenseReluDense.wi_0.weight",
    "backbone.layers.0.mixer.in_proj.weight",
    "rwkv.blocks.0.attention.key.weight",
    "model.mm_projector.linear_1.weight",
]

EMBEDDING = [
    "lm_head.weight",
    "model.language_model.embed_tokens.weight",
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "gpt_neox.embed_in.weight",
    "embed_out.weight",
    "gpt_neox.embed_out.weight",
    "transformer.word_embeddings.weight",
    "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.weight",
    "lm_head.decoder.weight",
    "shared.weight",
    "model.tok_embeddings.weight",
    "output.weight",
    "backbone.embeddings.weight",
    "text_model.embeddings.token_embedding.weight",
]

NEITHER = [
    "transformer.wpe.weight",
    "h.0.attn.c_attn.weight",
    "transformer.h.0.attn.c_proj.weight",
    "transformer.h.0.mlp.c_fc.weight",
    "h.0.mlp.c_proj.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.block_sparse_moe.gate.weight",
    "model.layers.0.mlp.router.weight",
    "model.layers.0.feed_forward.router.classifier.weight",
    "bert.embeddings.position_embeddings.weight",
    "bert.embeddings.token_type_embeddings.weight",
    "encoder.layer.0.attention.relative_attention_bias.weight",
    "model.decoder.embed_positions.weight",
    "vision_model.embeddings.position_embedding.weight",
    "bert.pooler.dense.weight",
    "classifier.weight",
    "classifier.dense.weight",
    "score.weight",
    "cls.seq_relationship.weight",
    "cls.predictions.transform.dense.weight",
    "lm_head.dense.weight",
    "model.vision_tower.head.mlp.fc1.weight",
    "head.weight",
    "qa_outputs.weight",
    "proj_out.weight",
    "encoder.embedding_hidden_mapping_in.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.self_attn.q_proj.lora_A",
    "weight",
]


def info(name: str, dtype: str = "BF16", shape: tuple[int, ...] = (96, 64)) -> TensorInfo:
    return TensorInfo(name, dtype, shape)


@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str) -> None:
    assert is_linear(info(name))
    assert not is_embedding(info(name))


@pytest.mark.parametrize("name", EMBEDDING)
def test_embedding(name: str) -> None:
    assert is_embedding(info(name))
    assert not is_linear(info(name))


@pytest.mark.parametrize("name", NEITHER)
def test_neither(name: str) -> None:
    assert not is_linear(info(name))
    assert not is_embedding(info(name))


@pytest.mark.parametrize("dtype", ["F64", "F8_E4M3", "I32", "U8"])
def test_only_floats_that_are_computed_with(dtype: str) -> None:
    assert not wanted(info(LINEAR[0], dtype), "all")
    assert not wanted(info(EMBEDDING[0], dtype), "all")


@pytest.mark.parametrize("shape", [(96,), (31, 64), (64, 31), (4, 96, 64), (0, 64), ()])
def test_only_matrices_of_some_size(shape: tuple[int, ...]) -> None:
    assert not wanted(info(LINEAR[0], shape=shape), "all")
    assert not wanted(info(EMBEDDING[0], shape=shape), "all")


def test_targets() -> None:
    linear, embedding = info(LINEAR[0]), info(EMBEDDING[0])
    assert [wanted(linear, t) for t in ("linear", "embedding", "all")] == [True, False, True]
    assert [wanted(embedding, t) for t in ("linear", "embedding", "all")] == [False, True, True]


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3_moe", "gemma3_text", "gpt2", "gpt_neox", "phi", "mixtral", "bert", "t5", "mamba"]
)
def test_names_agree_with_the_modules_of_transformers(kind: str) -> None:
    """Whatever is called linear is one, and what is left out is known: heads, routers, Conv1D."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind]()
    for key in ("num_hidden_layers", "num_local_experts", "num_experts"):
        if hasattr(config, key):
            setattr(config, key, 2)
    maker = AutoModel if kind in ("bert", "t5") else AutoModelForCausalLM
    with torch.device("meta"):
        model = maker.from_config(config)
    linear = set()
    for name, parameter in model.named_parameters():
        if not name.endswith(".weight"):
            continue
        module = model.get_submodule(name.removesuffix(".weight"))
        tensor = info(name, shape=tuple(parameter.shape))
        if is_linear(tensor):
            assert isinstance(module, torch.nn.Linear), name
            linear.add(name)
        elif is_embedding(tensor):
            assert isinstance(module, torch.nn.Embedding | torch.nn.Linear), name
        elif isinstance(module, torch.nn.Linear) and min(parameter.shape) >= 32:
            assert name == "pooler.dense.weight", name
    assert linear or kind == "gpt2"
