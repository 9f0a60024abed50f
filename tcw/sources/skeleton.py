"""The module tree of a model, made from its config alone: which tensor belongs to which kind of module, and its shape.

The model is built on torch's meta device, so it takes no memory for weights. Names of a checkpoint are followed through
the renamings that transformers does on loading.
"""

from pathlib import Path
from typing import Any

from tcw.errors import SourceError


class Skeleton:
    """Parameters of a model without their values, by name.

    Attributes:
        shapes: parameter name -> shape.
        kinds: parameter name -> "linear", "embedding" or "other": what owns it.
        tied: names of parameters that are one and the same under several names.
        containers: paths of module lists; these are never called themselves.
    """

    def __init__(self, model: Any) -> None:
        """Take what matters from a transformers model, which may be on the meta device."""
        from torch import nn
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.shapes: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, str] = {}
        names: dict[int, list[str]] = {}
        modules = dict(model.named_modules())
        for name, parameter in model.named_parameters(remove_duplicate=False):
            owner, _, leaf = name.rpartition(".")
            module = modules.get(owner)
            kind = {nn.Linear: "linear", nn.Embedding: "embedding"}
            self.kinds[name] = next((k for t, k in kind.items() if isinstance(module, t) and leaf == "weight"), "other")
            self.shapes[name] = tuple(parameter.shape)
            names.setdefault(id(parameter), []).append(name)
        self.tied = {name for same in names.values() if len(same) > 1 for name in same}
        self.containers = {path for path, m in modules.items() if isinstance(m, nn.ModuleList | nn.ModuleDict)}
        self._known = dict.fromkeys(self.shapes) | dict.fromkeys(name for name, _ in model.named_buffers())
        self._prefix = model.base_model_prefix
        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        first: dict[str, int] = {}  # stacked experts stand together, so that the checkpoint's order of them counts
        self._order = {
            name: first.setdefault(name.rpartition(".")[0] if len(shape) == 3 else name, k)
            for k, (name, shape) in enumerate(self.shapes.items())
        }

    def find(self, name: str) -> str | None:
        """The parameter that tensor `name` of a checkpoint becomes, or becomes a part of; None if there is none."""
        from transformers.core_model_loading import rename_source_key

        for key in (name, self.full(name), rename_source_key(name, self._renamings, self._converters)[0]):
            if key in self.shapes:
                return key
            if (key := self.full(key)) in self.shapes:
                return key
        return None

    def full(self, name: str) -> str:
        """`name` with the base model's prefix, where the checkpoint left that out."""
        prefixed = f"{self._prefix}.{name}"
        return prefixed if name not in self._known and prefixed in self._known else name

    def place(self, name: str) -> int:
        """Where a tensor stands in the model's own order."""
        return self._order.get(self.find(name) or "", len(self._order))

    def shape(self, name: str, numel: int) -> tuple[int, ...] | None:
        """Shape of tensor `name` of a checkpoint, which has `numel` elements; None when the config does not say.

        The matrix of one expert, which transformers stacks with the others, has the stack's last dimension.
        """
        found = self.find(name)
        if found is None:
            return None
        shape = self.shapes[found]
        if len(shape) == 3 and ".experts." in name and shape[-1] and numel % shape[-1] == 0:
            shape = (numel // shape[-1], shape[-1])
        rows = 1
        for size in shape:
            rows *= size
        return shape if rows == numel else None


def of_folder(path: Path, id: str) -> Skeleton:
    """Build the skeleton of the model whose config.json lies in `path`. Raises SourceError when transformers cannot."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        named = (getattr(transformers, name, None) for name in config.architectures or [])
        cls: Any = next((c for c in named if isinstance(c, type)), None)
        make = cls._from_config if cls else transformers.AutoModel.from_config
        with torch.device("meta"):
            model = make(config, dtype=torch.bfloat16)
        model.tie_weights()
        return Skeleton(model)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"transformers cannot make the model of `{id}` from its config: {line}",
            "the DFloat11 layout names modules and leaves out shapes: it needs an architecture of transformers",
        ) from None
