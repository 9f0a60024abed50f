"""Policies in an artifact: entries of the manifest, and a small safetensors file for what each family measured.

Tensors stand in `policies/<family>.safetensors` as `method.name`; an entry lists its names, and the fingerprint of the
model they were measured on. A method goes by its plain name here: the family is said beside it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcw import methods
from tcw.artifact import MANIFEST, POLICIES, Artifact
from tcw.disk import writing
from tcw.errors import FormatError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

WHAT = {"kv": "KV policy", "tokens": "token policy", "prompt": "text policy"}  # families, for a person
_MAX_BYTES = 1 << 32  # of a family's tensors: more than any method measures, less than what stops a machine
_AGAIN = "compress the model again"

Tensors = dict[str, dict[str, "Tensor"]]  # by method, by name


def file_of(family: str) -> str:
    """Where a family's tensors lie; not at the top: what lies there are weights."""
    return f"{POLICIES}{family}.safetensors"


def store(
    folder: Path, family: str, chosen: Mapping[str, methods.Method], tensors: Tensors, fingerprint: str
) -> list[dict[str, Any]]:
    """Write what the methods `chosen` (by plain name) measured to `folder`, and return their entries.

    `fingerprint` is of the model they were measured on; it stands only where something was measured.
    """
    from safetensors.torch import save

    flat = {f"{name}.{key}": t for name in chosen for key, t in tensors.get(name, {}).items()}
    if flat:
        with writing(folder):
            path = folder / file_of(family)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(save(flat))
    entries = []
    for name, method in chosen.items():
        measured = sorted(tensors.get(name, ()))
        entry = {"family": family, "method": name, "params": method.options(), "tensors": measured}
        entries.append({**entry, "fingerprint": fingerprint} if measured else entry)
    return entries


def families(artifact: object) -> set[str]:
    """The families that an artifact says it stores policies of; none for any other source."""
    found = artifact.manifest.get("policies", []) if isinstance(artifact, Artifact) else []
    return {entry["family"] for entry in found if isinstance(entry, dict) and isinstance(entry.get("family"), str)}


def entries_of(artifact: Artifact, family: str) -> list[dict[str, Any]]:
    """The entries of a family. Raises FormatError for what is not as docs/format.md says."""
    found = artifact.manifest.get("policies", [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise FormatError(f"`{MANIFEST}`: `policies` is no list of policies")
    mine = [entry for entry in found if entry.get("family") == family]
    for entry in mine:
        names = entry.get("tensors")
        good = isinstance(entry.get("method"), str) and isinstance(entry.get("params"), dict)
        if not good or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise FormatError(f"`{MANIFEST}`: a {WHAT[family]} has no valid `method`, `params` or `tensors`")
    names = [entry["method"] for entry in mine]
    if twice := [name for name in names if names.count(name) > 1]:
        raise FormatError(f"`{MANIFEST}`: the {WHAT[family]} `{twice[0]}` stands there twice")
    return mine


def method_of(entry: dict[str, Any]) -> methods.Method:
    """Make the method of an entry. Raises FormatError: it is of another family; UnknownName, UsageError."""
    name = methods.qualified(entry["method"], entry["family"])
    if methods.family_of(name) != entry["family"]:
        raise FormatError(f"`{MANIFEST}`: `{entry['method']}` is not a {WHAT[entry['family']]}")
    return methods.build(name, entry["params"])


def measured(artifact: Artifact, family: str, entries: list[dict[str, Any]]) -> Tensors:
    """What a family's policies measured: exactly what the entries list, all of it finite. Raises FormatError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    wanted = {f"{e['method']}.{name}": (e["method"], name) for e in entries for name in e["tensors"]}
    if not wanted:
        return {}
    file = file_of(family)
    if file not in artifact.manifest["files"]:
        raise FormatError(f"`{file}` is missing from the artifact", _AGAIN)
    if (artifact.path / file).stat().st_size > _MAX_BYTES:
        raise FormatError(f"`{file}` is larger than {_MAX_BYTES} bytes: no policy measures so much", _AGAIN)
    try:
        found = load_file(artifact.path / file)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"`{file}` cannot be read: {error}", _AGAIN) from None
    if set(found) != set(wanted):
        raise FormatError(f"`{file}` does not hold the tensors that the manifest lists", _AGAIN)
    tensors: Tensors = {}
    for key, (method, name) in wanted.items():
        if found[key].is_floating_point() and not bool(found[key].isfinite().all()):
            raise FormatError(f"`{file}`: `{key}` is not finite", _AGAIN)
        tensors.setdefault(method, {})[name] = found[key]
    return tensors


def check_measured(
    entries: list[dict[str, Any]], chosen: Mapping[str, methods.Method], tensors: Tensors, fingerprint: str
) -> None:
    """Hold what was measured to the methods that need it and to the model loaded, of this fingerprint.

    Raises FormatError: it is missing; UsageError: it is another model's.
    """
    for entry in entries:
        name, what = entry["method"], WHAT[entry["family"]]
        if chosen[name].needs_calibration and name not in tensors:
            raise FormatError(f"the {what} `{name}` lacks its tensors", _AGAIN)
        if entry["tensors"] and entry.get("fingerprint") != fingerprint:
            raise UsageError(
                f"the {what} `{name}` was measured on another model", "compress this model with the policy"
            )
