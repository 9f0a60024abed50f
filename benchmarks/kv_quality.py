"""What KV-cache policies cost and save: real bytes against passkeys, copies of passages and the text that follows.

    python benchmarks/kv_quality.py                                # all rows of the table
    python benchmarks/kv_quality.py --only "snapkv .5" kv-quarter  # some rows, SPECs joined by +, or recipes
    python benchmarks/kv_quality.py --peer peer.json               # with kvpress's rows, made by kv_peer.py
    python benchmarks/kv_quality.py --export tasks.json            # the tasks, for kv_peer.py

The tasks are those of `tcw verify --suite kv` (tcw/verify/kv_tasks.py): the context is prefilled and compressed before
it is known what will be asked. Prefill attention is dense under every policy, so one prefill serves all of them: each
layer of a cache shows the call to the policies' own layers, which compress it as they would alone. `--alone` runs every
policy by itself, to see that this is true. What follows is read through each policy's own cache.

`ratio` is the bytes of the whole cache after the context over those of dense keys and values, both in `--count-as`
(what the model would be served in), from the plan. `plan` says that the plan in the dtype of this run agrees with the
storages of every cache. Values are means over tasks; seconds are medians, of compression beyond the prefill and of
reading the answer. Writes results/kv_quality-DATE.json after every few rows; rows that are there already are left.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tcw
from tcw import recipe
from tcw.calibration import Settings, texts
from tcw.errors import TcwError
from tcw.kv import KVMethod, LayerShape
from tcw.kv.cache import PolicyCache
from tcw.kv.layer import PolicyLayer
from tcw.kv.policy import Policy
from tcw.runtime.load import tokenizer
from tcw.verify import kv_tasks

EVICTING = (
    "random", "streaming-llm", "knorm", "keydiff", "tova", "h2o", "snapkv", "pyramidkv", "expected-attention",
    "scalekv", "triattention", "lacache",
)  # fmt: skip
ROWS = {
    **{f"{name} {ratio}": [f"{name}:ratio={ratio}"] for ratio in (0.5, 0.25) for name in EVICTING},
    "zipvl": ["zipvl"],
    "razorattention 0.5": ["razorattention:ratio=0.5"],
    "razorattention 0.27": ["razorattention:ratio=0.27"],
    "cskv": ["cskv"],
    "cskv + kivi 4": ["cskv", "kivi:bits=4"],
    "pooled-memory": ["pooled-memory"],
    "kivi 4": ["kivi:bits=4"],
    "kivi 2": ["kivi:bits=2"],
    "zipcache": ["zipcache"],
    "hadamard 4, 3": ["hadamard:key_bits=4,value_bits=3"],
    "hadamard 2": ["hadamard:bits=2"],
    "kvtc 3": ["kvtc:bits=3"],
    "kvtc 2": ["kvtc:bits=2"],
    "kvtc 1.25, 1.875": ["kvtc:key_bits=1.25,value_bits=1.875,window=16,interval=16"],
    "kvtc 1": ["kvtc:bits=1"],
    "keydiff 0.5 + kvtc 3": ["keydiff:ratio=0.5", "kvtc:bits=3"],
    "keydiff 0.5 + hadamard 4, 3": ["keydiff:ratio=0.5", "hadamard:key_bits=4,value_bits=3"],
    "snapkv 0.5 + kivi 4": ["snapkv:ratio=0.5", "kivi:bits=4"],
    "razorattention 0.5 + kivi 4": ["razorattention:ratio=0.5", "kivi:bits=4"],
    "razorattention 0.27 + kivi 4": ["razorattention:ratio=0.27", "kivi:bits=4"],
    "kv-quarter": ["kv-quarter"],
    "kv-eighth": ["kv-eighth"],
}
RESULTS = Path(__file__).parent / "results"


class Shared(PolicyLayer):
    """A layer that computes dense attention once and lets the layers of several policies see and keep the call."""

    def __init__(self, shape: LayerShape, inner: list[PolicyLayer], seconds: list[float]) -> None:
        super().__init__(shape, lambda device: [])
        self.inner, self.seconds = inner, seconds

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for layer in self.inner:
            layer.update(key_states, value_states)
        return super().update(key_states, value_states)  # the last mark on the keys is this layer's

    def attend(
        self, base: Any, module: Any, query: Tensor, mask: Tensor | None, scaling: float | None = None, **kwargs: Any
    ) -> Tensor:
        assert self._new is not None
        (keys, values), self._new = self._new, None
        out = base(module, query, keys, values, mask, scaling=scaling, **kwargs)[0]
        for i, layer in enumerate(self.inner):
            start = time.perf_counter()
            layer.attend(_no_attention, module, query, mask, scaling, **kwargs)
            self.seconds[i] += time.perf_counter() - start
        return out


def _no_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def prefilled(
    model: Any, policies: dict[str, Policy], context: Tensor, alone: bool
) -> Iterator[tuple[str, PolicyCache, float]]:
    """A cache of the context under each policy, and the seconds that it took to compress it."""
    caches = {name: policy.new_cache(model) for name, policy in policies.items()}
    if alone:
        for name, cache in caches.items():
            start = time.perf_counter()
            kv_tasks.prefill(model, context, cache)
            yield name, cache, time.perf_counter() - start
        return
    seconds = [0.0] * len(caches)
    shapes = next(iter(policies.values())).layers
    layers = {s.index: Shared(s, [cache.layers[s.index] for cache in caches.values()], seconds) for s in shapes}
    kv_tasks.prefill(model, context, PolicyCache(model.config, layers))
    yield from zip(caches, caches.values(), seconds, strict=True)


def follow(model: Any, task: kv_tasks.Task, cache: Any) -> dict[str, float]:
    """Read what follows a task's context: mean loss of the scored tokens, and how many were the likeliest."""
    start = time.perf_counter()
    rows = model(input_ids=task.follow[None], past_key_values=cache).logits[0, task.first - 1 : -1].double()
    losses = rows.logsumexp(-1) - rows.gather(1, task.targets[:, None])[:, 0]
    right = (rows.argmax(-1) == task.targets).double()
    return {"nll": float(losses.mean()), "right": float(right.mean()), "seconds": time.perf_counter() - start}


