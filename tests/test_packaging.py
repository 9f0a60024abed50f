"""kernels/ and profiles/ lie at top level and must be found from a checkout, an editable install and a wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBE = (
    "import tcw, tcw.kernels.lanes_decode.reference as r; from tcw import recipe, methods; "
    "from tcw.folders import folder; "
    "print(recipe.names(), methods.names(), folder('kernels').name, r.__file__)"
)


def probe(folder: Path) -> str:
    run = subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {PROBE}"],
        capture_output=True, text=True, cwd=folder, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(ROOT),
    ]
    subprocess.run(command, check=True, timeout=180)
    with zipfile.ZipFile(next(out.glob("tcw-*.whl"))) as archive:
        archive.extractall(out / "site")
    return out / "site"


def test_wheel_finds_kernels_and_profiles(wheel: Path) -> None:
    said = probe(wheel)
    assert "'lossless'" in said
    assert "'dfloat11'" in said
    assert "_kernels" in said
    assert str(wheel) in said


def test_wheel_holds_all_that_the_package_reads(wheel: Path) -> None:
    held = {p.relative_to(wheel).as_posix() for p in wheel.rglob("*") if p.is_file()}
    for path in (ROOT / "tcw").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in held
    assert not [n for n in held if n.startswith(("kernels/", "profiles/", "tests/"))]
    entry = next(p for p in wheel.rglob("entry_points.txt"))
    assert "tcw = tcw.cli:main" in entry.read_text()


def test_checkout_finds_its_own_folders() -> None:
    said = probe(ROOT)
    assert "_kernels" not in said
    assert str(ROOT / "kernels") in said
