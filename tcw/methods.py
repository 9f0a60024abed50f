"""The registry of methods: a method is a file, its name is the file's name, and it is imported only when used.

Four families, four folders: `weights`, `kv`, `tokens`, `prompt`. Listing names is a directory listing, so shell
completion and error hints cost nothing. `-` and `_` are the same letter. Outside packages use the entry-point
group `tcw.methods`, with entry names `family.name` that point at the class.

A name that two families have (`random` is a control in three) means the one that comes first in `FAMILIES`; the others
are written `family.name`, as any method may be.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

from tcw.errors import TcwError, UnknownName, UsageError

FAMILIES = ("weights", "kv", "tokens", "prompt")
_ROOT = Path(__file__).resolve().parent
_TRUE, _FALSE = {"on", "true", "yes", "1"}, {"off", "false", "no", "0"}


class Method:
    """Base of every method: a frozen dataclass whose fields are its options.

    Make a field with `option(default, help)`. The class docstring's first line is what `tcw methods` prints.
    """

    family: ClassVar[str]
    lossless: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    paper: ClassVar[str] = ""

    def reads_text(self) -> bool:
        """Say whether, with these options, the method is calibrated on a text."""
        return self.needs_calibration

    def options(self) -> dict[str, Any]:
        """Every option with its value, defaults filled in, as plain JSON values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]


def option(default: Any, help: str, choices: tuple[Any, ...] = ()) -> Any:
    """Declare an option of a method: its default, a help line, and the values it may take (any, when empty)."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Card:
    """What the catalogue says of a method."""

    name: str
    family: str
    summary: str
    lossless: bool
    needs_calibration: bool
    options: list[dict[str, Any]]
    paper: str


def canonical(name: str) -> str:
    """Spell a method's name as it is printed: lower case, with `-`."""
    return name.strip().lower().replace("_", "-")


@cache
def _locations() -> dict[str, tuple[str, str]]:
    """Map each name to (family, module) without importing a method."""
    found: dict[str, tuple[str, str]] = {}
    for family in FAMILIES:
        engine = getattr(importlib.import_module(f"tcw.{family}"), "ENGINE", ())
        for module in pkgutil.iter_modules([str(_ROOT / family)]):
            if module.name not in engine and not module.name.startswith("_"):
                _claim(found, module.name, family, f"tcw.{family}.{module.name}")
    for entry in entry_points(group="tcw.methods"):
        family, _, name = entry.name.partition(".")
        if family in FAMILIES and name:
            _claim(found, name, family, entry.value)
    return found


def _claim(found: dict[str, tuple[str, str]], name: str, family: str, where: str) -> None:
    name = canonical(name)
    if name in found and found[name][0] != family:
        name = f"{family}.{name}"
    if name in found:
        raise TcwError(f"two methods are named `{name}`: `{found[name][1]}` and `{where}`")
    found[name] = (family, where)


def qualified(name: str, family: str) -> str:
    """The name by which the registry knows the method that `family` calls `name`."""
    name = canonical(name)
    return f"{family}.{name}" if f"{family}.{name}" in _locations() else name


def names(family: str | None = None) -> list[str]:
    """Names of all methods, or of one family, sorted."""
    return sorted(n for n, (f, _) in _locations().items() if family in (None, f))


def family_of(name: str) -> str:
    """The family of a method, without importing it."""
    return _locate(name)[0]


def _locate(name: str) -> tuple[str, str]:
    found, name = _locations(), canonical(name)
    family, dot, plain = name.partition(".")
    if name not in found and dot and found.get(plain, ("", ""))[0] == family:
        name = plain
    if name not in found:
        raise UnknownName("method", name, names(), "tcw methods")
    return found[name]


def get(name: str) -> type[Method]:
    """Import and return the method class called `name`. Raises UnknownName; an import error shows as itself."""
    module_name, _, attribute = _locate(name)[1].partition(":")
    module = importlib.import_module(module_name)
    if attribute:
        return getattr(module, attribute)
    classes = [
        c for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, Method) and c.__module__ == module.__name__
    ]  # fmt: skip
    if len(classes) != 1:
        raise TcwError(f"`{module_name}` must hold exactly one method class, it holds {len(classes)}")
    return classes[0]


def build(name: str, options: dict[str, Any]) -> Method:
    """Make the method `name` with `options`; strings are read as the type of the option's default.

    Raises UnknownName for a method or key that does not exist and UsageError for a value that does not fit.
    """
    cls = get(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in options.items():
        field = fields.get(key.replace("-", "_"))
        if field is None:
            raise UnknownName(f"option of `{canonical(name)}`", key, fields, f"tcw methods {canonical(name)}")
        values[field.name] = _read(canonical(name), field, value)
    try:
        return cls(**values)
    except ValueError as error:
        raise UsageError(f"`{canonical(name)}`: {error}", _listing(canonical(name))) from None


def _listing(method: str) -> str:
    return f"`tcw methods {method}` lists its options"


def _read(method: str, field: "dataclasses.Field[Any]", value: Any) -> Any:
    kind = type(field.default)
    if isinstance(value, str) and kind is not str:
        value = _parse(method, field.name, kind, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    choices = field.metadata.get("choices", ())
    if type(value) is not kind and kind is not type(None):
        raise UsageError(f"`{method}`: `{field.name}` takes {kind.__name__}, got `{value}`", _listing(method))
    if choices and value not in choices:
        raise UsageError(
            f"`{method}`: `{field.name}` cannot be `{value}`", f"choose from: {', '.join(str(c) for c in choices)}"
        )
    return value


def _parse(method: str, key: str, kind: type, text: str) -> Any:
    try:
        if kind is bool:
            return {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        expected = {bool: "on or off", int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise UsageError(f"`{method}`: `{key}` takes {expected}, got `{text}`", _listing(method)) from None


def card(name: str) -> Card:
    """Describe a method for the catalogue."""
    cls = get(name)
    options = [
        {"name": f.name, "default": f.default, "help": f.metadata.get("help", ""),
         "choices": list(f.metadata.get("choices", ()))}
        for f in dataclasses.fields(cls)  # type: ignore[arg-type]
    ]  # fmt: skip
    summary = (inspect.getdoc(cls) or "").partition("\n")[0]
    return Card(canonical(name), family_of(name), summary, cls.lossless, cls.needs_calibration, options, cls.paper)
