"""tcw: profile a model, shrink it, prove that it still says the same thing, ship it.

    import tcw
    model = tcw.load("artifact-folder")                             # any model that tcw can read
    model = AutoModelForCausalLM.from_pretrained("artifact-folder") # works too, once tcw is imported

`open_model`, `profile`, `compress`, `verify`, `export` and `load` are what the command line calls. Importing tcw
imports neither torch nor transformers.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from tcw.runtime import on_import

__version__ = "0.1.0"

_FUNCTIONS = {
    "open_model": ("tcw.source", "open_source"),
    "compress": ("tcw.pipeline", "compress"),
    "load": ("tcw.runtime.load", "load"),
    "generate": ("tcw.runtime.generate", "generate"),
}
_VERBS = ("profile", "verify", "export")  # packages with a function of the same name in them

__all__ = ["compress", "export", "generate", "load", "open_model", "profile", "verify"]


class _Verb(ModuleType):
    """A package that can be called: `tcw.verify(...)` is `tcw.verify.verify(...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Tcw(ModuleType):
    """This package: its verbs become callable when they are imported, whoever imports them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and type(value) is ModuleType:
            value.__class__ = _Verb
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return importlib.import_module(f"tcw.{name}")
    if name in _FUNCTIONS:
        module, attribute = _FUNCTIONS[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module `tcw` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Tcw
on_import.install()
