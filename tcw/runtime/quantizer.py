"""The hook in transformers: a registered quantizer that lets from_pretrained read an artifact.

transformers has a public place for a quantizer's own modules, conversions and clean-up, and this one uses them. It has
none for tensors that a quantizer reads itself, between "the model's skeleton stands" and "the checkpoint's files are
opened": a renaming or merging of experts would have to be taught the parts of every method. So one function is
wrapped, `PreTrainedModel._load_pretrained_model`, which already takes a state dict instead of files: for a model of
this quantizer it gets a lazy one with the original names. A second one, which merges configurations, would ignore a
TcwConfig that is passed to from_pretrained. For all other models the wrappers do nothing.
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
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from tcw import policies
from tcw.artifact import FORMAT, MANIFEST, QUANT_METHOD, Artifact, plain_name, read_manifest
from tcw.errors import FormatError, SourceError, TcwError, UnknownName, UsageError
from tcw.runtime import blocks, linear, residency
from tcw.runtime.options import AUTO, FORMS, Options
from tcw.runtime.packed import TORCH_DTYPES
from tcw.runtime.state import lazy_state_dict, pack_tensor, shell
from tcw.units import show_bytes

_log = logging.getLogger("tcw")
_EXPECTED = ["model", "state_dict", "checkpoint_files", "load_config"]
_PLAIN = "load the model with `residency='bf16'`"


class TcwConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of an artifact: where its weights live once they are loaded, and how they are read.

    Attributes:
        residency: one of tcw/runtime/residency.py.
        quantize_activations: in `packed`, round the inputs of layers where their method (fp8) says so.
        form: in `packed`, of BF16 weights: "p4", 12 bits a weight, or "p3", 11.4 bits.
        mixed: in `packed`, layers that are measured to be slower packed stay BF16.
        scratch, head, overlap: in `huffman` and `offload` on a GPU, see `options.Options`.
    """

    def __init__(
        self,
        format_version: str = FORMAT,
        residency: str = residency.AUTO,
        quantize_activations: bool = True,
        form: str = "p4",
        scratch: int | None = None,
        head: str = AUTO,
        overlap: bool = True,
        mixed: bool = False,
        **kwargs: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.residency = residency
        self.quantize_activations = quantize_activations
        self.form, self.scratch, self.head, self.overlap, self.mixed = form, scratch, head, overlap, mixed
        self.dtype = kwargs.get("dtype")


class Pack(ConversionOps):  # type: ignore[misc]
    """The last step of loading one parameter: keep it compressed.

    On a GPU, what came as it is stored, or unread, stays a `Quantized` until the model is made ready.
    """

    def __init__(self, *, on_gpu: bool = False) -> None:
        self._on_gpu = on_gpu

    def convert(self, input_dict: dict[str, Any], *, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Compress each parameter, after transformers has renamed, merged and cast it."""
        return {name: self._pack(name, value, model) for name, value in input_dict.items()}

    def _pack(self, name: str, value: Any, model: Any) -> torch.nn.Parameter:
        tensor = value[0] if isinstance(value, list) else value
        expected = model.get_parameter_or_buffer(name).shape
        if tensor.shape != expected:
            raise FormatError(f"`{name}` has the shape {list(tensor.shape)}, the model wants {list(expected)}")
        packed = (shell if self._on_gpu else pack_tensor)(name, tensor)
        return torch.nn.Parameter(packed, requires_grad=False)


class TcwQuantizer(HfQuantizer):  # type: ignore[misc]
    """Reads tcw artifacts. With the residency "bf16" the loaded model is an ordinary one and forgets this class."""

    def __init__(self, quantization_config: TcwConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = False  # what transformers gets to see are the decoded tensors
        self.residency, self.mixed = quantization_config.residency, quantization_config.mixed
        self.gpu: torch.device | None = None
        self.is_placed = False
        self._artifact: Artifact | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse options that do not exist. Raises UsageError."""
        config = self.quantization_config
        residency.check(config.residency)
        Options(config.scratch, config.head, config.overlap)
        if config.form not in FORMS:
            raise UnknownName("form", str(config.form), FORMS)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes a value of a parameter on its device, to spread a model, and to set memory aside before it is loaded.

        For `packed` nothing is set aside: quantised weights take less than packed ones, and what fits would not.
        """
        packed = 0.0 if self.is_placed else 0.76
        share = {residency.HUFFMAN: 0.68, residency.PACKED: packed, residency.OFFLOAD: 0.0}.get(self.residency, 1.0)
        return param.element_size() * (share if param.dim() > 1 else 1.0)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Mend what transformers guesses from the stored parts when config.json does not name a dtype."""
        if dtype.is_floating_point:
            return dtype
        return TORCH_DTYPES.get(self.quantization_config.dtype or "", torch.float32)

    def state_dict(self, model: Any, files: list[str], load_config: Any) -> dict[str, Any]:
        """The artifact's tensors; settles where they will live."""
        self._artifact = source = Artifact.open(_folder(files, load_config))
        choice = residency.settle(self.residency, source, load_config.dtype, self.places(load_config))
        self.residency, self.mixed = choice.residency, choice.mixed or self.mixed
        return lazy_state_dict(source, self.residency, gpu=self.gpu)

    def places(self, load_config: Any) -> list[Any]:
        """The devices that the model goes to; notes whether they decode weights themselves."""
        places = list((load_config.device_map or {"": "cpu"}).values())
        self.gpu, self.is_placed = residency.first_gpu(places), True
        return places

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Say whether a parameter is to stay compressed: weights in the dtype that the model is loaded in."""
        if self.residency not in (residency.HUFFMAN, residency.OFFLOAD):
            return False
        parameter = model.get_parameter_or_buffer(param_name)
        is_weight = isinstance(parameter, torch.nn.Parameter) and parameter.dim() > 1
        return is_weight and parameter.dtype == model.config.dtype

    def get_quantize_ops(self) -> Pack:
        """What transformers runs on a parameter that is to stay compressed."""
        return Pack(on_gpu=self.gpu is not None)

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        """Make the model ready: an ordinary one, one of quantised layers, or one that decodes itself by blocks."""
        with residency.fitting(self.residency):
            self._settle(model, **kwargs)
        model.tcw_residency = self.residency
        if self._artifact is not None:
            policies.attach(model, self._artifact)

    def _settle(self, model: Any, **kwargs: Any) -> None:
        if self.residency not in (residency.HUFFMAN, residency.PACKED, residency.OFFLOAD):
            self.remove_quantization_config(model)
            return
        super().postprocess_model(model, **kwargs)
        if self.residency == residency.PACKED:
            self._pack(model)
            stay = blocks.attach(model) > 0
        elif self.gpu is not None:
            from tcw.runtime import resident  # with the codec's compiler

            config, offload = self.quantization_config, self.residency == residency.OFFLOAD
            resident.attach(model, Options(config.scratch, config.head, config.overlap, offload))
            stay = True
        else:
            stay = blocks.attach(model) > 0
        if stay:
            model._apply = functools.partial(_refuse_to_move, model)

    def _pack(self, model: Any) -> None:
        config, tune = self.quantization_config, None
        if self.gpu is not None:
            from tcw.runtime import tuning  # with the kernels

            tune = tuning.tune(config.form, mixed=self.mixed)
        done = linear.attach(model, quantize_activations=config.quantize_activations, form=config.form, tune=tune)
        facts = (done.layers, show_bytes(done.nbytes), done.coded, done.decoded)
        _log.info("residency packed: %d layers hold %s; decoded when used: %d weights, at load: %d", *facts)

    def is_serializable(self) -> bool:
        """Raise UsageError: what stays compressed in memory cannot be saved from there."""
        raise UsageError("a model whose weights stay compressed cannot be saved", _PLAIN + ", or use `tcw export`")

    @property
    def is_trainable(self) -> bool:
        """Compressed weights cannot be trained."""
        return False


def _refuse_to_move(model: Any, change: Any, recurse: bool = True) -> Any:
    """Stand in for Module._apply, which `to`, `cuda`, `half` and the like end in: pass only what changes nothing."""
    probe = change(torch.empty(0, dtype=model.dtype, device=model.device))
    if probe.dtype == model.dtype and probe.device == model.device:
        return model
    here = "the CPU" if model.device.type == "cpu" else model.device
    raise UsageError(f"the weights stay compressed on {here} and cannot become {probe.dtype} on {probe.device}", _PLAIN)


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
        if not isinstance(quantizer, TcwQuantizer):
            return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        residency.check_places(quantizer.residency, quantizer.places(load_config))
        if state_dict is None and checkpoint_files:
            state_dict, checkpoint_files = quantizer.state_dict(model, checkpoint_files, load_config), None
        if quantizer.residency in (residency.AUTO, residency.BF16):  # from here on the load of an ordinary model
            load_config = dataclasses.replace(load_config, hf_quantizer=None)
        with residency.fitting(quantizer.residency):
            return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    return wrapper


def _merging(merge: Any) -> Any:
    """Wrap how two configurations become one: of ours, what is passed to from_pretrained counts, without a warning."""

    @functools.wraps(merge)
    def wrapper(stored: Any, passed: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(passed, TcwConfig) or not isinstance(stored, dict) or stored["quant_method"] != QUANT_METHOD:
            return merge(stored, passed, *args, **kwargs)
        own = {key: stored[key] for key in ("format_version", "dtype") if key in stored}
        return TcwConfig(**{**passed.to_dict(), **own})

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
    AutoHfQuantizer.merge_quantization_configs = staticmethod(_merging(AutoHfQuantizer.merge_quantization_configs))


register()
