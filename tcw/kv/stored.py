"""A KV policy in an artifact (tcw/artifact_policies.py says how it is stored), and on a model that was loaded."""

import functools
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.generation import GenerationMode

from tcw import artifact_policies
from tcw.errors import UsageError
from tcw.kv import KVMethod
from tcw.kv.policy import Policy
from tcw.kv.shapes import shapes_of

if TYPE_CHECKING:
    from tcw.artifact import Artifact

_log = logging.getLogger("tcw")
_FAMILY = "kv"


def store(policy: Policy, model: Any, folder: Path) -> list[dict[str, Any]]:
    """Write what a policy measured to `folder`, and return its entries for the manifest; `model` is what it is of."""
    fingerprint = policy.fingerprint(model) if policy.tensors else ""
    return artifact_policies.store(folder, _FAMILY, policy.methods, policy.tensors, fingerprint)


def methods_of(artifact: "Artifact") -> dict[str, KVMethod]:
    """The methods of an artifact's KV policy, by name; {}: it has none. Raises FormatError, UnknownName, UsageError."""
    built = {e["method"]: artifact_policies.method_of(e) for e in artifact_policies.entries_of(artifact, _FAMILY)}
    return {name: method for name, method in built.items() if isinstance(method, KVMethod)}


def of_artifact(artifact: "Artifact", model: Any) -> Policy | None:
    """The KV policy that an artifact stores, for the model loaded from it; None if it stores none.

    Raises:
        FormatError: the manifest or the file is not as docs/format.md says.
        UsageError: it was measured on another model, or does not fit this one.
    """
    entries = artifact_policies.entries_of(artifact, _FAMILY)
    if not entries:
        return None
    methods = methods_of(artifact)
    tensors = artifact_policies.measured(artifact, _FAMILY, entries)
    policy = Policy(methods, shapes_of(model), tensors)
    artifact_policies.check_measured(entries, policy.methods, tensors, policy.fingerprint(model))
    return policy


def attach(model: Any, policy: Policy) -> None:
    """Have `generate` use the policy whenever the caller gives no cache and asks for no other kind."""
    model.kv_policy = policy
    model._prepare_cache_for_generation = functools.partial(_prepare, model)
    _log.info("generates under the KV policy %s", json.dumps({n: m.options() for n, m in policy.methods.items()}))


def _prepare(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
) -> None:
    """Stand in for the method of transformers that makes the cache of a generation."""
    asked = generation_config.cache_implementation
    own = model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False
    if own and generation_mode == GenerationMode.ASSISTED_GENERATION:
        raise UsageError(
            "a cache under a KV policy cannot be cut back, as assisted generation must",
            "generate without an assistant model, or give a `DynamicCache` of your own as `past_key_values`",
        )
    if own and asked in (None, "dynamic"):
        model_kwargs["past_key_values"] = model.kv_policy.new_cache(model)
        return
    if own and asked is not None:
        _log.warning("`cache_implementation=%r` was asked for: the stored KV policy is not used", asked)
    type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, generation_mode, *args, **kwargs)
