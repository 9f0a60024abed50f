"""How tcw gets into transformers, whoever is imported first."""

import subprocess
import sys

import pytest

CHECK = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'tcw' in m"
SCRIPTS = {
    "tcw first": f"""
import tcw, sys
assert not {{'torch', 'transformers', 'numpy', 'numba'}} & set(sys.modules)
assert tcw.compress.__module__ == 'tcw.pipeline'
import importlib.util
assert importlib.util.find_spec('transformers.modeling_utils')  # to look is not to import
import transformers.modeling_utils
assert not [f for f in sys.meta_path if type(f).__name__ == '_Watcher']
{CHECK}""",
    "transformers first": f"import transformers.modeling_utils; import tcw; {CHECK}",
    "our hook first": f"import tcw.runtime.quantizer; {CHECK}",
}


@pytest.mark.parametrize("order", SCRIPTS)
def test_the_quantizer_is_registered_in_every_order_of_imports(order: str) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", SCRIPTS[order]], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr


def test_a_transformers_built_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import PreTrainedModel
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from tcw.errors import TcwError
    from tcw.runtime import quantizer

    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "tcw")
    monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", staticmethod(lambda model, files: None))
    with pytest.raises(TcwError, match="does not know") as error:
        quantizer.register()
    assert "transformers >= 5.17" in error.value.hint
    assert "tcw" not in AUTO_QUANTIZER_MAPPING


def test_other_models_load_as_before(tiny_llama: object) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(tiny_llama))
    assert not hasattr(model, "hf_quantizer")


def test_verbs_can_be_called_and_are_packages() -> None:
    import tcw

    for verb in ("profile", "verify", "export"):
        assert callable(getattr(tcw, verb))
        assert getattr(tcw, verb).__path__
    with pytest.raises(AttributeError, match="no attribute `compres`"):
        tcw.compres  # noqa: B018