def measure(model: Any, policies: dict[str, Policy], tasks: list[kv_tasks.Task], options: Any) -> list[dict[str, Any]]:
    """A row for each policy."""
    planned = {name: policy.plan(options.context) for name, policy in policies.items()}
    found: dict[str, dict[str, list[float]]] = {name: {"compress": [], "agrees": []} for name in policies}
    for i, task in enumerate(tasks, 1):
        with torch.inference_mode():
            for name, cache, seconds in prefilled(model, policies, task.context, options.alone):
                held = kv_tasks.cache_bytes(cache)
                found[name]["compress"].append(seconds)
                found[name]["agrees"].append(
                    held <= planned[name].bytes if planned[name].bounded else held == planned[name].bytes
                )
                found[name].setdefault("held", []).append(held / planned[name].dense_bytes)
                for key, value in follow(model, task, cache).items():
                    found[name].setdefault(f"{task.kind} {key}", []).append(value)
        print(f"\r{i}/{len(tasks)}", end="", file=sys.stderr, flush=True)
    print("\r", end="", file=sys.stderr)
    rows = []
    for name, policy in policies.items():
        plan = policy.plan(options.context, dtype=getattr(torch, options.count_as))
        sizes = {"ratio": plan.ratio, "bytes": plan.bytes, "shared_bytes": plan.shared_bytes, "bounded": plan.bounded}
        if plan.bounded:  # only a run knows
            sizes["ratio"] = statistics.fmean(found[name]["held"])
        rows.append({"name": name, **sizes, "plan": all(found[name]["agrees"]), **summary(found[name])})
    return rows


def summary(found: dict[str, list[float]]) -> dict[str, Any]:
    """Means by kind of task; medians of seconds."""
    row: dict[str, Any] = {}
    if "passkey nll" in found:
        nlls = found["passkey nll"]
        row |= {"key_nll": statistics.fmean(nlls), "key_nll_worst": max(nlls), "key_nlls": [round(x, 4) for x in nlls]}
        row |= {"exact": sum(x == 1 for x in found["passkey right"]), "passkeys": len(nlls)}
        row["seconds_answer"] = statistics.median(found["passkey seconds"])
    if "copy nll" in found:
        row |= {"copy_nll": statistics.fmean(found["copy nll"]), "copied": statistics.fmean(found["copy right"])}
    if "next nll" in found:
        row["next_nll"] = statistics.fmean(found["next nll"])
    if "compress" in found:
        row["seconds_compress"] = statistics.median(found["compress"])
    return row


def full(model: Any, tasks: list[kv_tasks.Task]) -> dict[str, Any]:
    """The row of the cache that transformers uses by itself."""
    found: dict[str, list[float]] = {}
    for task in tasks:
        with torch.inference_mode():
            cache = kv_tasks.full_cache(model)
            kv_tasks.prefill(model, task.context, cache)
            for key, value in follow(model, task, cache).items():
                found.setdefault(f"{task.kind} {key}", []).append(value)
    return {"name": "full", "specs": [], "ratio": 1.0, **summary(found)}


def specs_of(name: str) -> list[str]:
    """SPECs of a row of the table, of a recipe's KV policies, or `a:x=1 + b:y=2` as typed."""
    specs = ROWS.get(name) or [part.strip() for part in name.split("+")]
    if specs[0] not in recipe.names():
        return specs
    return [step.spec() for step in recipe.load(specs[0]).steps if isinstance(step.build(), KVMethod)]


def peer_rows(path: Path, reference: dict[str, Any]) -> list[dict[str, Any]]:
    """kvpress's rows; its own full cache must do what ours does, or the tasks are not the same."""
    peer = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in peer["rows"]}
    if abs(rows["full"]["key_nll"] - reference["key_nll"]) > 1e-3:
        raise SystemExit(f"{path}: its full cache has key NLL {rows['full']['key_nll']}, not {reference['key_nll']}")
    version = peer["packages"]["kvpress"]
    return [{**row, "name": f"kvpress {name}", "kvpress": version} for name, row in rows.items() if name != "full"]


