"""The decoders that benchmarks/lossless_gpu.py compares: ours, the official DFloat11 kernel, nvCOMP's ANS, and a copy.

Each is a `Way`: what it holds compressed, and how it writes the words. The official kernel is the `decode.ptx` of the
installed `dfloat11` package, found without importing the package (which needs CuPy and an old transformers), loaded
with cuda-core, and launched as dfloat11.py launches it: a block of 512 threads for each 4096 bytes of codes, with
shared memory for its offsets and for the most weights that any block writes.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tcw.codecs import df11, lanes

_THREADS, _BLOCK_BYTES = 512, 4096  # of the official kernel


@dataclass(frozen=True)
class Way:
    """One decoder of one sample.

    Attributes:
        name: of the decoder.
        nbytes: that it holds compressed.
        run: decodes once, on the current stream.
        found: the words that `run` wrote last, int16, one tensor or several, in the order of the sample.
        out: what `run` writes to, to be overwritten before it is checked.
        graph: whether a CUDA graph may hold it.
    """

    name: str
    nbytes: int
    run: Callable[[], object]
    found: Callable[[], list[torch.Tensor]]
    out: torch.Tensor
    graph: bool = True


class LeftOut(Exception):
    """A decoder cannot take part; the message says why."""


Sample = list[torch.Tensor]  # BF16 matrices that are coded together


def host_words(matrix: torch.Tensor) -> np.ndarray:
    """The words of a matrix, uint16 [n], on the host."""
    return matrix.detach().cpu().contiguous().view(torch.int16).numpy().view(np.uint16).reshape(-1)


def flat(sample: Sample) -> torch.Tensor:
    """All words of a sample, int16 [n], one matrix after the other."""
    return torch.cat([matrix.reshape(-1).view(torch.int16) for matrix in sample])


def copy(sample: Sample) -> Way:
    """A copy within the device: what no decoder can beat by much, as it has the words to write too."""
    words = flat(sample)
    out = torch.empty_like(words)
    return Way("copy", words.nbytes, lambda: out.copy_(words), lambda: [out], out)


def our_lanes(sample: Sample) -> Way:
    """kernels/lanes_decode: every matrix a stream, all decoded by one launch."""
    from tcw.kernels.lanes_decode import decode, group

    streams = []
    for matrix in sample:
        stream = lanes.encode(host_words(matrix), "bf16")
        streams.append((stream.parts, stream.params, matrix.numel()))
    held = group(streams).to(sample[0].device)
    out = torch.empty(held.numel, dtype=torch.bfloat16, device=held.device)

    def found() -> list[torch.Tensor]:
        return [view.view(torch.int16) for view in held.views(out)]

    return Way("tcw lanes_decode", held.nbytes, lambda: decode(held, out), found, out)


def our_df11(sample: Sample) -> Way:
    """kernels/df11_decode, on the official layout."""
    from tcw.kernels.df11_decode import decode, group_of

    held = group_of(**vars(_df11(sample))).to(sample[0].device)
    out = torch.empty(sum(matrix.numel() for matrix in sample), dtype=torch.bfloat16, device=sample[0].device)
    return Way("tcw df11_decode", held.nbytes, lambda: decode(held, out), lambda: [out.view(torch.int16)], out)


def official(sample: Sample) -> Way:
    """The kernel that the package dfloat11 brings, on what it calls a group."""
    device = _cuda(sample)
    kernel = _official_kernel()
    from tcw.cuda import packages

    coded = _df11(sample)
    positions = coded.output_positions.view(np.uint32).astype(np.int64)
    blocks = -(-coded.encoded_exponent.size // _BLOCK_BYTES)
    shared = 4 * _THREADS + 4 + 2 * int(np.diff(positions).max())
    if shared > 48 << 10:
        raise LeftOut(f"the official kernel asks for {shared} bytes of shared memory and gets 49152")
    gaps = np.pad(coded.gaps, (0, 2))  # the last thread reads a byte behind them
    parts = (coded.luts, coded.encoded_exponent, coded.sign_mantissa, coded.output_positions, gaps)
    held = [torch.from_numpy(part).to(device) for part in parts]
    out = torch.empty(coded.sign_mantissa.size, dtype=torch.bfloat16, device=device)
    numbers = [np.int32(n) for n in (len(coded.luts), coded.encoded_exponent.size, coded.sign_mantissa.size)]
    arguments = [*(tensor.data_ptr() for tensor in (*held, out)), *numbers]
    core = packages.core()
    config = core.LaunchConfig(grid=blocks, block=_THREADS, shmem_size=shared)

    def run() -> None:
        core.launch(torch.cuda.current_stream(device), config, kernel, *arguments)

    return Way("official decode.ptx", sum(t.nbytes for t in held), run, lambda: [out.view(torch.int16)], out)


@functools.cache
def _official_kernel() -> Any:
    from tcw.cuda import driver, packages

    kernel = packages.core().ObjectCode.from_ptx(official_ptx().read_bytes()).get_kernel("decode")
    driver.load_now(kernel)
    return kernel


def official_ptx() -> Path:
    """Where the installed package dfloat11 has its kernel. Raises LeftOut where it is not installed."""
    spec = importlib.util.find_spec("dfloat11")
    folders = (spec.submodule_search_locations if spec else None) or []
    found = next((path for folder in folders if (path := Path(folder) / "decode.ptx").is_file()), None)
    if found is None:
        raise LeftOut("the package dfloat11 is not installed")
    return found


def nvcomp_ans(sample: Sample, data_type: str) -> Way:
    """nvCOMP's ANS over the words as bytes ("|u1") or as 16-bit floats ("<f2"), with its own sizes of chunks."""
    device = _cuda(sample)
    try:
        from nvidia import nvcomp
    except ImportError as error:
        raise LeftOut(f"nvcomp does not import: {error}") from None
    words = flat(sample).view(torch.uint8)
    stream = torch.cuda.current_stream(device)
    codec = nvcomp.Codec(
        algorithm="ANS", device_id=device.index or 0, cuda_stream=stream.cuda_stream, data_type=data_type
    )
    coded = codec.encode(nvcomp.as_array(words, cuda_stream=stream.cuda_stream))
    config = codec.decompression_config(coded)  # so that no decoding waits for the device
    torch.cuda.synchronize(device)  # its size is known when it is there
    out = torch.empty_like(words)

    def run() -> None:
        codec.decode(coded, data_type="|u1", out=out, decompression_config=config)

    # it works on the stream that it was made with, so a graph of another stream would be empty
    return Way(f"nvCOMP ANS {data_type}", coded.buffer_size, run, lambda: [out.view(torch.int16)], out, graph=False)


