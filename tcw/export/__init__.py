"""Other tools' formats: one target a file, and its name is the file's name.

A target module holds `write(source, folder, progress, *, option=default, ...)`, which fills an empty folder and may
return the tensors that it could not compress, with reasons; its docstring's first line says what the target is.
`export` takes care of the rest: the output appears whole or not at all, is never written over something that is no
model, and never touches the source.
"""

import importlib
import inspect
import pkgutil
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tcw.artifact_policies import WHAT, families
from tcw.disk import writing
from tcw.errors import UnknownName, UsageError
from tcw.events import Report, silent
from tcw.methods import canonical
from tcw.source import Source
from tcw.staging import begin, claim, discard, hold, let_go, publish

ENGINE: tuple[str, ...] = ("patterns",)  # modules here that are not targets
_SWITCH = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class ExportReport:
    """What was written: the folder, the target's name, the bytes of all files, and the files relative to the folder.

    `kept` are tensors that the format could not compress, each with the reason; `notes` say what else stayed behind.
    """

    path: Path
    target: str
    bytes: int
    files: list[Path]
    kept: dict[str, str]
    notes: tuple[str, ...] = ()


def names() -> list[str]:
    """Names of all targets, without importing one."""
    found = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    return sorted(canonical(name) for name in found if name not in ENGINE)


def get(target: str) -> ModuleType:
    """Import the module of a target, given as `name` or `name:key=value,...`. Raises UnknownName."""
    name = canonical(target.partition(":")[0])
    if name not in names():
        raise UnknownName("export target", name, names())
    return importlib.import_module(f"tcw.export.{name.replace('-', '_')}")


def export(
    source: Source, target: str, out: Path | str, *, force: bool = False, progress: Report = silent
) -> ExportReport:
    """Write `source` in the format of `target` to the folder `out`.

    Args:
        source: any model; compressed tensors are decoded one at a time.
        target: `name` or `name:key=value,key=value`.
        out: a folder that does not exist; with `force` it may be a model folder, which is replaced.
        force: replace a model folder that stands at `out`.
        progress: told of every tensor.

    Raises:
        UnknownName: no such target or option.
        OutputExists: something stands at `out`.
        ResourceError: no space left. Whatever fails, nothing is left at `out` or beside it.
    """
    module = get(target)
    name, options = canonical(target.partition(":")[0]), _options(module, target)
    out = Path(out).absolute()
    partial = claim(out, [source.path, *source.weight_files()], force=force)
    lock = hold(partial) if partial.is_dir() else None
    try:
        discard(partial)
    finally:
        let_go(lock)
    lock = None
    try:
        with writing(out):
            begin(partial)
            lock = hold(partial)
            kept = module.write(source, partial, progress, **options)
            source.check_unchanged()
            publish(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        let_go(lock)
    files = sorted(p.relative_to(out) for p in out.rglob("*") if p.is_file())
    size = sum((out / f).stat().st_size for f in files)
    return ExportReport(out, name, size, files, kept or {}, _left_behind(source, name))


def _left_behind(source: Source, target: str) -> tuple[str, ...]:
    """A sentence for each kind of policy that is applied at run time, and has no place in other formats."""
    stored = families(source)
    return tuple(
        f"the {what} stays behind: `{target}` has no place for one" for name, what in WHAT.items() if name in stored
    )


def _options(module: ModuleType, target: str) -> dict[str, Any]:
    """Read `key=value,...` as keyword arguments of the target's `write`, by the types of their defaults."""
    keywords = {
        p.name: p.default for p in inspect.signature(module.write).parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    name, _, rest = target.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, text = item.partition("=")
        key = key.replace("-", "_")
        if not equals:
            raise UsageError(f"cannot read `{item}` in `{target}`", "write `name:key=value,key=value`")
        if key not in keywords:
            raise UnknownName(f"option of target `{name}`", key, keywords)
        if key in options:
            raise UsageError(f"`{key}` is given twice in `{target}`")
        options[key] = _read(name, key, type(keywords[key]), text)
    return options


def _read(target: str, key: str, kind: type, text: str) -> Any:
    try:
        return _SWITCH[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        expected = {bool: "on or off", int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise UsageError(f"target `{target}`: `{key}` takes {expected}, got `{text}`") from None
