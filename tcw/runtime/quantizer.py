"""The hook in transformers: a registered quantizer that lets from_pretrained read an artifact.

transformers has a public place for a quantizer's own modules, conversions and clean-up, and this one uses them. It has
none for tensors that a quantizer reads itself, between "the model's skeleton stands" and "the checkpoint's files are
opened": a renaming or merging of experts would have to be taught the parts of every method. So one function is
wrapped, `PreTrainedModel._load_pretrained_model`, which already takes a state dict instead of files: for a model of
this quantizer it gets a lazy one with the original names. For all others the wrapper does nothing.
"""

import dataclasses
import functools
import inspect
import logging
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from tcw import policies
from tcw.artifact import FORMAT, MANIFEST, QUANT_METHOD, Artifact, plain_name, read_manifest
from tcw.errors import FormatError, SourceError, TcwError, UsageError
from tcw.runtime import blocks, linear, residency
from tcw.runtime.packed import TORCH_DTYPES
from tcw.runtime.state import lazy_state_dict, pack_tensor
from tcw.units import show_bytes

_log = logging.getLogger("tcw")
_EXPECTED = ["model", "state_dict", "checkpoint_files", "load_config"]
_PLAIN = "load the model with `residency='bf16'`"


class TcwConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of an artifact: where its weights live once they are loaded."""

    def __init__(
        self,
        format_version: str = FORMAT,
        residency: str = residency.AUTO,
        quantize_activations: bool = True,
        **kwargs: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.residency = residency
        self.quantize_activations = quantize_activations
        self.dtype = kwargs.get("dtype")


class Pack(ConversionOps):  # type: ignore[misc]
    """The last step of loading one parameter: keep it compressed."""

    def convert(self, input_dict: dict[str, Any], *, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Compress each parameter, after transformers has renamed, merged and cast it."""
        return {name: self._pack(name, value, model) for name, value in input_dict.items()}

    def _pack(self, name: str, value: Any, model: Any) -> torch.nn.Parameter:
        tensor = value[0] if isinstance(value, list) else value
        expected = model.get_parameter_or_buffer(name).shape
        if tensor.shape != expected:
            raise FormatError(f"`{name}` has the shape {list(tensor.shape)}, the model wants {list(expected)}")
        return torch.nn.Parameter(pack_tensor(name, tensor), requires_grad=False)


