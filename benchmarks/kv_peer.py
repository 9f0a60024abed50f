"""kvpress on the tasks of kv_quality.py, in kvpress's own environment: it needs another transformers than tcw does.

    python benchmarks/kv_quality.py --export tasks.json                        # in tcw's environment
    python -m venv peer && peer/bin/pip install kvpress                        # 0.5.5 pins transformers below 5.3
    peer/bin/python benchmarks/kv_peer.py MODEL tasks.json peer.json           # MODEL: "model" in tasks.json
    python benchmarks/kv_quality.py --peer peer.json                           # rows of both in one table

Contexts are prefilled and compressed before the question is known; question and key, and the text that follows, are
then read in one forward each, as kv_quality.py does it. All presses that work inside prefill see the same prefill:
their hooks run after a layer's attention and change only the cache. KVzip and ObservedAttention run on their own.

`kept` is the share of entries that a press keeps. `real_bytes` is the share of memory that its cache really takes,
by the storages of its tensors: presses that mask entries instead of removing them keep all of them in memory.
"""

import argparse
import copy
import importlib.metadata
import json
import logging
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kvpress
import torch
from kvpress.presses import duo_attention_press
from kvpress.presses.base_press import BasePress
from transformers import AutoModelForCausalLM, DynamicCache

ON_ITS_OWN = ("ObservedAttention", "KVzip", "KVzip layerwise")
SINKS_AND_RECENT, CONTEXT = 384, 1000  # what DuoAttention's streaming heads keep, of contexts of that length


def presses(ratio: float, duo: bool) -> dict[str, BasePress]:
    """Presses with their defaults; wrappers around the scorers that their papers use."""
    k = kvpress
    streaming = min(1.0, ratio / (1 - SINKS_AND_RECENT / CONTEXT))
    found = {"DuoAttention on the fly": k.DuoAttentionPress(head_compression_ratio=streaming, on_the_fly_scoring=True)}
    return (found if duo else {}) | {
        "Random": k.RandomPress(ratio),
        "StreamingLLM": k.StreamingLLMPress(ratio),
        "Knorm": k.KnormPress(ratio),
        "KeyDiff": k.KeyDiffPress(ratio),
        "LagKV": k.LagKVPress(ratio),
        "SnapKV": k.SnapKVPress(ratio),
        "PyramidKV": k.PyramidKVPress(ratio),
        "TOVA": k.TOVAPress(ratio),
        "ExpectedAttention": k.ExpectedAttentionPress(ratio),
        "ChunkKV SnapKV": k.ChunkKVPress(k.SnapKVPress(ratio)),
        "AdaKV SnapKV": k.AdaKVPress(k.SnapKVPress(ratio)),
        "AdaKV ExpectedAttention": k.AdaKVPress(k.ExpectedAttentionPress(ratio)),
        "CriticalAdaKV SnapKV": k.CriticalAdaKVPress(k.SnapKVPress(ratio)),
        "ObservedAttention": k.ObservedAttentionPress(ratio),
        "KVzip": k.KVzipPress(ratio),
        "KVzip layerwise": k.KVzipPress(ratio, layerwise=True),
    }


class Several(BasePress):
    """Run the presses inside one prefill that leaves the cache whole; keep what each would have left."""

    def __init__(self, inner: dict[str, BasePress]) -> None:
        self.inner = inner
        self.layers: dict[str, list[tuple[Any, Any, Any]]] = {name: [] for name in inner}
        self.seconds = dict.fromkeys(inner, 0.0)
        self.errors: dict[str, str] = {}

    def post_init_from_model(self, model: Any) -> None:
        for name, press in self.inner.items():
            self._try(name, lambda press=press: press.post_init_from_model(model))

    def compress(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        for name, press in self.inner.items():
            start = time.perf_counter()
            module.masked_key_indices = None
            call = (module, hidden_states, keys.clone(), values.clone(), attentions, kwargs)
            left = self._try(name, lambda press=press, call=call: press.compress(*call))
            if left is not None:
                self.layers[name].append((*left, module.masked_key_indices))
            self.seconds[name] += time.perf_counter() - start
        module.masked_key_indices = None
        return keys, values

    def _try(self, name: str, call: Any) -> Any:
        if name in self.errors:
            return None
        try:
            return call()
        except Exception as error:
            self.errors[name] = f"{type(error).__name__}: {error}"
            return None


def compressed(model: Any, context: Any, options: argparse.Namespace) -> Iterator[tuple[str, Any, list[Any], float]]:
    """For each press a cache of `context`, what its layers mask, and the seconds it took beyond the prefill."""
    several: dict[str, BasePress] = {}
    own: dict[str, BasePress] = {}
    for ratio in options.ratios:
        for name, press in presses(ratio, bool(options.text)).items():
            if not options.only or name in options.only:
                (own if name in ON_ITS_OWN else several)[f"{name} @{ratio}"] = press
    layers = [layer.self_attn for layer in model.model.layers]
    together, cache = Several(several), DynamicCache()
    start = time.perf_counter()
    with together(model):
        model.model(input_ids=context, past_key_values=cache)
    prefill = time.perf_counter() - start - sum(together.seconds.values())
    yield "full", cache, [None] * len(layers), prefill
    for name, held in together.layers.items():
        if name in together.errors:
            yield name, together.errors[name], [], 0.0
            continue
        cut = copy.deepcopy(cache)
        for layer, (keys, values, _) in zip(cut.layers, held, strict=True):
            layer.keys, layer.values = keys, values
        yield name, cut, [masked for _, _, masked in held], together.seconds[name]
    for name, press in own.items():
        start = time.perf_counter()
        cut = DynamicCache()
        model.set_attn_implementation("eager" if name.startswith("ObservedAttention") else "sdpa")
        try:
            with press(model):
                model.model(input_ids=context, past_key_values=cut)
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}", [], 0.0
            continue
        finally:
            model.set_attn_implementation("sdpa")
        masked = [getattr(layer, "masked_key_indices", None) for layer in layers]
        yield name, cut, masked, time.perf_counter() - start - prefill


