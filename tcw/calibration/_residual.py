"""How the tensors of a language model touch its residual stream, decided by model type and tensor names.

    embedding ──► stream ──┬── norm ──► q, k, v ──► heads ──► o ──► (+) ──┬── norm ──► gate, up ──► down ──► (+) ── ...
                           └──────────────────────────────────────────────┘                     last norm ──► lm_head

What reads the stream does so behind an RMSNorm, what writes to it adds to it: only then may the stream be rotated.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from tcw.errors import TcwError
from tcw.tensor import TensorInfo

EMBEDDING, LAST_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_ROTATABLE = {
    "llama", "mistral", "ministral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "gemma", "smollm3",
    "granite",
}  # fmt: skip
_SHIFTED = {"gemma"}  # their norms multiply by 1 + weight
_TIED = {"gemma", "smollm3"}  # embeddings are tied unless the config says otherwise
_DTYPES = {"BF16", "F16", "F32"}
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
_ATTENTION, _MLP = "input_layernorm.weight", "post_attention_layernorm.weight"
_EXPERT = r"(?:mlp|block_sparse_moe)\.experts\.\d+\."


class CannotRotate(TcwError):
    """Rotating this model would change what it computes; `message` says why."""

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Keep the hint when the error crosses a process boundary."""
        return CannotRotate, (self.message, self.hint)


@dataclass(frozen=True)
class Role:
    """What rotating does to a matrix W [out, in], or to a bias [out].

    Attributes:
        reads: the input is the residual stream: W·diag(γ)·R₁.
        norm: name of the weight γ of the norm in between; empty for the embedding.
        writes: the output is added to the residual stream: R₁ᵀ·W.
        heads: "in": the input is values, R₂ for each head: W·(I ⊗ R₂); "out": the output is, (I ⊗ R₂)ᵀ·W.
        first: row where values begin; before them stand queries and keys.
        is_norm: the weight of a norm: it becomes one (or zero, where the norm adds one to it).
    """

    reads: bool = False
    norm: str = ""
    writes: bool = False
    heads: str = ""
    first: int = 0
    is_norm: bool = False


# names in a layer -> role; `norm` is the name in the layer. None: the tensor stays as it is
_ROLES: list[tuple[str, Role | None]] = [
    (r"self_attn\.[qk]_proj\.weight", Role(reads=True, norm=_ATTENTION)),
    (r"self_attn\.(v|qkv)_proj\.weight", Role(reads=True, norm=_ATTENTION, heads="out")),
    (r"self_attn\.v_proj\.bias", Role(heads="out")),
    (r"self_attn\.o_proj\.weight", Role(writes=True, heads="in")),
    (r"self_attn\.o_proj\.bias", Role(writes=True)),
    (r"mlp\.(gate|up|gate_up)_proj\.weight", Role(reads=True, norm=_MLP)),
    (r"mlp\.down_proj\.(weight|bias)", Role(writes=True)),
    (r"(mlp|block_sparse_moe)\.gate\.weight", Role(reads=True, norm=_MLP)),  # the router
    (_EXPERT + r"(gate_proj|up_proj|w1|w3)\.weight", Role(reads=True, norm=_MLP)),
    (_EXPERT + r"(down_proj|w2)\.weight", Role(writes=True)),
    (r"mlp\.shared_expert\.(gate|up)_proj\.weight", Role(reads=True, norm=_MLP)),
    (r"mlp\.shared_expert\.down_proj\.weight", Role(writes=True)),
    (r"mlp\.shared_expert_gate\.weight", Role(reads=True, norm=_MLP)),
    (r"(input|post_attention)_layernorm\.weight", Role(is_norm=True)),
    (r"self_attn\.[qk]_(proj\.bias|norm\.weight)|self_attn\.rotary_emb\.inv_freq|mlp\.(gate|up)_proj\.bias", None),
]
_OUTER: dict[str, Role | None] = {
    EMBEDDING: Role(reads=True),
    LAST_NORM: Role(is_norm=True),
    HEAD: Role(reads=True, norm=LAST_NORM),
    "lm_head.bias": None,
}
_REASONS = [  # what gives away a model that cannot be rotated
    (r"(pre|post)_feedforward_layernorm", "norms what a block adds to the residual stream"),
    (r"wpe\.|embed_positions|position_embeddings", "adds position embeddings to the residual stream"),
    (r"(ln_\w+|norm\w*)\.bias$", "has norms that take the mean away (LayerNorm)"),
]


