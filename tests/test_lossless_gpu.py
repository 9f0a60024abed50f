"""The parts of benchmarks/lossless_gpu.py that a machine without a GPU can run: inputs, checks, processes, ratios."""

import argparse
import contextlib
import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scripts() -> Any:
    """The modules of the benchmark, as they import each other."""
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    names = ("gpu", "inputs", "model", "session", "ways")
    try:
        return SimpleNamespace(**{name: importlib.import_module(f"lossless_{name}") for name in names})
    finally:
        sys.path[:] = before


def bf16(bits: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(bits, np.uint16)).view(torch.bfloat16)


def test_entropy_of_exponents(scripts: Any) -> None:
    entropy = scripts.inputs.exponent_entropy
    assert entropy(bf16([0x3F80, 0x3FFF, 0xBF80])) == 0.0  # sign and mantissa do not count
    assert entropy(bf16([0x3F80, 0x4000] * 8)) == pytest.approx(1.0)
    assert entropy(bf16([e << 7 for e in range(256)])) == pytest.approx(8.0)


def test_weights_have_exponents_like_trained_ones(scripts: Any) -> None:
    for rows, columns in ((64, 256), (1000, 77), (1024, 1024)):
        drawn = scripts.inputs.weights(rows, columns, CPU, 3)
        assert drawn.shape == (rows, columns)
        assert drawn.dtype == torch.bfloat16
        exponents = (drawn.view(torch.int16).numpy().view(np.uint16).reshape(-1) >> 7) & 0xFF
        share = np.bincount(exponents, minlength=256) / exponents.size
        share = share[share > 0]
        assert -(share * np.log2(share)).sum() == pytest.approx(2.60, abs=0.01)
    assert torch.equal(drawn, scripts.inputs.weights(1024, 1024, CPU, 3))
    assert not torch.equal(drawn, scripts.inputs.weights(1024, 1024, CPU, 4))
    with pytest.raises(ValueError, match="too small"):
        scripts.inputs.weights(1, 4, CPU)


def test_real_matrices_come_out_of_a_file(scripts: Any, tmp_path: Path) -> None:
    matrix = scripts.inputs.weights(64, 256, CPU)
    held = {"a": matrix, "norm": torch.ones(8, dtype=torch.bfloat16), "wide": torch.ones(2, 2)}
    save_file(held, tmp_path / "real.safetensors")
    *drawn, (name, make) = scripts.inputs.samples(False, CPU, tmp_path / "real.safetensors")
    assert [name for name, _ in drawn] == ["4096x4096", "1024x4096", "14336x4096", "4096x14336", "128256x4096"]
    assert name == "real"
    assert [torch.equal(found, matrix) for found in make()] == [True]


def options(**changed: Any) -> argparse.Namespace:
    given = {"tiny": True, "device": "cpu", "red": "", "seconds": 0.01, "limit": 0, "out": None, "real": None}
    return argparse.Namespace(**{**given, **changed})


