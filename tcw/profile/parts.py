"""Which part of a model a tensor belongs to, from its name alone, for any architecture that transformers loads.

Names differ from model to model but share a vocabulary, so this is a list of words, most specific first: a norm
inside an attention block is a norm, an embedding called `embed_out` is a head. Experts and their router count as
mlp. State-space and convolution layers mix tokens without attention; they are `other`, as is what no word fits.
"""

import re

PARTS = ("embedding", "attention", "mlp", "norm", "head", "other")

_LAYER = re.compile(r"^(.*?\.\d+)\.")
_TOWER = re.compile(r"(^|\.)(vision\w*|visual|audio\w*|image\w*|encoder|multi_modal_projector|mm_\w+)\.")

# each word is one dotted component of a module's path, lower case
_NORM = re.compile(
    r"\w*norm\w?\d?|\w*layer_?norm\w*|norm_\w+|(\w+_)?ln\d?|ln_\w+|layrnorm|\w+_layrnorm|bn\d*|batch_?norm\w*"
)
_HEAD = re.compile(
    r"lm_head|\w+_lm_head|embed_out|score|(pre_)?classifier\w*|qa_outputs|pooler|vocab_(projector|transform)|"
    r"(visual|text)_projection|\w+_head|heads?|predictions|seq_relationship|logit_\w+"
)
_FIRST_HEAD = ("cls", "output", "proj_out")  # heads only where they begin the name
_EMBEDDING = re.compile(r"\w*embed\w*|wte|wpe|shared|(cls|mask|class)_token")
_CONTAINERS = (
    ("attention", re.compile(r"\w*attn\w*|\w*attention\w*")),
    ("mlp", re.compile(r"\w*mlp\w*|\w*ffn\w*|\w*feed_?forward\w*|\w*experts?|\w*moe\w*|router|densereludense")),
    ("other", re.compile(r"\w*mamba\w*|mixer|\w*ssm\w*|\w*rotary\w*")),
)
_LEAVES = (
    ("attention", re.compile(r"[qkvo]|[qkvo]_proj|w[qkvo]|(w|c_)?qkv(_proj)?|c_attn|query|key|value|query_key_value")),
    ("mlp", re.compile(r"fc\d|(gate|up|down|gate_up)_proj|lin(ear)?[12]|w[123]|wi(_\d)?|c_fc|dense_(h_to_4h|4h_to_h)")),
)
_FIELDS = frozenset({
    "weight", "bias", "weight_g", "weight_v", "running_mean", "running_var", "num_batches_tracked", "gamma", "beta",
    "weight_scale", "weight_scale_inv", "scale", "scales",
})  # fmt: skip


def part_of(name: str) -> str:
    """Return the part, one of PARTS, that the tensor called `name` belongs to."""
    words = name.lower().split(".")
    # a parameter that is no field of a module (`cls_token`, `A_log`) is itself the last word
    words = words[:-1] if len(words) > 1 and words[-1] in _FIELDS else words
    inside = _LAYER.match(name) is not None
    if _NORM.fullmatch(words[-1]):
        return "norm"
    if not inside and (words[0] in _FIRST_HEAD or any(_HEAD.fullmatch(w) for w in words)):
        return "head"
    for table in (_CONTAINERS, _LEAVES):
        for word in reversed(words):
            for part, pattern in table:
                if pattern.fullmatch(word):
                    return part
    if any(_EMBEDDING.fullmatch(w) for w in words):
        return "embedding"
    # bert's blocks call their mlp `intermediate.dense` and `output.dense`
    return "mlp" if inside and {"intermediate", "output"} & set(words) else "other"


def block_of(name: str) -> str:
    """Return the transformer block that a tensor lies in (`model.layers.3`), or its module outside of any block."""
    found = _LAYER.match(name)
    return found.group(1) if found else name.rpartition(".")[0] or name


def is_routed_expert(name: str) -> bool:
    """Say whether a tensor holds routed experts, of which a token uses only some; shared experts are used always."""
    return "experts" in name.lower().split(".")


def is_input_side(name: str) -> bool:
    """Say whether a tensor serves a vision, audio or text encoder, which decoding a token does not read."""
    return _TOWER.search(name.lower()) is not None