def _cuda(sample: Sample) -> torch.device:
    device = sample[0].device
    if device.type != "cuda":
        raise LeftOut("runs on a GPU only")
    return device


_coded: list[tuple[Sample, df11.Group]] = []


def _df11(sample: Sample) -> df11.Group:
    """The sample in the official layout; the last one is remembered, as two decoders want it."""
    if not _coded or _coded[0][0] is not sample:
        _coded[:] = [(sample, df11.encode(flat(sample).cpu().numpy().view(np.uint16)))]
    return _coded[0][1]


def decoders(sample: Sample) -> Iterator[tuple[str, Callable[[], Way]]]:
    """(name, how it is made) of all decoders; making one may raise LeftOut."""
    yield "tcw lanes_decode", lambda: our_lanes(sample)
    yield "tcw df11_decode", lambda: our_df11(sample)
    yield "official decode.ptx", lambda: official(sample)
    yield "nvCOMP ANS |u1", lambda: nvcomp_ans(sample, "|u1")
    yield "nvCOMP ANS <f2", lambda: nvcomp_ans(sample, "<f2")
    yield "copy", lambda: copy(sample)


def wrong(way: Way, sample: Sample) -> str:
    """ "" where a decoder gives back every bit of a sample, else what is wrong; its output is overwritten first."""
    way.out.view(torch.uint8).fill_(0x5A)
    way.run()
    found = torch.cat([part.reshape(-1) for part in way.found()])
    expected = flat(sample)
    if found.shape != expected.shape:
        return f"{found.numel()} words instead of {expected.numel()}"
    bad = int((found != expected).sum())
    return f"{bad} of {expected.numel()} words are wrong" if bad else ""
