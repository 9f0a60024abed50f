"""Does the GPU make the codec's bytes here, and how fast? `tcw bench lanes_encode`."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from tcw.kernels.lanes_encode import OPERATIONS, DeviceStream, Steps, encode
from tcw.kernels.lanes_encode.cases import CASES, Case, make_inputs
from tcw.kernels.lanes_encode.stream import as_words, encode_with

from tcw.bench import Timed

_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_SIZES = (("bf16", 4096 * 4096), ("bf16", 16384 * 16384), ("f16", 8192 * 8192), ("f32", 8192 * 8192))
_SMALL = (("bf16", 256 * 256), ("f16", 256 * 256), ("f32", 256 * 256))


def check(device: torch.device) -> dict[str, str]:
    """Every case against the codec: the kernels on a GPU, plain torch on the CPU."""
    return {case.name: _wrong(case, device) for case in CASES}


def _wrong(case: Case, device: torch.device) -> str:
    words, expected = make_inputs(case)
    on_device = torch.from_numpy(words).to(device)
    found, again = (encode_with(OPERATIONS, on_device, case.split, case.segments, 12).numpy() for _ in range(2))
    if found.params != expected.params:
        return "other parameters than the codec's"
    differ = [name for name, part in expected.parts.items() if not np.array_equal(found.parts[name], part)]
    if any(not np.array_equal(again.parts[name], part) for name, part in found.parts.items()):
        return "other bytes at the second run"
    return f"other bytes than the codec's in {', '.join(differ)}" if differ else ""


def timed(device: torch.device) -> Iterator[Timed]:
    """Gaussian weights: the whole of `encode`, and on a GPU each kernel alone."""
    gpu = device.type == "cuda"
    for split, numel in _SIZES if gpu else _SMALL:
        weight = (torch.randn(numel, device=device) * 0.02).to(_DTYPES[split])
        name = f"{split} {numel}"
        stream = encode(weight, split)
        yield Timed(name, "encode", _whole(weight, split), weight.nbytes + stream.nbytes)
        if gpu:
            yield from _each(name, weight, split, stream)


def _whole(weight: torch.Tensor, split: str) -> Callable[[], DeviceStream]:
    return lambda: encode(weight, split)


def _each(name: str, weight: torch.Tensor, split: str, stream: DeviceStream) -> Iterator[Timed]:
    """The launches of one call of `encode`, with what was given to each of them."""
    given: dict[str, Callable[[], object]] = {}

    def keep(step: str) -> Callable[..., object]:
        operation = getattr(OPERATIONS, step)

        def call(*arguments: object) -> object:
            given[step] = lambda: operation(*arguments)
            return operation(*arguments)

        return call

    encode_with(Steps(keep("count"), keep("measure"), keep("write")), weight, split, None, 12)
    words, parts = as_words(weight, split).nbytes, {key: part.nbytes for key, part in stream.parts.items()}
    written = {
        "count": 0,
        "measure": sum(parts.get(key, 0) for key in ("lane_bytes", "raw", "low")),
        "write": parts["lane_bytes"] + parts["chunk_base"] + parts["codes"],
    }
    for step, run in given.items():
        yield Timed(name, step, run, words + written[step])