def test_every_decoder_gives_back_every_bit_and_no_time_is_reported(
    scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = bf16([0x7FC1, 0xFF80, 0x8000, 0x0001] * 64).view(4, 64)
    small = scripts.inputs.weights(64, 256, CPU)
    samples = [("none", lambda: 1 / 0), ("odd", lambda: [odd, small]), ("small", lambda: [small])]
    monkeypatch.setattr(scripts.inputs, "samples", lambda tiny, device, real: iter(samples))
    rows = [row for row in scripts.gpu.decode(options(), CPU, set()) if "trying" not in row]
    found = {(row["sample"], row["way"]): row for row in rows}
    assert "division by zero" in found["none", "all"]["left_out"]  # and the next ones are coded all the same
    for way in ("tcw lanes_decode", "tcw df11_decode", "copy"):
        assert found["small", way]["wrong"] == ""
        assert found["small", way]["rehearsed"]
    assert found["odd", "tcw lanes_decode"]["wrong"] == ""
    assert "exponent of 240 or more" in found["odd", "tcw df11_decode"]["left_out"]  # what the layout cannot hold
    for way in ("official decode.ptx", "nvCOMP ANS |u1"):
        assert "runs on a GPU only" in found["small", way]["left_out"]
    assert not any(key.startswith(("ms", "gbps")) for row in rows for key in row)
    red = list(scripts.gpu.decode(options(), CPU, {"tcw lanes_decode"}))
    assert [row["way"] for row in red if "red" in row.get("left_out", "")] == ["tcw lanes_decode"] * 2


def test_both_encoders_give_the_same_bytes(scripts: Any) -> None:
    rows = [row for row in scripts.gpu.encode(options(), CPU, set()) if "trying" not in row]
    assert [row["way"] for row in rows] == ["tcw codec, processor", "tcw lanes_encode"]
    assert rows[1]["wrong"] == ""


def test_a_decoder_that_is_wrong_is_found(scripts: Any) -> None:
    sample = [scripts.inputs.weights(64, 256, CPU)]
    right = scripts.ways.copy(sample)
    assert scripts.ways.wrong(right, sample) == ""

    def last_bit() -> None:
        right.run()
        right.out[-1] ^= 1

    lazy = scripts.ways.Way("", 0, lambda: None, right.found, right.out)
    flipped = scripts.ways.Way("", 0, last_bit, right.found, right.out)
    short = scripts.ways.Way("", 0, right.run, lambda: [right.out[:-1]], right.out)
    assert scripts.ways.wrong(flipped, sample) == "1 of 16384 words are wrong"
    assert "words are wrong" in scripts.ways.wrong(lazy, sample)  # what an earlier run wrote does not count
    assert scripts.ways.wrong(short, sample) == "16383 words instead of 16384"


def test_the_official_kernel_is_launched_as_its_package_does(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tcw.codecs import df11
    from tcw.cuda import packages

    launched: list[Any] = []
    core = SimpleNamespace(LaunchConfig=lambda **sizes: sizes, launch=lambda *arguments: launched.append(arguments))
    monkeypatch.setattr(packages, "core", lambda: core)
    monkeypatch.setattr(scripts.ways, "_official_kernel", lambda: "decode")
    monkeypatch.setattr(scripts.ways, "_cuda", lambda sample: CPU)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    sample = [scripts.inputs.weights(256, 256, CPU)]
    way = scripts.ways.official(sample)
    way.run()
    group = df11.encode(scripts.ways.host_words(sample[0]))
    positions = group.output_positions.view(np.uint32).astype(int)
    (stream, config, kernel, *arguments), *rest = launched
    assert (stream, kernel, rest) == ("stream", "decode", [])
    assert config["grid"] == len(positions) - 1 == -(-group.encoded_exponent.size // 4096)
    assert config["block"] == 512
    assert config["shmem_size"] == 512 * 4 + 4 + 2 * np.diff(positions).max()
    assert arguments[5] == way.out.data_ptr()
    assert arguments[6:] == [len(group.luts), group.encoded_exponent.size, 65536]
    assert all(isinstance(number, np.int32) for number in arguments[6:])
    assert abs(way.nbytes - group.nbytes) <= 2


def test_the_official_kernel_is_found_without_its_package(scripts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("dfloat11"):
        assert b".entry decode(" in scripts.ways.official_ptx().read_bytes()
        assert "dfloat11" not in sys.modules
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(scripts.ways.LeftOut, match="not installed"):
        scripts.ways.official_ptx()


@pytest.fixture
def session(scripts: Any, tmp_path: Path) -> Any:
    return scripts.session.Session(options(out=tmp_path / "results" / "r.json"))


def test_a_part_that_crashes_runs_again_without_what_crashed(
    session: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def run(name: str, command: list[str], longest: float, take: Any) -> tuple[int, str, str]:
        red = command[command.index("--red") + 1]
        asked.append(red)
        take("Some library prints\n")
        take("1\n")
        take('{"trying": "copy"}\n')
        take('{"what": "decode", "sample": "s", "way": "copy"}\n')
        if not red:
            take('{"trying": "tcw lanes_decode"}\n')
            return -signal.SIGSEGV, "", "a\nb\nSegmentation fault\n"
        return 0, "", ""

    session.add({"what": "check", "op": "x"})
    monkeypatch.setattr(session, "run", run)
    assert session.part("decode", tmp_path, 10)
    assert asked == ["", "tcw lanes_decode"]
    written = json.loads(session.path.read_text())
    assert [row["what"] for row in written["rows"]] == ["check", "decode"]
    assert [failure["part"] for failure in written["failures"]] == ["decode"]
    assert "Segmentation fault" in written["failures"][0]["why"]


def test_what_takes_too_long_is_ended_and_its_rows_are_kept(session: Any) -> None:
    code = "import time; print(1, flush=True); time.sleep(60)"
    lines: list[str] = []
    ended, out, _ = session.run("slow", [sys.executable, "-c", code], 1.5, lines.append)
    assert (ended, out, lines) == (-signal.SIGKILL, "1\n", ["1\n"])
    assert 1 < session.report["seconds"]["slow"] < 30
    session.end = 0
    assert session.run("late", [sys.executable, "-c", "print(2)"], 10) == (-signal.SIGKILL, "", "no time is left")


def test_ratios_are_of_one_run(scripts: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"what": "decode", "sample": "s", "way": "tcw lanes_decode", "gbps": 30.0, "ratio": 0.675},
        {"what": "decode", "sample": "s", "way": "official decode.ptx", "gbps": 10.0, "ratio": 0.68},
        {"what": "decode", "sample": "s", "way": "copy", "gbps": 40.0, "ratio": 1.0},
        {"what": "decode", "sample": "t", "way": "tcw lanes_decode", "left_out": "no"},
        {"what": "load", "way": "bf16", "weight_bytes": 1000},
        {"what": "load", "way": "huffman", "weight_bytes": 670},
        {"what": "step", "way": "bf16", "batch": 4, "tokens_per_second": 8.0, "logits": {"bit_identical": True}},
        {"what": "step", "way": "huffman", "batch": 4, "tokens_per_second": 4.0, "graph": True},
    ]
    found = scripts.session.summary(rows)
    assert [(r["times_official"], r["of_copy"]) for r in found["tensors"]] == [
        (3.0, 0.75), (1.0, 0.25), (4.0, 1.0), (None, None),
    ]  # fmt: skip
    assert [(r["times_bf16"], r["weight_bytes_ratio"]) for r in found["model"]] == [(1.0, 1.0), (0.5, 0.67)]


@pytest.mark.parametrize("capturable", [True, False])
def test_a_step_is_timed_as_replays_of_a_graph(
    scripts: Any, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, capturable: bool
) -> None:
    from transformers import LlamaForCausalLM

    @contextlib.contextmanager
    def graph(held: Any) -> Iterator[None]:
        if not capturable:
            raise RuntimeError("operation not permitted")
        yield

    replays: list[int] = []
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 40.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replays.append(1)))
    for name in ("synchronize", "current_stream", "get_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("set_stream", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda value: None)
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    decoder = scripts.model.Decoder(model, 3, CPU)
    assert decoder.first_logits().shape == (3, 256)
    row = decoder.speed()
    assert row["tokens_per_second"] == pytest.approx(3 / 0.040)
    assert row["runs"] == 50  # two seconds of them
    assert row["graph"] is capturable
    assert row.get("no_graph", "") == ("" if capturable else "RuntimeError: operation not permitted")
    assert len(replays) == (53 if capturable else 0)
    steps = 1 + scripts.model.WARM_UP + 1 + 3 + scripts.model.MOST
    assert scripts.model.PROMPT + steps <= scripts.model.LENGTH  # none runs out of the cache


def test_logits_are_held_against_bf16(scripts: Any, tmp_path: Path) -> None:
    logits = torch.tensor([[0.5, 2.0, -1.0]], dtype=torch.bfloat16)
    against = scripts.model._against_bf16
    assert against(tmp_path, "packed", 1, logits) == {"logits": None}
    assert against(tmp_path, "bf16", 1, logits)["logits"]["bit_identical"]
    assert against(tmp_path, "huffman", 1, logits.clone())["logits"]["bit_identical"]
    found = against(tmp_path, "packed", 1, logits + torch.tensor([0, 0, 4.0]).bfloat16())["logits"]
    assert (found["bit_identical"], found["max_difference"], found["same_choice"]) == (False, 4.0, 0.0)


@pytest.mark.slow
def test_all_of_it_rehearses(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    command = [sys.executable, FOLDER / "lossless_gpu.py", "--all", "--tiny", "--device", "cpu", "--out", out]
    done = subprocess.run([*command, "--batches", "1", "3"], capture_output=True, text=True, timeout=600)
    written = json.loads(out.read_text())
    assert written["failures"] == []
    assert done.returncode == 0
    steps = {(row["way"], row["batch"]): row["logits"] for row in written["rows"] if row["what"] == "step"}
    assert {("bf16", 1), ("bf16", 3), ("huffman", 1), ("huffman", 3), ("packed", 1)} <= set(steps)
    assert all(steps["huffman", batch]["bit_identical"] for batch in (1, 3))
    assert "ms_p50" not in out.read_text()
