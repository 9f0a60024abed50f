"""KV policies as part of a recipe: checked before the work, planned, and stored when the weights are done."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tcw.artifact import Artifact
from tcw.calibration import Settings, texts
from tcw.errors import UsageError
from tcw.kv import KVMethod, stored
from tcw.kv.calibrate import calibrated
from tcw.kv.policy import Policy
from tcw.kv.shapes import shapes_of, shapes_of_config
from tcw.policies import named
from tcw.profile.kv import generates, read_config
from tcw.recipe import Step

if TYPE_CHECKING:
    from tcw.source import Source

_DTYPES = {"float32": torch.float32, "float16": torch.float16}


def outlined(source: "Source", steps: tuple[Step, ...]) -> Policy:
    """The policy that steps make together, not calibrated: what it will hold can be planned.

    Raises UsageError where they do not go together or do not fit the model.
    """
    methods = {name: method for name, method in named(steps).items() if isinstance(method, KVMethod)}
    config = read_config(source.config)
    if not generates(config):
        raise UsageError(f"`{source.id}` generates no text and has no KV cache", "leave out the KV policies")
    return Policy(methods, shapes_of_config(config, dtype_of(config)))


def dtype_of(config: Any) -> torch.dtype:
    """What a model's keys and values are computed in when it is loaded as it is: its own dtype, else BF16."""
    dtype = getattr(config.get_text_config(decoder=True), "dtype", None) or getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else _DTYPES.get(str(dtype), torch.bfloat16)


@dataclass(frozen=True)
class Text:
    """What a policy is calibrated on: tokens, int64 [sequences, length], and what made them."""

    tokens: np.ndarray
    tokenizer: Any


def calibration_text(source: "Source", policy: Policy, settings: Settings) -> Text | None:
    """What the policy will be calibrated on; None if it needs no text.

    Raises SourceError: no tokenizer, or the text is too short or no text.
    """
    from tcw.runtime.load import tokenizer

    if not any(method.reads_text() for method in policy.methods.values()):
        return None
    own = tokenizer(source)
    return Text(texts.sequences(own, texts.read_texts(settings.text), settings.samples, settings.length), own)


def write(artifact: Artifact, policy: Policy, text: Text | None, device: str) -> list[dict[str, Any]]:
    """Calibrate a policy on the artifact's own weights, write what it measured there, and return its entries.

    Raises UsageError, SourceError: the policy does not fit the model, or its measurements are no numbers.
    """
    model = None
    if any(method.needs_calibration for method in policy.methods.values()):
        from tcw.runtime.load import load

        model = load(artifact, residency="bf16", device=device)
        tokens = None if text is None else torch.from_numpy(text.tokens)
        tokenizer = None if text is None else text.tokenizer
        policy = calibrated(Policy(policy.methods, shapes_of(model)), model, tokens, tokenizer=tokenizer)
    return stored.store(policy, model, Path(artifact.path))
