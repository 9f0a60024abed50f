"""A policy in an artifact: entries of the manifest and a small safetensors file; and on a model that was loaded."""

import functools
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers.generation import GenerationMode

from tcw import methods
from tcw.artifact import POLICIES
from tcw.disk import writing
from tcw.errors import FormatError, UsageError
from tcw.kv import KVMethod
from tcw.kv.policy import Policy, Tensors
from tcw.kv.shapes import shapes_of

if TYPE_CHECKING:
    from tcw.artifact import Artifact

_log = logging.getLogger("tcw")
FILE = f"{POLICIES}kv.safetensors"  # not at the top: what lies there are weights
_FAMILY = "kv"


def store(policy: Policy, model: Any, folder: Path) -> list[dict[str, Any]]:
    """Write what a policy measured to `folder`, and return its entries for the manifest.

    Tensors stand in the file as `method.name`; an entry lists its names and the fingerprint of the model they are of.
    """
    flat = {f"{method}.{name}": t for method, found in policy.tensors.items() for name, t in found.items()}
    if flat:
        with writing(folder):
            (folder / FILE).parent.mkdir(exist_ok=True)
            (folder / FILE).write_bytes(save(flat))
    entries = []
    for name, method in policy.methods.items():
        measured = sorted(policy.tensors.get(name, ()))
        entry = {"family": _FAMILY, "method": name, "params": method.options(), "tensors": measured}
        entries.append({**entry, "fingerprint": policy.fingerprint(model)} if measured else entry)
    return entries


def has_policy(artifact: "Artifact") -> bool:
    """Say whether an artifact stores a KV policy."""
    return bool(_entries(artifact))


def methods_of(artifact: "Artifact") -> dict[str, KVMethod]:
    """The methods of an artifact's KV policy, by name; {}: it has none. Raises FormatError, UnknownName, UsageError."""
    return {entry["method"]: _method(entry) for entry in _entries(artifact)}


def of_artifact(artifact: "Artifact", model: Any) -> Policy | None:
    """The KV policy that an artifact stores, for the model loaded from it; None if it stores none.

    Raises:
        FormatError: the manifest or the file is not as docs/format.md says.
        UsageError: it was measured on another model, or does not fit this one.
    """
    entries = _entries(artifact)
    if not entries:
        return None
    policy = Policy(methods_of(artifact), shapes_of(model), _tensors(artifact, entries))
    for entry in entries:
        name = entry["method"]
        if policy.methods[name].needs_calibration and name not in policy.tensors:
            raise FormatError(f"the KV policy `{name}` lacks its tensors", "compress the model again")
        if entry["tensors"] and entry.get("fingerprint") != policy.fingerprint(model):
            raise UsageError(
                f"the KV policy `{name}` was measured on another model", "compress this model with the policy"
            )
    return policy


def _entries(artifact: "Artifact") -> list[dict[str, Any]]:
    found = artifact.manifest.get("policies", [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise FormatError("`tcw.json`: `policies` is no list of policies")
    mine = [entry for entry in found if entry.get("family") == _FAMILY]
    for entry in mine:
        names = entry.get("tensors")
        good = isinstance(entry.get("method"), str) and isinstance(entry.get("params"), dict)
        if not good or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FormatError("`tcw.json`: a KV policy has no valid `method`, `params` or `tensors`")
    return mine


def _method(entry: dict[str, Any]) -> KVMethod:
    method = methods.build(entry["method"], entry["params"])
    if not isinstance(method, KVMethod):
        raise FormatError(f"`tcw.json`: `{entry['method']}` is not a KV policy")
    return method


def _tensors(artifact: "Artifact", entries: list[dict[str, Any]]) -> Tensors:
    """What the policy measured: exactly what the entries list, all of it finite. Raises FormatError."""
    wanted = {f"{e['method']}.{name}": (e["method"], name) for e in entries for name in e["tensors"]}
    if not wanted:
        return {}
    if FILE not in artifact.manifest["files"]:
        raise FormatError(f"`{FILE}` is missing from the artifact", "compress the model again")
    try:
        found = load_file(artifact.path / FILE)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"`{FILE}` cannot be read: {error}", "compress the model again") from None
    if set(found) != set(wanted):
        raise FormatError(f"`{FILE}` does not hold the tensors that the manifest lists", "compress the model again")
    tensors: Tensors = {}
    for key, (method, name) in wanted.items():
        if found[key].is_floating_point() and not bool(found[key].isfinite().all()):
            raise FormatError(f"`{FILE}`: `{key}` is not finite", "compress the model again")
        tensors.setdefault(method, {})[name] = found[key]
    return tensors


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
