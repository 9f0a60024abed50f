"""Whole-model decoding for benchmarks/lossless_gpu.py: tokens a second and memory of each residency of one artifact.

The model is a Llama of random weights (lossless_inputs.py), compressed by `tcw compress -m dfloat11` and loaded by
`tcw.load`. A step is one forward pass of transformers for one token a sequence over its static KV cache, and the choice
of the next tokens; it is captured in a CUDA graph, for every residency alike. Memory of weights is what torch's
allocator holds after loading less what it held before.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tcw.bench.clock import capture, percentile, runs_in
from tcw.errors import UsageError

WAYS: dict[str, dict[str, Any]] = {  # to load the artifact, the most wanted first
    "bf16": {"residency": "bf16"},
    "huffman": {"residency": "huffman"},
    "packed": {"residency": "packed", "form": "p4"},
    "huffman-small": {"residency": "huffman", "head": "slices", "overlap": False},  # the least memory
    "packed-p3": {"residency": "packed", "form": "p3"},
    "offload": {"residency": "offload"},
    "packed-mixed": {"residency": "packed", "mixed": True},  # BF16 where that is measured to be faster
    "auto": {"residency": "auto"},
}
BATCHES = (1, 4, 16, 64)
PROMPT, LENGTH = 128, 512  # tokens; the cache has room for LENGTH
WARM_UP, MOST = 4, 200  # steps
SECONDS = 2.0  # of steps for each batch


def prepare(work: Path, sizes: dict[str, Any], device: torch.device) -> Iterator[dict[str, Any]]:
    """Write the model and its artifact into `work`; yields what the artifact takes, on disk."""
    import lossless_inputs

    size = lossless_inputs.write_model(work / "model", sizes, device)
    command = [
        sys.executable, "-m", "tcw", "compress", work / "model", "-m", "dfloat11", "-o", work / "artifact", "--json",
        "--device", str(device),
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"tcw compress: {done.stderr.strip()[-400:]}")
    report = json.loads(done.stdout)
    (work / "model" / "model.safetensors").unlink()  # makes room
    yield {
        "what": "compress", "layers": sizes["num_hidden_layers"], "model_bytes": size, "seconds": report["seconds"],
        "bytes": report["bytes"], "bits_per_weight": report["bits_per_weight"],
    }  # fmt: skip


def measure(work: Path, way: str, device: torch.device, batches: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Load the artifact in `work` in one of `WAYS`, and yield a row for each batch size.

    Logits of a step over the same tokens are held against those that "bf16" left in `work`.
    """
    import tcw

    before = _allocated(device)
    try:
        model = tcw.load(work / "artifact", device=str(device), **WAYS[way])
    except UsageError as error:  # not on this device
        yield {"what": "load", "way": way, "left_out": error.message}
        return
    held = _allocated(device) - before
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # what loading took for a while is not counted
    found = getattr(model, "tcw_residency", None)
    yield {"what": "load", "way": way, "residency": found, "weight_bytes": held if device.type == "cuda" else None}
    for batch in batches:
        row: dict[str, Any] = {"what": "step", "way": way, "batch": batch}
        try:
            decoder = Decoder(model, batch, device)
            row |= _against_bf16(work, way, batch, decoder.first_logits())
            row |= decoder.speed() if device.type == "cuda" else {"rehearsed": True}
            row |= {"peak_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
        except torch.OutOfMemoryError as error:
            row["left_out"] = f"no memory: {str(error).splitlines()[0]}"
        yield row
        decoder = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(device)


class Decoder:
    """One batch of sequences, decoded step by step over a static cache."""

    def __init__(self, model: Any, batch: int, device: torch.device) -> None:
        from transformers import StaticCache

        self._model, self._batch, self._device = model, batch, device
        self._cache = StaticCache(config=model.config, max_cache_len=LENGTH)
        random = torch.Generator().manual_seed(batch)
        words = model.config.vocab_size
        prompt = torch.randint(0, words, (batch, PROMPT + 1), generator=random).to(device)
        self._tokens = prompt[:, -1:].clone()
        self._logits = self._forward(prompt[:, :-1])

    def first_logits(self) -> torch.Tensor:
        """Logits of the first step, [batch, words]; its tokens are given, so that every residency sees the same."""
        return self._forward(self._tokens).cpu()

    def _forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            output = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    def _step(self) -> None:
        logits = self._forward(self._tokens)
        with torch.inference_mode():
            self._tokens.copy_(logits.argmax(-1, keepdim=True))

    def speed(self) -> dict[str, Any]:
        """Milliseconds of a step and tokens a second, from replays of a CUDA graph; without one where it fails."""
        for _ in range(WARM_UP):
            self._step()
        torch.cuda.synchronize()
        graph, why_not = capture(self._step)
        step = self._step if graph is None else graph.replay
        each = _times(step, 3)
        ms = sorted(_times(step, min(MOST, runs_in(SECONDS, each[1] / 1000))))
        low, middle, high = (percentile(ms, percent) for percent in (20, 50, 80))
        return {
            "ms_p20": low, "ms_p50": middle, "ms_p80": high, "tokens_per_second": 1000 * self._batch / middle,
            "runs": len(ms), "graph": not why_not, **({"no_graph": why_not} if why_not else {}),
        }  # fmt: skip


def _times(step: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of each of `count` steps, one behind the other."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


def _against_bf16(work: Path, way: str, batch: int, logits: torch.Tensor) -> dict[str, Any]:
    """How logits differ from those of the residency bf16, which are kept in `work`."""
    path = work / f"logits-{batch}.safetensors"
    if way == "bf16":
        save_file({"logits": logits.contiguous()}, path)
    if not path.exists():
        return {"logits": None}
    expected = load_file(path)["logits"]
    same = torch.equal(expected.view(torch.int16), logits.view(torch.int16))
    return {
        "logits": {
            "bit_identical": same, "finite": bool(logits.isfinite().all()),
            "max_difference": float((expected.float() - logits.float()).abs().max()),
            "largest": float(expected.abs().max()),
            "same_choice": float((expected.argmax(-1) == logits.argmax(-1)).float().mean()),
        }
    }  # fmt: skip
