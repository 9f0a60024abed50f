"""Which tensors of a checkpoint are weights of linear layers, and which are embeddings: by name, dtype and shape alone.

Names are those of transformers' checkpoints. A doubtful tensor is left alone: one that is not quantised costs bytes,
one that should not have been costs the model. So GPT-2's `c_attn`, `c_fc` and `c_proj` are out (they are stored
[in, out], and nothing in the file tells them from a Linear), and so are routers, classifiers and everything that is
called an embedding but is not the table of tokens.
"""

import re

from tcw.tensor import TensorInfo

TARGETS = ("linear", "embedding", "all")
FLOATS = frozenset({"BF16", "F16", "F32"})
LEAST_SIDE = 32  # a smaller matrix is a gate or a head: it saves nothing

_TOKENS = {
    "embed_tokens", "embed_tokens_per_layer", "wte", "word_embeddings", "word_embedding", "tok_embeddings", "embed_in",
    "token_embedding", "tokens_embed", "shared", "emb",
}  # fmt: skip
_TABLES = {"embed", "embedding", "embeddings"}  # tables of tokens where they stand near the top: `backbone.embeddings`
_OUTPUTS = {"lm_head", "embed_out"}
_TOP_OUTPUTS = {"output"}  # InternLM's head; `output.dense` of BERT is a linear layer
_NEVER = {
    "gate", "router", "shared_expert_gate",  # of experts
    "score", "classifier", "pooler", "qa_outputs", "seq_relationship", "predictions", "head", "wpe", "codebook",
    "relative_attention_bias", "vocab_projector", "vocab_projection", "generator_lm_head",
}  # fmt: skip
_CONV1D = {"c_attn", "q_attn", "c_fc", "c_proj"}  # of GPT-2, below `h`; those below `layers` are linear layers
_TOP_NEVER = {"output", "proj_out", "fc", "projection", "summary"}
_PARTS_NEVER = re.compile(
    r"embed|router|classifier|pooler|lm_head|position|rel_pos|norm|^score|^predictions$|^cls$|^heads?$"
)


def is_linear(info: TensorInfo) -> bool:
    """Say whether a tensor is the weight [out, in] of a linear layer inside the model's blocks."""
    module = _module(info)
    if module is None or _is_top(module, _TOP_NEVER) or module[-1] in _NEVER | _TOKENS:
        return False
    if module[-1] in _CONV1D and "layers" not in module:
        return False
    return not any(_PARTS_NEVER.search(part) for part in module)


def is_embedding(info: TensorInfo) -> bool:
    """Say whether a tensor is a table of token embeddings or an output head over tokens, [vocabulary, width]."""
    module = _module(info)
    if module is None:
        return False
    if module[-1] in _TABLES:
        return len(module) <= 2
    if module[-1] == "decoder":
        return module[-2:-1] in (["predictions"], ["lm_head"])
    return module[-1] in _TOKENS | _OUTPUTS or _is_top(module, _TOP_OUTPUTS)


def wanted(info: TensorInfo, targets: str) -> bool:
    """Say whether `targets` ("linear", "embedding" or "all") names this tensor."""
    return (targets != "embedding" and is_linear(info)) or (targets != "linear" and is_embedding(info))


def _module(info: TensorInfo) -> list[str] | None:
    """Path of the module whose `weight` a matrix is; None for what no quantiser takes."""
    if info.dtype not in FLOATS or len(info.shape) != 2 or min(info.shape) < LEAST_SIDE:
        return None
    *module, leaf = info.name.split(".")
    return module if leaf == "weight" and module else None


def _is_top(module: list[str], names: set[str]) -> bool:
    """Say whether the last part is one of `names` and stands outside every block (no layer's number before it)."""
    return module[-1] in names and not any(part.isdigit() for part in module)