def follow(model: Any, cache: Any, masked: list[Any], tokens: list[int], seen: int) -> Any:
    """Log-probabilities [len(tokens), vocabulary] after reading `tokens`; the cache stays as it was.

    Layers that keep unequally many tokens (PyramidKV) cannot read several tokens at once: transformers makes one mask.
    They are read one by one.
    """
    for layer, indices in zip(model.model.layers, masked, strict=True):
        layer.self_attn.masked_key_indices = indices
    equal = len({layer.keys.shape[2] for layer in cache.layers}) == 1
    cache = copy.deepcopy(cache)
    logits = []
    for chunk in [tokens] if equal else [[token] for token in tokens]:
        positions = torch.arange(seen, seen + len(chunk))[None]
        logits.append(model(torch.tensor([chunk]), past_key_values=cache, position_ids=positions).logits[0])
        seen += len(chunk)
    return torch.cat(logits).float().log_softmax(-1)


def losses(logs: Any, tokens: list[int], first: int) -> tuple[float, float]:
    """Mean nats of tokens[first:], and the share of them that were the likeliest."""
    targets = torch.tensor(tokens[first:])
    rows = logs[first - 1 : len(tokens) - 1]
    return -float(rows.gather(1, targets[:, None]).mean()), float((rows.argmax(-1) == targets).double().mean())


def shares(cache: Any, masked: list[Any], dense: Any) -> tuple[float, float]:
    """Entries that count, and bytes that are held, of those of the dense cache."""
    entries = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers)
    entries -= sum(len(indices[0]) for indices in masked if indices is not None)
    whole = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in dense.layers)
    size = [sum(t.untyped_storage().nbytes() for c in x.layers for t in (c.keys, c.values)) for x in (cache, dense)]
    return entries / whole, size[0] / size[1]


def measure(model: Any, task: dict[str, Any], rows: dict[str, Any], options: argparse.Namespace) -> None:
    """Add one task to the rows."""
    dense = None
    for name, cache, masked, seconds in compressed(model, torch.tensor([task["context"]]), options):
        row = rows.setdefault(name, {"name": name, "seconds": []})
        if isinstance(cache, str):
            row["error"] = cache
            continue
        dense = cache if dense is None else dense
        row["kept"], row["real_bytes"] = shares(cache, masked, dense)
        logs = follow(model, cache, masked, task["follow"], len(task["context"]))
        for what, value in zip(("nll", "right"), losses(logs, task["follow"], task["first"]), strict=True):
            row.setdefault(f"{task['kind']} {what}", []).append(value)
        row["seconds"].append(seconds)


def give_text(path: Path | None) -> None:
    """Let DuoAttention's head search read a file instead of a data set on the web."""
    text = path.read_text(encoding="utf-8") if path else ""
    pieces = [text[i : i + 4000] for i in range(0, min(len(text), 40_000), 4000)]

    class Chapters:
        def to_pandas(self) -> Any:
            import pandas

            return pandas.DataFrame({"chapter": pieces * 5})

    duo_attention_press.load_dataset = lambda *args, **kwargs: Chapters()


def main() -> None:
    """Measure, and write the results after every task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model in Hugging Face's layout")
    parser.add_argument("tasks", type=Path, help="JSON of kv_quality.py --export")
    parser.add_argument("out", type=Path, help="JSON to write")
    parser.add_argument("--only", nargs="+", help="names of presses")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.5, 0.75], help="what is removed")
    parser.add_argument("--count", type=int, default=1000, help="tasks of a kind at most")
    parser.add_argument("--kinds", nargs="+", default=["passkey", "copy", "next"], help="of tasks")
    parser.add_argument("--text", type=Path, help="text for DuoAttention's head search, which is left out without one")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    give_text(options.text)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    rows: dict[str, Any] = {}
    tasks = json.loads(options.tasks.read_text(encoding="utf-8"))["tasks"]
    tasks = [task for task in tasks if task["kind"] in options.kinds]
    tasks = [task for i, task in enumerate(tasks) if sum(t["kind"] == task["kind"] for t in tasks[:i]) < options.count]
    report = {
        "packages": {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")},
        "tasks": 0, "rows": [],
    }  # fmt: skip
    for done, task in enumerate(tasks, 1):
        with torch.inference_mode():
            measure(model, task, rows, options)
        report["tasks"], report["rows"] = done, [summary(row) for row in rows.values()]
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"{done}/{len(tasks)}", flush=True)


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """A row as kv_quality.py writes them: means over tasks, the median of seconds."""
    if "error" in row:
        return {"name": row["name"], "error": row["error"]}
    found = {key: row[key] for key in ("name", "kept", "real_bytes")}
    found["seconds_compress"] = statistics.median(row["seconds"])
    if nlls := row.get("passkey nll"):
        found |= {"key_nll": statistics.fmean(nlls), "key_nll_worst": max(nlls), "passkeys": len(nlls)}
        found |= {"exact": sum(x == 1 for x in row["passkey right"]), "key_nlls": [round(x, 4) for x in nlls]}
    if nlls := row.get("copy nll"):
        found |= {"copy_nll": statistics.fmean(nlls), "copied": statistics.fmean(row["copy right"])}
    if nlls := row.get("next nll"):
        found["next_nll"] = statistics.fmean(nlls)
    return found


if __name__ == "__main__":
    main()
