"""What a model keeps for every token of context, read from its configuration.

    full attention      2 x kv heads x head size elements a layer and token
    sliding, chunked    the same, but for the last window - 1 tokens only, as transformers keeps them
    latent (MLA)        kv_lora_rank + qk_rope_head_dim elements, whatever the number of heads
    linear, conv, SSM   a state of fixed size: nothing per token
    shared, mlp only    nothing: the layer reads another layer's cache, or has no attention

optimum's NormalizedConfigManager knows what each architecture calls its numbers; models that it does not list
are read by the names that transformers uses.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tcw.errors import SourceError

_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForSpeechSeq2Seq", "ForVision2Seq")
_STATE_ONLY = ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "ssm")
_NOTHING = ("moe", "mlp", "dummy")
_SLIDING = ("sliding_attention", "chunked_attention", "hybrid_sliding")


@dataclass(frozen=True)
class LayerGroup:
    """Layers that cache alike: `elements` a token each; `window` limits the tokens kept (None: all)."""

    layers: int
    elements: int
    window: int | None = None


@dataclass(frozen=True)
class KVCache:
    """A model's cache: groups of layers, bytes of one element, and what is not per token."""

    groups: tuple[LayerGroup, ...] = ()
    element_bytes: int = 2
    cross_elements: int = 0
    read_by: str = "config"
    notes: tuple[str, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token adds while no window is full."""
        return self.element_bytes * sum(g.layers * g.elements for g in self.groups)

    @property
    def bytes_per_token_beyond_window(self) -> int:
        """Bytes that one more token adds once all windows are full."""
        return self.element_bytes * sum(g.layers * g.elements for g in self.groups if g.window is None)

    def bytes_at(self, tokens: int, batch: int = 1) -> int:
        """Bytes of the whole cache when each of `batch` sequences has `tokens` tokens."""
        kept = ((g, tokens if g.window is None else min(tokens, g.window - 1)) for g in self.groups)
        return batch * self.element_bytes * sum(g.layers * g.elements * n for g, n in kept)

    def to_json(self) -> dict[str, Any]:
        """The cache under the keys of docs/cli.md and a few more."""
        return {
            "bytes_per_token": self.bytes_per_token,
            "bytes_per_token_beyond_window": self.bytes_per_token_beyond_window,
            "bytes_per_source_token": self.cross_elements * self.element_bytes,
            "element_bytes": self.element_bytes,
            "layers": [{"layers": g.layers, "elements_per_token": g.elements, "window": g.window} for g in self.groups],
            "read_by": self.read_by,
            "notes": list(self.notes),
        }


def read_config(config: dict[str, Any]) -> Any:
    """Make transformers' configuration object of config.json, its defaults filled in.

    A model type that transformers does not know gives a plain namespace with the same attributes.
    """
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        return _namespace(config)
    try:
        return CONFIG_MAPPING[kind].from_dict(config)
    except Exception as error:  # what a config class raises over bad values is anything
        raise SourceError(f"`config.json` is no valid `{kind}` configuration: {error}".splitlines()[0]) from error


def _namespace(value: Any) -> Any:
    return SimpleNamespace(**{k: _namespace(v) for k, v in value.items()}) if isinstance(value, dict) else value


def generates(config: Any) -> bool:
    """Say whether a model has a language-model head: whether it writes tokens one by one."""
    return any(str(name).endswith(_GENERATES) for name in getattr(config, "architectures", None) or ())


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the text decoder."""
    if hasattr(config, "get_text_config"):
        return config.get_text_config(decoder=True)
    return getattr(config, "text_config", config)


def kv_cache(config: Any, element_bytes: int = 2) -> KVCache:
    """Read what a model caches from `config`, as `read_config` makes it."""
    if not generates(config):
        return KVCache(element_bytes=element_bytes, notes=("no language-model head: nothing is cached",))
    text = text_config(config)
    layers = getattr(text, "num_decoder_layers", None) or numbers(text).get("num_layers")
    if not layers:
        return KVCache(element_bytes=element_bytes, notes=("the configuration does not say how many layers there are",))
    configs = layer_configs(text, layers)
    groups: Counter[tuple[int, int | None]] = Counter()
    states = 0
    for kind, layer in zip(_kinds(text, configs), configs, strict=True):
        states += kind in _STATE_ONLY or kind.startswith("hybrid")
        width = 0 if kind in (*_STATE_ONLY, *_NOTHING) else _elements(layer) + _index_elements(kind, layer)
        if width:
            groups[width, _window(kind, layer)] += 1
    cross = layers * _elements(text) if getattr(config, "is_encoder_decoder", False) else 0
    notes = []
    if states:
        notes.append(f"{states} of {layers} layers keep a state of fixed size, which is not counted")
    if cross:
        notes.append("every token of the source adds its cross-attention keys and values once")
    found = tuple(LayerGroup(n, width, window) for (width, window), n in groups.items())
    return KVCache(found, element_bytes, cross, "optimum" if _normalized(text) else "config", tuple(notes))


def numbers(text: Any) -> dict[str, int]:
    """Layers, heads, key-value heads and hidden size under optimum's names, whatever the config calls them."""
    normalized = _normalized(text)
    found = {}
    for key, names in _NAMES.items():
        value = getattr(normalized, key, None) if normalized else None
        for name in names if value is None else ():
            value = _get(text, name) if value is None else value
        if isinstance(value, int) and not isinstance(value, bool):
            found[key] = value
    return found


_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "multi_query_group_num"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
}


