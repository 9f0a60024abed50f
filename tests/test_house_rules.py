"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tcw import methods

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("tcw/**/*.py"), *ROOT.glob("kernels/**/*.py")])
BANNED_CALLS = {"eval", "exec"}
BANNED_IMPORTS = {"pickle", "click", "dill", "cloudpickle"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(node: ast.expr) -> str:
    return ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_file(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400, f"{len(lines)} lines"
    assert path.stem not in ("utils", "helpers", "common", "misc"), "name the thing"
    parsed = tree(path)
    assert not lines or ast.get_docstring(parsed), "no module docstring"
    for node in ast.walk(parsed):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            assert called not in BANNED_CALLS, f"line {node.lineno}: {called}"
            assert called != "torch.load", f"line {node.lineno}: torch.load runs pickles"
            if path.relative_to(ROOT).as_posix() != "tcw/cli/output.py":
                assert called != "print", f"line {node.lineno}: only tcw/cli/output.py prints"
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            modules = {module.partition(".")[0]} if module else {a.name.partition(".")[0] for a in node.names}
            assert not modules & BANNED_IMPORTS, f"line {node.lineno}: {modules}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_public_names_have_docstrings(path: Path) -> None:
    def check(body: list[ast.stmt], where: str, depth: int) -> None:
        for node in body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            assert ast.get_docstring(node), f"{where}{node.name} has no docstring"
            if isinstance(node, ast.ClassDef) and depth == 0:
                check(node.body, f"{node.name}.", 1)

    check(tree(path).body, "", 0)


@pytest.mark.parametrize("name", methods.names())
def test_every_method_explains_itself(name: str) -> None:
    card = methods.card(name)
    assert 10 <= len(card.summary) <= 100
    assert card.family in methods.FAMILIES
    assert card.paper, "no paper"
    assert all(o["help"] for o in card.options), "an option without help"
    assert methods.get(name.upper().replace("-", "_")) is methods.get(name)


def test_light_modules_stay_light() -> None:
    """The command line, the sources and the format must not drag in torch."""
    light = ["tcw", "tcw.cli", "tcw.source", "tcw.recipe", "tcw.methods", "tcw.artifact", "tcw.pipeline", "tcw.weights"]
    code = f"import sys, {', '.join(light)}; print([m for m in ('torch', 'transformers', 'numba') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


def test_no_machine_is_named() -> None:
    """No absolute home or work folder of whoever wrote it."""
    for path in [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*"), *ROOT.glob("tests/**/*.py")]:
        if path.is_file() and path != Path(__file__):
            text = path.read_text(encoding="utf-8", errors="ignore")
            for word in (f"/{top}/" for top in ("root", "home", "work")):
                assert word not in text, f"{path.name} names {word}"
