"""The documentation is run: examples give what they show, the schema fits what is written."""

import doctest
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tcw import pipeline, recipe
from tcw.artifact import read_manifest
from tcw.source import open_source

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
VOLATILE = re.compile(r"^(device|memory|latency|time|peak memory|verdict|took|takes|alone|\d+ tokens, )")
SCHEMA = json.loads((ROOT / "docs" / "format.schema.json").read_text())


@pytest.mark.parametrize("name", ["README.md", "docs/format.md"])
def test_python_examples(name: str) -> None:
    failed, tried = doctest.testfile(str(ROOT / name), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert failed == 0
    assert tried or name == "README.md"


@pytest.fixture(scope="module")
def manifest(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("docs") / "artifact"
    pipeline.compress(open_source(tiny_llama), recipe.load("lossless"), out)
    return read_manifest(out)


def test_a_written_manifest_fits_the_schema(manifest: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(manifest, SCHEMA)


@pytest.mark.parametrize(
    "change",
    [{"format": "2.0"}, {"tensors": []}, {"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, {"new": 1},
     {"tensors": {"x": {"method": "raw"}}}],
)  # fmt: skip
def test_the_schema_refuses(manifest: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**manifest, **change}, SCHEMA)


def test_the_example_of_add_a_method_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    import numpy as np

    from tcw.tensor import TensorData, TensorInfo

    text = (ROOT / "docs" / "add-a-method.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    (tmp_path / "halve.py").write_text(code)
    spec = importlib.util.spec_from_file_location("halve", tmp_path / "halve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "halve", module)
    spec.loader.exec_module(module)
    words = np.arange(6, dtype=np.uint16) * 0x1234
    tensor = TensorData(TensorInfo("w", "BF16", (2, 3)), words.view(np.uint8))
    decoded = module.Halve.decode(tensor.info, module.Halve().encode(tensor))
    assert np.array_equal(decoded.words, words & 0xFF00)


def test_methods_page_is_current() -> None:
    from tcw.cli import docs

    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == docs.methods_page(), "run `make docs`"


@pytest.mark.parametrize("line", re.findall(r"^\$ tcw (.*)$", README, re.MULTILINE))
def test_commands_in_the_readme_exist(line: str) -> None:
    from tcw import cli
    from tcw.cli import docs

    command, *arguments = shlex.split(line, comments=True)
    assert command in cli.COMMANDS
    known = docs.help_text(command)
    for argument in arguments:
        if argument.startswith("-"):
            assert re.search(rf"(^|[\s,]){re.escape(argument)}\b", known), argument


def settled(text: str) -> list[str]:
    """The lines of a transcript that are the same on every machine, spaces folded."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return [line for line in lines if line and not VOLATILE.match(line)]


def test_the_demo_prints_what_the_readme_shows(smollm2: Path) -> None:
    shown = re.search(r"<!-- demo -->\n+```console\n(.*?)```\n+<!-- /demo -->", README, re.DOTALL)
    assert shown, "the README has no transcript"
    command = [sys.executable, "-m", "tcw", "demo"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "COLUMNS": "80"})
    assert run.returncode == 0, run.stderr
    assert settled(run.stdout) == settled(shown[1])