@dataclass(frozen=True)
class Layout:
    """A model that can be rotated.

    Attributes:
        roles: tensor name -> role, of the tensors that change; with HEAD when it has to be added.
        width: of the residual stream.
        head: width of a head's values.
        tied: the output head is the embedding and has to be made a tensor of its own.
        shifted: norms multiply by 1 + weight.
    """

    roles: dict[str, Role]
    width: int
    head: int
    tied: bool
    shifted: bool


def layout(config: dict[str, Any], infos: dict[str, TensorInfo]) -> Layout:
    """Find out what each tensor is. Raises CannotRotate for a model whose residual stream may not be rotated."""
    kind = str(config.get("model_type"))
    _refuse_unknown(kind, infos)
    if not any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or []):
        raise CannotRotate("the model has no output head to take the last norm: only language models are rotated")
    tied = HEAD not in infos
    if tied and not config.get("tie_word_embeddings", kind in _TIED):
        raise CannotRotate(f"the model has no tensor `{HEAD}`")
    roles = {name: role for name, info in infos.items() if (role := _role(info)) is not None}
    if tied:
        roles[HEAD] = Role(reads=True, norm=LAST_NORM)
    for name in {EMBEDDING, LAST_NORM, *(role.norm for role in roles.values() if role.norm)}:
        if name not in infos:
            raise CannotRotate(f"the model has no tensor `{name}`")
    width, heads = infos[EMBEDDING].shape[-1], config.get("num_attention_heads")
    inner = next((infos[n].shape[-1] for n, r in roles.items() if r.heads == "in" and n in infos), 0)
    if not isinstance(heads, int) or heads < 1 or inner < heads or inner % heads:
        raise CannotRotate("the config has no valid `num_attention_heads`")
    head = inner // heads
    for name in roles.keys() & infos.keys():
        roles[name] = _sized(infos[name], roles[name], width, inner, head)
    return Layout(roles, width, head, tied, kind in _SHIFTED)


def _refuse_unknown(kind: str, names: Collection[str]) -> None:
    if kind in _ROTATABLE:
        return
    for pattern, reason in _REASONS:
        if found := next((name for name in names if re.search(pattern, name)), None):
            raise CannotRotate(f"a `{kind}` model {reason}: see `{found}`")
    raise CannotRotate(f"how a `{kind}` model uses its residual stream is not known to tcw")


def _role(info: TensorInfo) -> Role | None:
    if info.name in _OUTER:
        return _OUTER[info.name]
    if match := _LAYER.fullmatch(info.name):
        for pattern, role in _ROLES:
            if re.fullmatch(pattern, match[2]):
                return replace(role, norm=match[1] + role.norm) if role and role.norm else role
    raise CannotRotate(f"what tensor `{info.name}` does with the residual stream is not known to tcw")


def _sized(info: TensorInfo, role: Role, width: int, inner: int, head: int) -> Role:
    """The role with the row where values begin. Raises CannotRotate when the tensor has not the shape it needs."""
    shape = info.shape or (0,)
    fused = info.name.endswith(".qkv_proj.weight")
    first = shape[0] - (shape[0] - inner) // 2 if fused else 0
    fits = (
        len(info.shape) == (1 if role.is_norm or info.name.endswith(".bias") else 2),
        not (role.reads or role.is_norm) or shape[-1] == width,
        not role.writes or shape[0] == width,
        role.heads != "in" or shape[-1] == inner,
        role.heads != "out" or (shape[0] > first and first % head == 0 and (shape[0] - first) % head == 0),
    )
    if not all(fits):
        raise CannotRotate(f"tensor `{info.name}` is {list(info.shape)}, which does not fit the others")
    if info.dtype not in _DTYPES:
        raise CannotRotate(f"tensor `{info.name}` is {info.dtype}; only BF16, F16 and F32 are rotated")
    return replace(role, first=first)
