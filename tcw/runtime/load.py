"""Load any model that tcw reads: a plain folder, an artifact, a DF11 folder, a converted GGUF."""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tcw import policies
from tcw.artifact import QUANT_METHOD, Artifact
from tcw.device import Device, pick
from tcw.errors import SourceError, UnknownName, UsageError
from tcw.runtime import residency as residencies
from tcw.runtime.quantizer import TcwConfig
from tcw.runtime.state import lazy_state_dict
from tcw.source import Source, open_source

_HOW = {"form", "mixed", "scratch", "head", "overlap"}
_log = logging.getLogger("tcw")


def load(
    model: str | Path | Source,
    *,
    residency: str = residencies.AUTO,
    device: str = "auto",
    dtype: torch.dtype | str | None = None,
    auto_class: Any = None,
    trust_remote_code: bool = False,
    quantize_activations: bool = True,
    **how: Any,
) -> Any:
    """Load a model for inference; its tensors are read, decoded and placed one at a time.

    Args:
        model: whatever `tcw` takes as a MODEL, or an opened Source.
        residency: where weights live, "auto", "bf16", "huffman", "packed" or "offload": see tcw/runtime/residency.py.
        device: "auto", "cpu", "cuda", "cuda:1", "mps"; "auto" spreads a model that one GPU cannot hold.
        dtype: cast floating tensors to it; by default the model's own.
        auto_class: an auto or model class of transformers, or its name; by default the one config.json names.
        trust_remote_code: run the Python code that comes with the model.
        quantize_activations: in "packed", round the inputs of layers where their method (fp8) says so.
        how: more of what `TcwConfig` takes: form, mixed, scratch, head, overlap.

    Returns:
        A transformers.PreTrainedModel in eval mode. Lossless weights are the bits that were stored, in every residency.

    Raises:
        SourceError, FormatError: the model cannot be read, or transformers has no class for it.
        UsageError: residency, device or class make no sense here.
        ResourceError: the device's memory is too small for this residency.
    """
    residencies.check(residency)
    source = model if isinstance(model, Source) else open_source(model)
    config = _config(source, trust_remote_code)
    cls = _model_class(source, config, auto_class, trust_remote_code)
    wanted = _dtype(dtype)
    if source.quantized_by:
        residency = _only_bf16(residency, source)
    if unknown := sorted(set(how) - _HOW):
        raise TypeError(f"load() got an unexpected keyword argument '{unknown[0]}'")
    picked = pick(device)
    choice = residencies.settle(residency, source, wanted, _places(picked, device))
    residency, how = choice.residency, {"mixed": choice.mixed, **how}
    kept = TcwConfig(residency=residency, quantize_activations=quantize_activations, **how)
    device_map = _device_map(source, picked, device, residencies.loaded_bytes(source, wanted, residency), residency)
    with residencies.fitting(residency):
        loaded = cls.from_pretrained(
            None,
            config=config,
            state_dict=lazy_state_dict(source, residency, gpu=residencies.first_gpu(_places_of(device_map))),
            dtype=wanted or "auto",
            device_map=device_map,
            quantization_config=None if residency == residencies.BF16 else kept,
        )
    loaded.tcw_residency = residency
    loaded.name_or_path = loaded.config.name_or_path = source.id
    _set_generation(loaded, source)
    if isinstance(source, Artifact):
        policies.attach(loaded, source)
    return loaded


def skeleton(source: Source) -> Any:
    """The model without weights, on the device "meta". Raises SourceError where transformers has no class for it."""
    config = _config(source, trust_remote_code=False)
    with torch.device("meta"):
        return _model_class(source, config, None, trust_remote_code=False)(config)


def tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that lies beside the model. Raises SourceError when there is none."""
    try:
        return transformers.AutoTokenizer.from_pretrained(str(source.path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        _log.info("the tokenizer of %s: %s", source.id, error)
        raise SourceError(
            f"`{source.id}` has no tokenizer that transformers can load",
            "put the original model's tokenizer files beside its weights; `-v` shows what transformers says",
        ) from None


def _config(source: Source, trust_remote_code: bool) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(str(source.path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"transformers cannot read the config of `{source.id}`: {_first_line(error)}") from None
    mark = getattr(config, "quantization_config", None)
    if isinstance(mark, dict) and mark.get("quant_method") == QUANT_METHOD:
        del config.quantization_config
    return config


def _model_class(source: Source, config: Any, auto_class: Any, trust_remote_code: bool) -> Any:
    """The class to make: what the caller says, else what config.json says, else transformers' base model."""
    if isinstance(auto_class, str):
        name, auto_class = auto_class, getattr(transformers, auto_class, None)
        if not isinstance(auto_class, type):
            raise UnknownName(
                "class in transformers", name, [n for n in dir(transformers) if n.startswith("AutoModel")]
            )
    remote = getattr(config, "auto_map", None) or {}
    auto_name = auto_class.__name__ if auto_class else next((n for n in remote if n.startswith("AutoModel")), "")
    if trust_remote_code and auto_name in remote:
        return get_class_from_dynamic_module(remote[auto_name], str(source.path))
    if auto_class is not None and not hasattr(auto_class, "_model_mapping"):
        return auto_class
    if auto_class is None:
        for name in config.architectures or []:
            if isinstance(found := getattr(transformers, name, None), type):
                return found
        auto_class = transformers.AutoModel
    if type(config) not in auto_class._model_mapping:
        raise SourceError(
            f"{auto_class.__name__} has no class for `{config.model_type}`, the type of `{source.id}`",
            "pass another `auto_class`, or `trust_remote_code=True` if the model brings its own code and you trust it",
        )
    found = auto_class._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _only_bf16(residency: str, source: Source) -> str:
    """What another tool has quantised goes through transformers' own code for that tool."""
    if residency in (residencies.HUFFMAN, residencies.PACKED, residencies.OFFLOAD):
        raise UsageError(f"`{source.id}` is quantised by {source.quantized_by}", "load it with `residency='bf16'`")
    return residencies.BF16


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype if isinstance(dtype, torch.dtype) else None
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"torch has no dtype `{dtype}`", "use `bfloat16`, `float16` or `float32`")
    return found


def _places(picked: Device, asked: str) -> list[str]:
    """The devices that the model may go to: all GPUs where nobody named one."""
    if picked.kind == "cuda" and asked == "auto":
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [picked.torch_name]


def _device_map(source: Source, picked: Device, asked: str, need: int, residency: str) -> Any:
    """Where to put the model, as transformers wants to hear it: {"": device}, "auto", or None for the CPU."""
    if picked.kind == "cpu":
        return None
    if asked == "auto" and residency != residencies.OFFLOAD and need > 0.9 * picked.free_bytes:
        _log.info("the model does not fit on %s: accelerate spreads it", picked.name)
        return "auto"
    return {"": picked.torch_name}


def _places_of(device_map: Any) -> list[Any]:
    """The devices of a map as transformers takes it; "auto" is accelerate's word for GPUs."""
    if isinstance(device_map, dict):
        return list(device_map.values())
    return ["cpu" if device_map is None else "cuda"]


def _set_generation(model: Any, source: Source) -> None:
    """Give a model that generates the settings that lie beside it, as from_pretrained does for a folder."""
    if not model.can_generate():
        return
    config = transformers.GenerationConfig
    try:
        model.generation_config = config.from_pretrained(str(source.path))
    except OSError:  # older models keep these settings in config.json
        model.generation_config = config.from_pretrained(
            str(source.path), config_file_name="config.json", _from_model_config=True
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
