"""A Hugging Face folder on disk: which files hold the weights, which are worth carrying along, and what is refused.

A folder may come from a stranger: no name inside it leads out of it, and nothing in it is unpickled or run.
"""

import json
import re
from pathlib import Path
from typing import Any

from tcw.errors import FormatError, SourceError

MAX_JSON = 200_000_000  # the largest tokenizer.json seen is 33 MB
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".ot"}
_CARRIED = {".json", ".jsonl", ".txt", ".model", ".jinja", ".md", ".py", ".tiktoken", ".spm", ".bpe", ".vocab", ".yaml"}
_PAPERS = re.compile(r"(?i)(readme|licen[cs]e|notice|copying|copyright|use_policy)")
_PART = re.compile(r"\d+_\w+")  # the numbered modules of sentence-transformers: 1_Pooling, 2_Dense
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
_CONVERT = (
    "load it once where you trust it and call `save_pretrained(DIR)`, or use the repository's own safetensors version"
)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises SourceError when it cannot be read and FormatError when it is something else."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise FormatError(f"`{path.name}` is larger than {MAX_JSON} bytes", f"look at `{path}`")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read `{path}`: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise FormatError(f"`{path.name}` is not valid JSON", f"the file `{path}` is damaged; get it again") from None
    if not isinstance(value, dict):
        raise FormatError(f"`{path.name}` is not a JSON object", f"the file `{path}` is damaged; get it again")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder; other kinds of folders are refused by name."""
    if (folder / "model_index.json").is_file():
        raise SourceError(f"`{folder}` is a diffusers pipeline, which tcw does not read", "use a transformers model")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise SourceError(f"`{folder}` is an adapter, not a model", "merge it into its base model and save that")
    if not (folder / "config.json").is_file():
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        hint = f"give the file: `{folder / ggufs[0]}`" if ggufs else "a model folder has config.json and *.safetensors"
        raise SourceError(f"`{folder}` is no model folder: it has no config.json", hint)
    config = read_json(inside(folder, "config.json"))
    if "_diffusers_version" in config:
        raise SourceError(f"`{folder}` is a part of a diffusers pipeline, which tcw does not read")
    return config


def inside(folder: Path, name: str) -> Path:
    """Return folder/name; raises SourceError when the name, or a link on the way, leads out of the folder.

    In the cache of huggingface_hub files are links into the `blobs` folder of the same repository; those are fine.
    """
    path = folder / name
    if not name or "\\" in name or "\0" in name or ".." in path.parts or Path(name).is_absolute():
        raise SourceError(f"`{ascii(name)[1:-1]}` leads out of the model folder `{folder}`", "the folder is damaged")
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        roots.append((folder.parent.parent / "blobs").resolve())
    try:
        place = path.resolve()
    except (OSError, RuntimeError):
        raise SourceError(f"`{path}` is a link to itself", "put the file itself there") from None
    if not any(place.is_relative_to(root) for root in roots):
        raise SourceError(f"`{path}` is a link that leads out of the model folder", "put the file itself there")
    return path


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Find the safetensors files of a model folder, and the index (tensor -> file name) if one was used.

    model.safetensors; else what an index names; else the one file, or the one complete set of shards, that is there.
    """
    if (folder / "model.safetensors").is_file():
        return [inside(folder, "model.safetensors")], {}
    indices = sorted(p.name for p in folder.glob("*.safetensors.index.json"))
    if indices:
        name = "model.safetensors.index.json"
        return _indexed(folder, name if name in indices else indices[0])
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if not found:
        raise _no_weights(folder)
    if len(found) > 1 or _SHARD.fullmatch(found[0]):
        _check_shards(folder, found)
    return [inside(folder, name) for name in found], {}


def _indexed(folder: Path, index: str) -> tuple[list[Path], dict[str, str]]:
    table = read_json(inside(folder, index)).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise FormatError(f"`{index}` has no usable `weight_map`", "the index is damaged; get it again")
    names = sorted(set(table.values()))
    for name in names:
        if "/" in name or not name.endswith(".safetensors"):
            raise FormatError(f"`{index}` names the file `{ascii(name)[1:-1]}`, which is no safetensors file beside it")
    files = [inside(folder, name) for name in names]
    _check_present(folder, [f.name for f in files if not f.is_file()])
    return files, table


def _check_shards(folder: Path, found: list[str]) -> None:
    matches = [_SHARD.fullmatch(name) for name in found]
    sets = {(m[1], m[3]) for m in matches if m}
    if not all(matches) or len(sets) != 1:
        raise SourceError(
            f"`{folder}` has several safetensors files and no index: {', '.join(found[:5])}",
            "keep one model in a folder, or add its model.safetensors.index.json",
        )
    ((stem, total),) = sets
    if int(total) > 100_000:
        raise SourceError(f"`{found[0]}` claims to be one of {total} shards")
    wanted = [f"{stem}-{i:0{len(total)}d}-of-{total}.safetensors" for i in range(1, int(total) + 1)]
    _check_present(folder, [name for name in wanted if name not in found])


def _check_present(folder: Path, missing: list[str]) -> None:
    if missing:
        shown = ", ".join(f"`{m}`" for m in missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise SourceError(f"`{folder}` lacks {shown}", "the download is not complete; get the missing files")


def _no_weights(folder: Path) -> SourceError:
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    if pickled := [n for n in names if Path(n).suffix in _PICKLED]:
        return SourceError(f"`{folder}` has its weights only in `{pickled[0]}`, which tcw does not open", _CONVERT)
    if ggufs := [n for n in names if n.endswith(".gguf")]:
        return SourceError(f"`{folder}` holds GGUF files, not safetensors", f"give the file: `{folder / ggufs[0]}`")
    return SourceError(f"`{folder}` has no safetensors file", "a model folder has config.json and *.safetensors")


def side_files(folder: Path) -> list[Path]:
    """Everything but the weights that a copy of the model should have, as sorted relative paths.

    Config, tokenizer, chat templates, model cards and licences, the code of custom models (carried, never run), and
    the numbered modules of sentence-transformers. Raises SourceError for a link that leads out of the folder.
    """
    found: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if path.name == "additional_chat_templates" or _PART.fullmatch(path.name):
                inside(folder, path.name)
                if path.is_symlink():  # one that leads back up would copy the weights
                    continue
                found += [Path(path.name, p.name) for p in sorted(path.iterdir()) if p.is_file() and _carried(p, True)]
        elif path.is_file() and _carried(path, False):
            found.append(Path(path.name))
    for relative in found:
        inside(folder, relative.as_posix())
    return found


def _carried(path: Path, part: bool) -> bool:
    name = path.name
    if name == "tcw.json" or name.endswith(".index.json") or path.suffix in _PICKLED or name.startswith("."):
        return False
    if part and path.suffix == ".safetensors":
        return True
    return path.suffix in _CARRIED or bool(_PAPERS.match(name))


def quantized_by(config: dict[str, Any]) -> str | None:
    """Name of the tool that already quantised a model, by its config, or None."""
    for table in (config, config.get("text_config")):
        if not isinstance(table, dict):
            continue
        for key in ("quantization_config", "compression_config"):
            entry = table.get(key)
            if isinstance(entry, dict) and entry.get("quant_method") != "tcw":
                return str(entry.get("quant_method") or "an unknown tool")
    return None
