"""Token policies as part of a recipe: checked before the work, planned, and stored when the weights are done."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tcw.artifact import Artifact
from tcw.calibration import Settings, images
from tcw.errors import UsageError
from tcw.policies import named
from tcw.recipe import Step
from tcw.runtime.load import load, skeleton
from tcw.tokens import stored
from tcw.tokens.engine import TokenPolicy
from tcw.tokens.flops import Outlook, costs_of
from tcw.tokens.flops import outlook as foreseen
from tcw.tokens.shape import TEXT, inner_of, kind_of, shape_of, tower_of

if TYPE_CHECKING:
    from tcw.source import Source


def outlined(source: "Source", steps: tuple[Step, ...]) -> TokenPolicy:
    """The policy that steps make together, not calibrated.

    Raises UsageError where they do not go together or do not fit the model.
    """
    methods = named(steps)
    spans = {getattr(method, "span", "visual") for method in methods.values()}
    if len(spans) > 1:
        raise UsageError("one policy cuts visual tokens and another one text: that does not go together", "give one")
    model = skeleton(source)
    if spans == {"visual"} and kind_of(model) == TEXT:
        inner_of(model)  # says that there are no images
    return TokenPolicy(methods, shape_of(model))


def outlook(source: "Source", policy: TokenPolicy) -> Outlook:
    """What a policy leaves of one image, and of the prefill of a prompt with it."""
    return foreseen(policy, costs_of(skeleton(source)))


def calibration_images(source: "Source", policy: TokenPolicy, settings: Settings) -> list[np.ndarray] | None:
    """The pictures that a policy will be calibrated on; None if it needs none.

    Raises SourceError, MissingDependency.
    """
    if not any(method.needs_calibration for method in policy.methods.values()):
        return None
    return images.read_images(settings.images)


def write(
    artifact: Artifact, policy: TokenPolicy, pictures: list[np.ndarray] | None, device: str
) -> list[dict[str, Any]]:
    """Calibrate a policy on the artifact's own weights, write what it learned there, and return its entries.

    Raises UsageError, SourceError: the policy does not fit the model, or what it learned are no numbers.
    """
    if pictures is None:
        return stored.store(policy, None, Path(artifact.path))
    model = load(artifact, residency="bf16", device=device)
    tower = tower_of(model)
    ready = images.prepared(pictures, artifact.path, tower.config)
    policy = TokenPolicy(policy.methods, shape_of(model)).calibrated(model, ready)
    for name, tensors in policy.learned.items():
        if bad := [key for key, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]:
            raise UsageError(f"`{name}` learned no number: `{bad[0]}` is not finite", "give other pictures")
    return stored.store(policy, model, Path(artifact.path))
