"""A token policy in an artifact (tcw/artifact_policies.py says how it is stored), and on a model that was loaded.

Methods that cut a long text inside the model are policies of the same engine; their entries are of the family `prompt`.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcw import artifact_policies
from tcw.errors import FormatError
from tcw.tokens.engine import TokenPolicy
from tcw.tokens.shape import TEXT, kind_of, shape_of, tower_of

if TYPE_CHECKING:
    from tcw.artifact import Artifact

_log = logging.getLogger("tcw")
FAMILIES = ("tokens", "prompt")


def store(policy: TokenPolicy, model: Any, folder: Path) -> list[dict[str, Any]]:
    """Write what a policy learned to `folder`, and return its entries for the manifest; `model` is what it is of."""
    mark = fingerprint(model) if policy.learned else ""
    entries: list[dict[str, Any]] = []
    for family in FAMILIES:
        mine = {name: m for name, m in policy.methods.items() if m.family == family}
        entries += artifact_policies.store(folder, family, mine, policy.learned, mark)
    return entries


def methods_of(artifact: "Artifact") -> dict[str, Any]:
    """The methods of an artifact's token policy, by name; {}: it has none. Raises FormatError, UnknownName, UsageError.

    They stand in the order of the manifest.
    """
    found = {}
    for entry in _entries(artifact):
        method = artifact_policies.method_of(entry)
        if not hasattr(method, "stages"):
            raise FormatError(f"`tcw.json`: `{entry['method']}` cuts no tokens inside a model")
        found[entry["method"]] = method
    return found


def of_artifact(artifact: "Artifact", model: Any) -> TokenPolicy | None:
    """The token policy that an artifact stores, for the model loaded from it; None if it stores none.

    Raises:
        FormatError: the manifest or the file is not as docs/format.md says.
        UsageError: it was learned on another model, or does not fit this one.
    """
    entries = _entries(artifact)
    if not entries:
        return None
    methods = methods_of(artifact)
    learned: artifact_policies.Tensors = {}
    for family in FAMILIES:
        mine = [entry for entry in entries if entry["family"] == family]
        learned |= artifact_policies.measured(artifact, family, mine)
    artifact_policies.check_measured(entries, methods, learned, fingerprint(model) if learned else "")
    return TokenPolicy(methods, shape_of(model), learned)


def attach(model: Any, artifact: "Artifact") -> None:
    """Have a loaded model work under the policy that its artifact stores, if any: `model.token_attached`.

    Raises FormatError, UsageError.
    """
    policy = of_artifact(artifact, model)
    if policy is not None:
        model.token_attached = policy.attach(model)
        said = {name: method.options() for name, method in policy.methods.items()}
        _log.info("works under the token policy %s", json.dumps(said))


def fingerprint(model: Any) -> str:
    """What ties learned tensors to a model: its shape, and the norms of its vision tower (of a text model, all)."""
    facts = hashlib.sha256(json.dumps(vars(shape_of(model)), sort_keys=True).encode())
    part = model if kind_of(model) == TEXT else tower_of(model)
    for name, parameter in part.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            facts.update(parameter.detach().float().cpu().numpy().tobytes())
    return facts.hexdigest()


def _entries(artifact: "Artifact") -> list[dict[str, Any]]:
    """The entries of both families, in the order of the manifest."""
    mine = [entry for family in FAMILIES for entry in artifact_policies.entries_of(artifact, family)]
    return [entry for entry in artifact.manifest.get("policies", []) if entry in mine]
