"""Policies of a recipe, of any family: what applies when the model runs. Stored beside the weights, and attached.

    kv       what the cache holds                                                         tcw/kv/passes.py
    tokens   which visual tokens the model goes on with                                   tcw/tokens/passes.py
    prompt   which tokens of a long text: methods that cut inside the model, the same way tcw/tokens/passes.py

All else of the family `prompt` works on text, before there is a model: `tcw prompt`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tcw import methods
from tcw.artifact_policies import WHAT, families
from tcw.errors import UsageError
from tcw.recipe import Step

if TYPE_CHECKING:
    from tcw.artifact import Artifact
    from tcw.artifact_writer import StorePolicies
    from tcw.calibration import Settings
    from tcw.kv.plan import Plan as KVPlan
    from tcw.kv.policy import Policy
    from tcw.source import Source
    from tcw.tokens.engine import TokenPolicy
    from tcw.tokens.flops import Outlook

KV_CONTEXT = 4096  # tokens that a plan counts the bytes of


def is_policy(step: Step) -> bool:
    """Whether a step is a policy, and no method for weights.

    Raises UsageError for a method that compresses text: it has no place in an artifact.
    """
    family = methods.family_of(step.method)
    if family == "prompt" and not hasattr(methods.get(step.method), "stages"):
        raise UsageError(
            f"`{step.method}` compresses text, not a model", f"`tcw prompt FILE --method {step.method} --rate 0.5`"
        )
    return family != "weights"


def named(steps: tuple[Step, ...]) -> dict[str, methods.Method]:
    """The policies of steps by their plain names. Raises UsageError for one that is given twice, or given tensors."""
    found: dict[str, methods.Method] = {}
    for step in steps:
        method = step.build()
        name = step.method.removeprefix(f"{method.family}.")
        if step.only or step.skip:
            what = WHAT[method.family]
            raise UsageError(f"`{step.method}` is a {what}: it has no tensors to `only` take or `skip`")
        if name in found:
            raise UsageError(f"`{step.method}` is given twice")
        found[name] = method
    return found


@dataclass(frozen=True)
class Policies:
    """The policies of a recipe for one model, checked; not calibrated."""

    kv: "Policy | None" = None
    tokens: "TokenPolicy | None" = None

    @classmethod
    def of(cls, source: "Source", steps: tuple[Step, ...]) -> "Policies":
        """Put policies together for a model that was not loaded.

        Raises UsageError where they do not go together or do not fit the model.
        """
        kv = tuple(step for step in steps if methods.family_of(step.method) == "kv")
        rest = tuple(step for step in steps if step not in kv)
        made_kv = made_tokens = None
        if kv:
            from tcw.kv import passes as kv_passes

            made_kv = kv_passes.outlined(source, kv)
        if rest:
            from tcw.tokens import passes as token_passes

            made_tokens = token_passes.outlined(source, rest)
        return cls(made_kv, made_tokens)

    def kv_plan(self) -> "KVPlan | None":
        """What the cache will hold of KV_CONTEXT tokens."""
        return self.kv.plan(KV_CONTEXT) if self.kv else None

    def outlook(self, source: "Source") -> "Outlook | None":
        """What the token policy will leave of an image, and of the work."""
        if self.tokens is None:
            return None
        from tcw.tokens import passes

        return passes.outlook(source, self.tokens)

    def storing(self, source: "Source", settings: "Settings") -> "StorePolicies | None":
        """What stores them once the weights are written; what they calibrate on is read now: a bad file shows early."""
        kv = _kv_storing(source, self.kv, settings) if self.kv else None
        tokens = _token_storing(source, self.tokens, settings) if self.tokens else None
        if kv is None and tokens is None:
            return None
        return lambda artifact: [entry for write in (kv, tokens) if write for entry in write(artifact)]


def _kv_storing(source: "Source", policy: "Policy", settings: "Settings") -> "StorePolicies":
    from tcw.kv import passes

    text = passes.calibration_text(source, policy, settings)
    return lambda artifact: passes.write(artifact, policy, text, settings.device)


def _token_storing(source: "Source", policy: "TokenPolicy", settings: "Settings") -> "StorePolicies":
    from tcw.tokens import passes

    images = passes.calibration_images(source, policy, settings)
    return lambda artifact: passes.write(artifact, policy, images, settings.device)


def attach(model: Any, artifact: "Artifact") -> None:
    """Have a loaded model work under the policies that its artifact stores. Raises UsageError, FormatError."""
    found = families(artifact)
    if "kv" in found:
        from tcw.kv import stored as kv_stored

        if (policy := kv_stored.of_artifact(artifact, model)) is not None:
            kv_stored.attach(model, policy)
    if found & {"tokens", "prompt"}:
        from tcw.tokens import stored as token_stored

        token_stored.attach(model, artifact)