def show(row: dict[str, Any], reference: dict[str, Any]) -> None:
    if "error" in row:
        print(f"| {row['name']:44} | {row['error']} |", flush=True)
        return
    nan = float("nan")
    cells = [f"{row['name']:44}", f"{row.get('ratio', row.get('real_bytes')):5.3f}", f"{row['key_nll']:6.3f}"]
    cells += [f"{row['exact']:3}", f"{row.get('copied', nan):5.3f}"]
    cells += [f"{row.get('next_nll', nan) - reference.get('next_nll', nan):+7.4f}"]
    cells += [f"{row.get('seconds_compress', 0):6.2f}", f"{row.get('seconds_answer', 0):5.2f}"]
    print(f"| {' | '.join([*cells, '' if row.get('plan', True) else 'plan differs'])} |", flush=True)


def machine() -> dict[str, Any]:
    """The machine's kind, without its name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "cpu": names[0] if names else platform.processor(), "cores": cores, "load": os.getloadavg()[0],
        "python": platform.python_version(), **packages,
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2", help="what tcw takes as MODEL")
    parser.add_argument("--only", nargs="+", help="rows of the table, recipes, or SPECs joined by +")
    parser.add_argument("--context", type=int, default=kv_tasks.CONTEXT, help="tokens")
    parser.add_argument("--placements", type=int, default=kv_tasks.PLACEMENTS, help="passkeys")
    parser.add_argument("--copies", type=int, default=kv_tasks.COPIES)
    parser.add_argument("--continuations", type=int, default=kv_tasks.CONTINUATIONS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=Settings().samples, help="sequences to calibrate on")
    parser.add_argument("--dtype", default="float32", help="of the run")
    parser.add_argument("--count-as", default="bfloat16", help="dtype that bytes are counted for")
    parser.add_argument("--batch", type=int, default=8, help="policies that share a prefill")
    parser.add_argument("--alone", action="store_true", help="a prefill for each policy")
    parser.add_argument("--again", action="store_true", help="measure rows that the results have already")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export", type=Path, help="write the tasks and the model's folder, and stop")
    parser.add_argument("--peer", type=Path, help="results of kv_peer.py to put beside")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write the results."""
    options = arguments()
    torch.set_num_threads(options.threads)
    source = tcw.open_model(options.model)
    counts = {name: getattr(options, name) for name in ("placements", "copies", "continuations", "seed")}
    tasks = kv_tasks.make_tasks(kv_tasks.Prose(tokenizer(source)), options.context, **counts)
    if options.export:
        shown = [
            {"kind": t.kind, "context": t.context.tolist(), "follow": t.follow.tolist(), "first": t.first}
            for t in tasks
        ]
        options.export.write_text(json.dumps({"model": str(source.path), "tasks": shown}) + "\n", encoding="utf-8")
        return
    settings = {"model": options.model, "context": options.context, **counts}
    settings |= {
        "dtype": options.dtype,
        "count_as": options.count_as,
        "alone": options.alone,
        "samples": options.samples,
    }
    report = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine(), **settings}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kv_quality-{report['date']}.json"
    report["rows"] = kept_rows(path, settings)
    run(options, source, tasks, report, path)


def kept_rows(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of an earlier run with the same settings."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return before.get("rows", []) if all(before.get(k) == v for k, v in settings.items()) else []


def run(options: argparse.Namespace, source: Any, tasks: list[Any], report: dict[str, Any], path: Path) -> None:
    """All rows that are wanted and not there yet."""
    model = tcw.load(source, residency="bf16", device="cpu", dtype=getattr(torch, options.dtype))
    rows: list[dict[str, Any]] = report["rows"]
    text = texts.sequences(tokenizer(source), texts.read_texts(None), options.samples, Settings().length)
    have = {(row["name"], *row.get("specs", ())) for row in rows}
    if not any(row["name"] == "full" for row in rows):
        rows.insert(0, full(model, tasks))
    reference = next(row for row in rows if row["name"] == "full")
    show(reference, reference)
    wanted = {name: specs_of(name) for name in options.only or ROWS}
    names = [name for name in wanted if options.again or (name, *wanted[name]) not in have]
    for start in range(0, len(names), options.batch):
        policies = {}
        for name in names[start : start + options.batch]:
            try:
                policies[name] = Policy.make(wanted[name], model, torch.from_numpy(text))
            except TcwError as error:
                print(f"{name}: {error}", file=sys.stderr)
        for row in measure(model, policies, tasks, options):
            rows[:] = [old for old in rows if old["name"] != row["name"]]
            rows.append({**row, "specs": wanted[row["name"]]})
            show(row, reference)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.peer:
        rows[:] = [row for row in rows if not row["name"].startswith("kvpress")]
        rows += (peer := peer_rows(options.peer, reference))
        for row in peer:
            show(row, reference)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
