"""What a compiled kernel depends on, what the compiler's log says, and errors of the compiler."""

from pathlib import Path

import pytest

from tcw import cuda
from tcw.cuda import build, log, packages
from tcw.cuda.log import Resources

from .fakes import LOG, Compiler


def key(arch: str = "sm_90") -> str:
    return build.key_of("toy", arch, (build.folder("kernels") / "toy" / "kernel.cu").read_text())


def test_all_that_decides_the_result_changes_the_key(
    compiler: Compiler, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [key(), key("sm_80")]
    header, source = kernels / "include" / "tcw.cuh", kernels / "toy" / "kernel.cu"
    text = header.read_text()
    header.write_text(text + "// more\n")
    keys.append(key())
    header.write_text(text)
    assert key() == keys[0]
    (kernels / "include" / "other.cuh").write_text("")
    keys.append(key())
    header.write_text("")  # the same text in another file
    (kernels / "include" / "other.cuh").write_text(text)
    keys.append(key())
    source.write_text(source.read_text() + "\n")
    keys.append(key())
    monkeypatch.setattr(packages, "nvrtc_version", lambda: (13, 6))
    keys.append(key())
    monkeypatch.setattr(build, "STANDARD", "c++20")
    keys.append(key())
    monkeypatch.setattr(build, "_PTXAS", ["-v", "-O1"])
    keys.append(key())
    assert len(set(keys)) == len(keys) == 9


def test_a_changed_header_compiles_again(compiler: Compiler, kernels: Path) -> None:
    build.compile_op("toy", "sm_90")
    (kernels / "include" / "tcw.cuh").write_text("using u32 = unsigned;\n")
    build.compile_op("toy", "sm_90")
    assert len(compiler.compiled) == 2


def test_operations_are_the_folders_with_a_kernel(kernels: Path) -> None:
    (kernels / "triton_op").mkdir()
    assert build.operations() == ["toy"]


def test_log() -> None:
    assert log.resources(LOG) == {
        "one": Resources(registers=14, shared_bytes=0, spill_stores=0, spill_loads=0, stack=0),
        "two": Resources(registers=30, shared_bytes=2048, spill_stores=8, spill_loads=12, stack=16),
    }
    assert log.warnings(LOG) == ()


def test_log_before_compute_capability_9_and_functions_that_are_not_inlined() -> None:
    said = """ptxas info    : 8 bytes gmem, 16 bytes cmem[4]
ptxas info    : Compiling entry function 'decode' for 'sm_75'
ptxas info    : Function properties for decode
ptxas         .     32 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for _Z4tailj
ptxas         .     8 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 40 bytes cumulative stack size, 2048 bytes smem, 368 bytes cmem[0]
toy.cu(3): warning #177-D: variable "x" was declared but never referenced
Remark: The warnings can be suppressed with "-diag-suppress <warning-number>"
"""
    assert log.resources(said) == {"decode": Resources(64, 2048, 5, 10, 40)}
    assert log.warnings(said) == ('toy.cu(3): warning #177-D: variable "x" was declared but never referenced',)


def test_a_log_in_other_words_is_not_taken_for_zero() -> None:
    said = LOG.replace("Used 14 registers", "registers: 14")
    assert list(log.resources(said)) == ["two"]


def test_source_that_does_not_compile(compiler: Compiler, caplog: pytest.LogCaptureFixture) -> None:
    compiler.error = RuntimeError(
        "6: NVRTC_ERROR_COMPILATION, compilation log:\n\ntoy.cu(6): error: no `x`\n  x = 3;\n"
    )
    with caplog.at_level("DEBUG", "tcw"), pytest.raises(cuda.NoGpu) as caught:
        build.compile_op("toy", "sm_90")
    assert caught.value.message == (
        "the kernel `toy` does not compile for sm_90 with NVRTC 13.5: toy.cu(6): error: no `x`"
    )
    assert "TCW_DEBUG=1" in caught.value.hint
    assert caught.value.__cause__ is compiler.error
    assert "x = 3;" in caplog.text
    assert compiler.closed == 1


def test_an_error_without_a_log(compiler: Compiler) -> None:
    compiler.error = RuntimeError("NVRTC_ERROR_INTERNAL_ERROR:\nsomething")
    with pytest.raises(cuda.NoGpu, match=r"NVRTC 13\.5: NVRTC_ERROR_INTERNAL_ERROR: something$"):
        build.compile_op("toy", "sm_90")


def test_an_older_cuda_core_needs_a_driver_to_compile(compiler: Compiler) -> None:
    class DynamicLibNotFoundError(RuntimeError):
        pass

    compiler.error = DynamicLibNotFoundError('"cuda" is an NVIDIA driver library')
    with pytest.raises(cuda.NoGpu, match="compiles only where an NVIDIA driver is installed") as caught:
        build.compile_op("toy", "sm_90")
    assert caught.value.hint == "pip install -U cuda-core"


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((7, 5), "sm_75"),
        ((8, 0), "sm_80"),
        ((8, 7), "sm_87"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
    ],
)
def test_architecture(compiler: Compiler, capability: tuple[int, int], arch: str) -> None:
    assert build.architecture(*capability) == arch


def test_gpus_that_are_too_old_and_too_new(compiler: Compiler) -> None:
    with pytest.raises(cuda.NoGpu, match=r"compute capability 7.0 is below 7.5") as caught:
        build.architecture(7, 0)
    assert "--device cpu" in caught.value.hint
    with pytest.raises(cuda.NoGpu, match=r"NVRTC 13.5 does not compile for compute capability 15.0") as caught:
        build.architecture(15, 0)
    assert "pip install -U" in caught.value.hint
