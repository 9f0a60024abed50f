"""`tcw profile`: what a model costs here, and what each method would save."""

import shlex
from typing import Annotated, Any

import typer

from tcw.cli import options
from tcw.cli.output import out
from tcw.units import show_bytes, show_count

EXAMPLES = (
    ("a small model", "tcw profile demo:smollm2"),
    ("one method, at a long context", "tcw profile ./model --method dfloat11 --context 32768"),
    ("a report to pass on", "tcw profile ./model --html report.html"),
)


def profile(
    model: options.Model,
    method: options.Specs = None,
    device: options.Device = "auto",
    context: Annotated[
        int | None, typer.Option("--context", metavar="N", min=1, help="Tokens of context.  [default: the model's own]")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Sequences at once.")] = 1,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Run the model to time it.")] = True,
    html: options.Html = None,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure what a model costs here, and what each method saves.

    Bytes by part and dtype, memory, time, and what fits. The model is only read.
    Without --method every weight method is tried.
    """
    out.configure(json, quiet, verbose)
    options.check_free(html, force)
    from tcw import methods, recipe
    from tcw import profile as profiling
    from tcw.source import open_source

    specs = list(method or [])
    for spec in specs:
        recipe.parse_spec(spec)  # an unknown method before anything is opened
    with out.progress() as progress:
        source = open_source(model, progress=progress)
        found = profiling.profile(
            source, specs=specs, device=device, context=context, batch=batch, latency=latency, progress=progress
        )
    if html is not None:
        from tcw.profile.html import render

        options.write_report(html, render(found))
        out.note(f"wrote {html}")
    data = found.to_json()
    asked = context is not None or any(methods.family_of(recipe.parse_spec(spec).method) == "kv" for spec in specs)
    out.result(data, lambda: show(data, policies=asked), data["weights"]["bytes"])
    lossless = [m for m in data["methods"] if m["lossless"] and m["bytes"] < data["weights"]["bytes"]]
    if lossless:
        best = min(lossless, key=lambda m: m["bytes"])
        out.hint(
            f"`tcw compress {shlex.quote(model)} --method {best['name']}` would make about {show_bytes(best['bytes'])}"
        )


def show(data: dict[str, Any], *, policies: bool = False) -> None:
    """Print the profile: facts, the model's parts, a row for every method and, with `policies`, for each KV policy."""
    weights, device, kv, context = data["weights"], data["device"], data["kv"], data["context"]
    dtypes = ", ".join(f"{name} {show_bytes(size)}" for name, size in weights["by_dtype"].items())
    entropy = weights["exponent_entropy_bits"]
    out.facts(
        {
            "model": f"{data['model']}, {data['architecture']}",
            "device": f"{device['name']}, copies {device['bandwidth_gbps']:.1f} GB/s",
            "memory": f"{show_bytes(device['memory_bytes'])}, {show_bytes(device['free_bytes'])} free",
            "weights": f"{show_count(weights['parameters'])} parameters, {show_bytes(weights['bytes'])} ({dtypes})",
            "exponents": f"{entropy:.2f} bits of entropy" if entropy is not None else None,
            "KV cache": f"{show_bytes(kv['bytes_per_token'])} a token, {show_bytes(kv['bytes'])} at {_context(context)}"
            if kv["bytes_per_token"]
            else None,
            "latency": _latency(data["latency"]),
        }
    )
    out.text()
    out.table(("part", "tensors", "parameters", "bytes", "share"), _parts(weights["by_part"], weights["bytes"]))
    out.text()
    rows = [_method(method, weights["bytes"]) for method in [data["original"], *data["methods"]]]
    out.table(("method", "bytes", "of now", "bits/weight", "lossless", "needs", "fits", "context"), rows)
    out.text()
    out.text(f"needs: memory to run with {_context(context)}; context: the most tokens that fit here")
    if policies and (kv["policies"] or kv["policies_skipped"]):
        _show_policies(kv, context)
    if data["tokens"]["policies"] or data["tokens"]["policies_skipped"]:
        _show_tokens(data["tokens"])


def _show_policies(kv: dict[str, Any], context: dict[str, Any]) -> None:
    out.text()
    rows = [("full", show_bytes(kv["bytes"]), _percent(kv["bytes"], kv["bytes"]), f"{context['tokens']:,}")]
    for row in kv["policies"]:
        most, bound = row["tokens"][1], "up to " if row["bounded"] else ""
        tokens = f"{most:,}" if row["tokens"][0] == most else f"{row['tokens'][0]:,} to {most:,}"
        rows.append(
            (row["name"], f"{bound}{show_bytes(row['bytes'])}", _percent(row["bytes"], kv["bytes"]), bound + tokens)
        )
    out.table((f"KV policy at {_context(context)}", "bytes", "of full", "tokens a head"), rows)
    for name, why in kv["policies_skipped"].items():
        out.text(f"{name}: {why}")


def _show_tokens(tokens: dict[str, Any]) -> None:
    out.text()
    rows = []
    for row in tokens["policies"]:
        bound, often = "up to " if row["bounded"] else "", "" if row["known"] else "say "
        rows.append(
            (row["name"], f"{bound}{row['kept']:,} of {often}{row['visual']:,} {row['what']}",
             f"{bound}{100 * row['flops_ratio']:.1f} %",
             "none" if row["what"] == "patches" else f"{bound}{100 * row['kv_ratio']:.1f} %")
        )  # fmt: skip
    if rows:
        out.table(("token policy", "left of an image", "prefill FLOPs", "KV cache"), rows)
        if text := max(row["text"] for row in tokens["policies"]):
            out.text(f"of a prompt of one image and {text} tokens of text")
    for name, why in tokens["policies_skipped"].items():
        out.text(f"{name}: {why}")


def _context(context: dict[str, Any]) -> str:
    several = f" x {context['batch']} sequences" if context["batch"] > 1 else ""
    return f"{context['tokens']:,} tokens{several}"


def _latency(latency: dict[str, Any]) -> str:
    if latency.get("forward_ms") is not None:
        return f"{latency['forward_ms']:.0f} ms a pass"
    if latency["prefill_ms"] is None:
        return f"not measured: {latency.get('skipped') or 'no reason given'}"
    prefill = f"prefill {latency['prefill_ms']:.0f} ms"
    if latency.get("prompt_tokens"):
        prefill += f" for {latency['prompt_tokens']} tokens"
    if latency["decode_ms_per_token"] is None:
        return prefill
    bound = latency.get("decode_bound_ms")
    least = f" (memory alone takes {bound:.1f} ms)" if bound else ""
    return f"{prefill}, then {latency['decode_ms_per_token']:.1f} ms a token{least}"


def _method(method: dict[str, Any], total: int) -> tuple[object, ...]:
    size = method["bytes"]
    return (
        method["name"], show_bytes(size), _percent(size, total), f"{method['bits_per_weight']:.2f}",
        "yes" if method["lossless"] else "no", show_bytes(method["needs_bytes"]), "yes" if method["fits"] else "no",
        f"{method['max_context']:,}",
    )  # fmt: skip


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _parts(parts: dict[str, Any], total: int) -> list[tuple[object, ...]]:
    return [
        (name, p["tensors"], show_count(p["parameters"]), show_bytes(p["bytes"]), _percent(p["bytes"], total))
        for name, p in parts.items()
    ]