def _normalized(text: Any) -> Any:
    from optimum.utils import NormalizedConfigManager

    try:
        return NormalizedConfigManager.get_normalized_config_class(getattr(text, "model_type", ""))(text)
    except KeyError:
        return None


def _get(config: Any, name: str) -> Any:
    # a configuration whose layers differ refuses to give one number for all
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def layer_configs(text: Any, layers: int) -> list[Any]:
    """The configuration of each layer: they may differ."""
    try:
        found = list(text.per_layer_config)
    except Exception:  # older transformers, plain namespaces, models that are built otherwise
        found = []
    return found if len(found) == layers else [text] * layers


def _kinds(text: Any, configs: list[Any]) -> list[str]:
    """The kind of every layer, in the words of transformers' `layer_types`."""
    kinds = [str(k) for k in _get(text, "layer_types") or _get(text, "layers_block_type") or ()]
    if len(kinds) != len(configs):
        kinds = [_kind(layer) for layer in configs]
    shared = _get(text, "kv_sharing_modes")
    if shared:
        return ["dummy" if mode == "reuse" else kind for kind, mode in zip(kinds, shared, strict=True)]
    reused = _get(text, "num_kv_shared_layers") or 0
    return kinds[: len(kinds) - reused] + ["dummy"] * reused


def _kind(layer: Any) -> str:
    if numbers(layer).get("num_attention_heads") is None and _get(layer, "kv_lora_rank") is None:
        return "linear_attention"
    if _get(layer, "sliding_window") is not None:
        return "sliding_attention"
    return "chunked_attention" if _get(layer, "attention_chunk_size") is not None else "full_attention"


def _window(kind: str, layer: Any) -> int | None:
    if kind not in _SLIDING:
        return None
    return _get(layer, "attention_chunk_size" if kind == "chunked_attention" else "sliding_window")


def _elements(layer: Any) -> int:
    """Elements that one attention layer caches for a token."""
    rank = _get(layer, "kv_lora_rank")
    if rank:
        return int(rank) + int(_get(layer, "qk_rope_head_dim") or 0)
    heads, size = kv_heads(layer), head_size(layer)
    return heads * (size + int(_get(layer, "v_head_dim") or size))


def _index_elements(kind: str, layer: Any) -> int:
    return int(_get(layer, "index_head_dim") or 0) if kind == "indexed_attention" else 0


def kv_heads(layer: Any) -> int:
    """Heads of keys and values; falcon and its like have one, or as many as there are heads."""
    known = numbers(layer)
    heads = known.get("num_attention_heads", 0)
    if _get(layer, "model_type") == "falcon":
        return 1 if _get(layer, "multi_query") and not _get(layer, "new_decoder_architecture") else heads
    return known.get("num_key_value_heads") or heads


def head_size(layer: Any) -> int:
    """Elements of one attention head."""
    known = numbers(layer)
    named: Iterable[Any] = (_get(layer, n) for n in ("head_dim", "d_kv", "kv_channels", "attention_head_dim"))
    size = next((int(v) for v in named if v), 0)
    return size or known.get("hidden_size", 0) // max(1, known.get("num_attention_heads", 1))