class TcwQuantizer(HfQuantizer):  # type: ignore[misc]
    """Reads tcw artifacts. With the residency "bf16" the loaded model is an ordinary one and forgets this class."""

    def __init__(self, quantization_config: TcwConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = False  # what transformers gets to see are the decoded tensors
        self.residency = quantization_config.residency
        self._artifact: Artifact | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a residency that does not exist. Raises UsageError."""
        residency.check(self.quantization_config.residency)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Mend what transformers guesses from the stored parts when config.json does not name a dtype."""
        if dtype.is_floating_point:
            return dtype
        return TORCH_DTYPES.get(self.quantization_config.dtype or "", torch.float32)

    def state_dict(self, model: Any, files: list[str], load_config: Any) -> dict[str, Any]:
        """The artifact's tensors; settles where they will live."""
        self._artifact = source = Artifact.open(_folder(files, load_config))
        device_map = load_config.device_map or {"": "cpu"}
        self.residency = residency.settle(
            self.quantization_config.residency, source, load_config.dtype, list(device_map.values())
        )
        return lazy_state_dict(source, self.residency)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Say whether a parameter is to stay compressed: weights in the dtype that the model is loaded in."""
        if self.residency != residency.HUFFMAN:
            return False
        parameter = model.get_parameter_or_buffer(param_name)
        is_weight = isinstance(parameter, torch.nn.Parameter) and parameter.dim() > 1
        return is_weight and parameter.dtype == model.config.dtype

    def get_quantize_ops(self) -> Pack:
        """What transformers runs on a parameter that is to stay compressed."""
        return Pack()

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        """Make the model ready: an ordinary one, one of quantised layers, or one that decodes itself by blocks."""
        self._settle(model, **kwargs)
        if self._artifact is not None:
            policies.attach(model, self._artifact)

    def _settle(self, model: Any, **kwargs: Any) -> None:
        if self.residency not in (residency.HUFFMAN, residency.PACKED):
            self.remove_quantization_config(model)
            return
        super().postprocess_model(model, **kwargs)
        if self.residency == residency.PACKED:
            done = linear.attach(model, quantize_activations=self.quantization_config.quantize_activations)
            facts = (done.layers, show_bytes(done.nbytes), done.coded, done.decoded)
            _log.info("residency packed: %d layers hold %s; decoded when used: %d weights, at load: %d", *facts)
        if blocks.attach(model):
            model._apply = functools.partial(_refuse_to_move, model)

    def is_serializable(self) -> bool:
        """Raise UsageError: what stays compressed in memory cannot be saved from there."""
        raise UsageError("a model whose weights stay compressed cannot be saved", _PLAIN + ", or use `tcw export`")

    @property
    def is_trainable(self) -> bool:
        """Compressed weights cannot be trained."""
        return False


def _refuse_to_move(model: Any, change: Any, recurse: bool = True) -> Any:
    """Stand in for Module._apply, which `to`, `cuda`, `half` and the like end in: pass only what changes nothing."""
    probe = change(torch.empty(0, dtype=model.dtype))
    if probe.dtype == model.dtype and probe.device == model.device:
        return model
    raise UsageError(
        f"the weights stay compressed on the CPU and cannot become {probe.dtype} on {probe.device}", _PLAIN
    )


def _folder(files: list[str], load_config: Any) -> Path:
    """The artifact's folder. transformers gets only config and weights from the hub; this gets what else is listed."""
    folder, where = Path(files[0]).parent, load_config.pretrained_model_name_or_path
    if not Path(where).is_dir():
        fetch = functools.partial(cached_file, where, **(load_config.download_kwargs or {}))
        try:
            folder = Path(fetch(MANIFEST)).parent
            for name in filter(plain_name, read_manifest(folder).get("files", {})):
                fetch(name)
        except OSError as error:
            raise SourceError(f"cannot get the rest of the artifact `{where}`: {error}") from None
    if not (folder / MANIFEST).is_file():
        raise FormatError(f"`{MANIFEST}` is missing from `{where}`", "compress or fetch the model again")
    return folder


def _feeding(load: Any) -> Any:
    """Wrap the loading of tensors: for an artifact, give it decoded tensors instead of files."""

    @functools.wraps(load)
    def wrapper(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        quantizer = load_config.hf_quantizer
        if isinstance(quantizer, TcwQuantizer):
            if state_dict is None and checkpoint_files:
                state_dict, checkpoint_files = quantizer.state_dict(model, checkpoint_files, load_config), None
            if quantizer.residency in (
                residency.AUTO,
                residency.BF16,
            ):  # from here on this is the load of an ordinary model
                load_config = dataclasses.replace(load_config, hf_quantizer=None)
        return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    return wrapper


def register() -> None:
    """Make transformers know the quantizer; once. Raises TcwError when this version of it is built otherwise."""
    if QUANT_METHOD in AUTO_QUANTIZER_MAPPING:
        return
    load = PreTrainedModel._load_pretrained_model
    if list(inspect.signature(load).parameters)[:4] != _EXPECTED:
        raise TcwError(
            "this version of transformers loads models in a way that tcw does not know",
            "use transformers >= 5.17,<6",
        )
    register_quantization_config(QUANT_METHOD)(TcwConfig)
    register_quantizer(QUANT_METHOD)(TcwQuantizer)
    PreTrainedModel._load_pretrained_model = staticmethod(_feeding(load))


register()
