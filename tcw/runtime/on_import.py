"""Register the "tcw" quantizer when transformers is imported, before or after tcw, without importing it here.

transformers knows a quantizer only after `register_quantizer`, whose import costs seconds and all of torch. So tcw
waits for `transformers.modeling_utils`, which every load of a model imports: an entry in `sys.meta_path` that sees
this one name, lets the usual finders find it, adds a step after its code has run, and then takes itself off the path.
transformers offers no plug-in entry point and an artifact cannot carry code, so the other ways are to pay the import
at `import tcw` or to ask users for a call of their own.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_TARGET = "transformers.modeling_utils"


def install() -> None:
    """Register now when transformers is there already, else as soon as it is."""
    if _TARGET not in sys.modules:
        if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watcher())
    else:
        _register()


class _Watcher:
    """Finds nothing itself: it adds a step to the loader of one module, and leaves when that step is done."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answer for one module only, with the spec that the other finders give."""
        if name != _TARGET or self._asking:
            return None
        self._asking = True
        try:
            spec = find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            self._extend(spec.loader)
        return spec

    def _extend(self, loader: Any) -> None:
        """Let the module's loader register the quantizer when the module's code has run."""
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            loader.exec_module = run
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = exec_module


def _register() -> None:
    name = "tcw.runtime.quantizer"
    if name in sys.modules:  # it is what imports transformers just now, and registers when it has
        return
    try:
        importlib.import_module(name)
    except Exception as error:  # an import of transformers must not fail because of tcw
        warnings.warn(f"tcw could not register with transformers: {error}", stacklevel=2)
