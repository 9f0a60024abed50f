"""The residency `packed`: linear layers that multiply with the codes that an artifact stores, or with packed BF16.

    while a model is loaded     Quantized: a stored weight that stands where the parameter will be; it has its shape,
                                and remembers the dtype and the device that it is sent to
    when it is loaded           `attach`: each nn.Linear with such a weight becomes a QuantizedLinear, each nn.Embedding
                                a QuantizedEmbedding; layers that share a weight still do

What has no such form stays right in another way: a weight that a model uses in a way of its own (a subclass that
computes otherwise), and one of a method without a form in memory (quantized.py, lossless.py). On the CPU it stays as it
is stored, and is decoded when its block runs (blocks.py); elsewhere, or cast to another dtype, or where packing does
not pay, it is decoded at load. Experts that transformers merges are decoded at load. In an artifact that has quantised
weights, tensors that no method quantised are plain.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from torch import nn

from tcw.artifact import RAW
from tcw.runtime.packed import Packed, torch_dtype
from tcw.runtime.quantized import QuantizedWeight, build, has_form

Tune = Callable[[tuple[int, int], torch.device], int | None]
LOSSLESS = (RAW, "dfloat11")  # methods whose weights have the bits of the source
_NOTED = (torch.ops.aten._to_copy.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class Quantized(Packed):
    """A stored weight that is being loaded: casts and moves are noted, any other operation decodes it."""

    @staticmethod
    def __new__(cls, store: Any, method: str, dtype: torch.dtype, device: Any = "cpu") -> "Quantized":
        """Make the tensor's shell; it holds no values."""
        place = torch.device(device)
        if place.type == "cuda" and place.index is None:  # a tensor with values would know its number
            place = torch.device("cuda", torch.cuda.current_device())
        return torch.Tensor._make_wrapper_subclass(cls, store.info.shape, dtype=dtype, device=place)

    def __init__(self, store: Any, method: str, dtype: torch.dtype, device: Any = "cpu") -> None:
        super().__init__(store)
        self.method = method  # its canonical name

    def decode(self) -> torch.Tensor:
        """The values, of the dtype and on the device that were noted."""
        return self.store.decode().to(device=self.device, dtype=self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Note a cast; see Packed for the rest."""
        kwargs = kwargs or {}
        if func in _NOTED and (kwargs.get("dtype") or args[0].dtype).is_floating_point:
            weight = args[0]
            return Quantized(
                weight.store, weight.method, kwargs.get("dtype") or weight.dtype, kwargs.get("device") or weight.device
            )
        return super().__torch_dispatch__(func, types, args, kwargs)


class QuantizedLinear(nn.Module):  # type: ignore[misc]
    """A linear layer, y = x Wᵀ + b, whose weight stays quantised; `weight` gives it decoded, each time anew."""

    def __init__(self, quantized: QuantizedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.quantized, self.bias = quantized, bias

    @property
    def weight(self) -> torch.Tensor:
        """W, decoded: [out, in]."""
        return self.quantized.dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.quantized.linear(x, self.bias)

    def extra_repr(self) -> str:
        """What print(model) says of it."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.quantized.nbytes} bytes"


class QuantizedEmbedding(nn.Module):  # type: ignore[misc]
    """A table of embeddings that stays quantised: only rows that are looked up are decoded."""

    def __init__(self, quantized: QuantizedWeight, padding_idx: int | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = quantized.shape
        self.quantized, self.padding_idx = quantized, padding_idx

    @property
    def weight(self) -> torch.Tensor:
        """The table, decoded: [rows, width]."""
        return self.quantized.dense()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Integers [...] -> [..., width]."""
        return self.quantized.rows(ids.reshape(-1)).view(*ids.shape, self.embedding_dim)


@dataclass(frozen=True)
class Attached:
    """What `attach` did: layers that multiply with codes, bytes of those, weights left coded, weights decoded."""

    layers: int
    nbytes: int
    coded: int
    decoded: int


def attach(
    model: nn.Module, *, quantize_activations: bool = True, form: str = "p4", tune: Tune | None = None
) -> Attached:
    """Turn the layers of a model that was loaded with `Quantized` weights into those that multiply with them.

    Args:
        model: as transformers loads it; changed in place.
        quantize_activations: round the inputs of layers where their method says so.
        form: "p4" or "p3", of BF16 weights (kernels/packed_matmul).
        tune: told the shape of a BF16 weight [N, K] of a linear layer and its device, says up to how many rows of x the
            packed weight is multiplied as it is, or None to keep the layer plain. By default 16 rows, and none is.
    """
    swaps: dict[nn.Module, nn.Module] = {}
    size = coded = decoded = 0
    for weight, places in _quantized(model):
        forms = [_form(module, name) for module, name in places]
        lossless_weight = weight.method in LOSSLESS
        built: QuantizedWeight | torch.Tensor | None = None
        if lossless_weight:
            built = _pack(weight, None not in forms, places, form, tune)
        elif has_form(weight.method, weight.device) and None not in forms:
            built = build(weight.method, weight.store, weight.dtype, quantize_activations=quantize_activations)
            built.to(weight.device)
        elif weight.device.type != "cpu" or weight.dtype != torch_dtype(weight.store.info):
            built = weight.decode()
        if isinstance(built, QuantizedWeight):
            size += built.nbytes
            swaps |= {module: form(module, built) for (module, _), form in zip(places, forms, strict=True) if form}
        elif built is not None:
            decoded += 1
            plain = nn.Parameter(built)
            for module, name in places:
                module._parameters[name] = plain
        else:
            coded += 1
    swap(model, swaps)
    return Attached(len(swaps), size, coded, decoded)


def _pack(
    weight: Quantized, fits: bool, places: list[tuple[nn.Module, str]], form: str, tune: Tune | None
) -> QuantizedWeight | torch.Tensor:
    """A BF16 weight packed on its device, or plain where that does not pay."""
    from tcw.runtime import lossless  # with the codec's compiler

    plain = lossless.plain_on_device(weight, weight.method)
    rows: int | None = lossless.MOST_ROWS
    looked_up = any(isinstance(module, nn.Embedding) for module, _ in places)
    if tune is not None and plain.dim() == 2 and not all(isinstance(module, nn.Embedding) for module, _ in places):
        rows = tune((plain.shape[0], plain.shape[1]), weight.device)
    packed = lossless.build(weight.store, plain, form, looked_up=looked_up) if fits and rows is not None else None
    if packed is None or rows is None:
        return plain
    packed.fused_rows = rows
    return packed


def _quantized(model: nn.Module) -> list[tuple[Quantized, list[tuple[nn.Module, str]]]]:
    """Every weight that is quantised, with the places that share it as (module, name)."""
    found: dict[int, tuple[Quantized, list[tuple[nn.Module, str]]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, Quantized):
                found.setdefault(id(parameter), (parameter, []))[1].append((module, name))
    return list(found.values())


def _form(module: nn.Module, name: str) -> Callable[[Any, QuantizedWeight], nn.Module] | None:
    """What can take the place of a module, made from it and its weight; None where it computes in a way of its own."""
    if name == "weight" and type(module).forward is nn.Linear.forward:
        return lambda linear, weight: QuantizedLinear(weight, linear.bias)
    if name == "weight" and type(module).forward is nn.Embedding.forward and module.max_norm is None:
        return lambda table, weight: QuantizedEmbedding(weight, table.padding_idx)
    return None


def swap(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
    """Put new modules in the places of old ones, in the mode and with accelerate's hook that these had."""
    for parent in list(model.modules()):
        for name, old in parent._modules.items():
            if (new := swaps.get(old)) is not None:
                parent._modules[name] = new.train(old.training)
    for old, new in swaps.items():
        if (hook := getattr(old, "_hf_hook", None)) is not None:
            add_hook_to_module(new, hook)
