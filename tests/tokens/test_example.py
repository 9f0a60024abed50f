"""The example in docs/add-a-method.md is a method."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from tcw.tokens.engine import TokenPolicy

from .test_engine import batch, model_of

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    code = next(part for part in text.split("```python\n")[1:] if "farthest.py" in part).split("```")[0]
    (tmp_path / "farthest.py").write_text(code)
    spec = importlib.util.spec_from_file_location("farthest", tmp_path / "farthest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "farthest", module)
    spec.loader.exec_module(module)
    model = model_of("llava")
    inputs, _ = batch(model)
    with TokenPolicy.make([module.Farthest(keep=0.25)], model).attach(model) as attached, torch.no_grad():
        assert bool(torch.isfinite(model(**inputs).logits).all())
    assert [trace.plan.kept for trace in attached.traces if trace.plan] == [9, 9, 9]
    assert all(float(trace.plan.size.sum()) == 36 for trace in attached.traces if trace.plan)
