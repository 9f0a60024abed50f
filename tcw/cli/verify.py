"""`tcw verify`: hold an artifact against its source; the exit code is the answer."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tcw.cli import options
from tcw.cli.output import out
from tcw.cli.run import Residency
from tcw.recipe import KV_LIMITS, LIMITS, OUTPUT_LIMITS, TOKEN_LIMITS
from tcw.units import show_seconds

if TYPE_CHECKING:
    from tcw.verify import Verdict

EXAMPLES = (
    ("every tensor against its SHA-256", "tcw verify ./smollm2.lossless"),
    ("outputs too, within limits", "tcw verify ./small --reference ./model --max-kl 0.02 --max-ppl-rise 0.03"),
    ("what the KV policy forgets, against a full cache", "tcw verify ./smaller --suite kv --max-key-nll-rise 0.1"),
    ("does it say the same with compressed weights", "tcw verify ./smollm2.lossless --residency packed"),
)

SHOWN = 5  # tensors that differ, by name

Reference = Annotated[
    str | None, typer.Option("--reference", metavar="MODEL", help="The source, to compare what the two say.")
]
Suites = Annotated[
    list[str] | None, typer.Option(
        "--suite", metavar="NAME", autocompletion=options.complete_suite,
        help="A suite of checks on what the models say; may be given again.",
    ),
]  # fmt: skip
TensorsOnly = Annotated[bool, typer.Option("--tensors-only", help="Compare the tensors and stop.")]
Text = Annotated[Path | None, typer.Option("--text", metavar="FILE", help="Measure perplexity on this text.")]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images", metavar="DIR",
        help="PNG or JPEG files, or a .npy, for a token policy.  [default: scikit-image's, or drawn ones]",
    ),
]  # fmt: skip
InResidency = Annotated[
    Residency | None,
    typer.Option(
        "--residency",
        help="Also run it with its weights kept so, and say what that gives the bits of.",
        show_default=False,
    ),
]
MaxKL = Annotated[
    float | None, typer.Option("--max-kl", metavar="X", min=0, help="Most mean KL of the logits allowed.")
]
MinTop1 = Annotated[
    float | None, typer.Option("--min-top1", metavar="X", min=0, max=1, help="Least top-1 agreement allowed, 0 to 1.")
]
MaxRise = Annotated[
    float | None,
    typer.Option("--max-ppl-rise", metavar="X", min=0, help="Most rise of perplexity allowed; 0.03 is 3 %."),
]
MinGreedy = Annotated[
    float | None,
    typer.Option(
        "--min-greedy", metavar="X", min=0, max=1, help="Least share of greedy tokens before the first other one."
    ),
]
MaxError = Annotated[
    float | None,
    typer.Option("--max-weight-error", metavar="X", min=0, help="Most relative error of a tensor, ||a-b|| / ||b||."),
]
MaxBits = Annotated[
    float | None,
    typer.Option(
        "--max-bits-per-weight", metavar="X", min=0,
        help="Most bits a weight that the first method may have stored, counted in the files.",
    ),
]  # fmt: skip
MaxKVBytes = Annotated[
    float | None,
    typer.Option("--max-kv-bytes", metavar="X", min=0, help="Most of a full KV cache's bytes that a policy may hold."),
]
MaxKeyRise = Annotated[
    float | None,
    typer.Option(
        "--max-key-nll-rise", metavar="X", min=0, help="Most nats more a token of a passkey, under the policy."
    ),
]
MaxNextRise = Annotated[
    float | None,
    typer.Option(
        "--max-next-nll-rise", metavar="X", min=0,
        help="Most nats a token that the KV policy may add to text that goes on.",
    ),
]  # fmt: skip
MaxTokenFlops = Annotated[
    float | None,
    typer.Option(
        "--max-token-flops", metavar="X", min=0, help="Most of the prefill's FLOPs that a token policy may leave."
    ),
]  # fmt: skip
MaxTokenKL = Annotated[
    float | None,
    typer.Option("--max-token-kl", metavar="X", min=0, help="Most mean KL of answers' logits, under the token policy."),
]
MinTokenTop1 = Annotated[
    float | None,
    typer.Option(
        "--min-token-top1", metavar="X", min=0, max=1, help="Least top-1 agreement of answers, under the token policy."
    ),
]  # fmt: skip
MaxAnswerRise = Annotated[
    float | None,
    typer.Option(
        "--max-answer-nll-rise", metavar="X", min=0,
        help="Most nats more a token of the model's own answer, under the token policy.",
    ),
]  # fmt: skip
MinPatchCosine = Annotated[
    float | None,
    typer.Option(
        "--min-patch-cosine", metavar="X", min=0, max=1,
        help="Least cosine of a plain tower's patches, under the token policy.",
    ),
]  # fmt: skip


def verify(
    artifact: options.Artifact,
    reference: Reference = None,
    suite: Suites = None,
    tensors_only: TensorsOnly = False,
    text: Text = None,
    images: Images = None,
    residency: InResidency = None,
    max_kl: MaxKL = None,
    min_top1: MinTop1 = None,
    max_ppl_rise: MaxRise = None,
    min_greedy: MinGreedy = None,
    max_weight_error: MaxError = None,
    max_bits_per_weight: MaxBits = None,
    max_kv_bytes: MaxKVBytes = None,
    max_key_nll_rise: MaxKeyRise = None,
    max_next_nll_rise: MaxNextRise = None,
    max_token_flops: MaxTokenFlops = None,
    max_token_kl: MaxTokenKL = None,
    min_token_top1: MinTokenTop1 = None,
    max_answer_nll_rise: MaxAnswerRise = None,
    min_patch_cosine: MinPatchCosine = None,
    html: options.Html = None,
    force: options.Force = False,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Prove that an artifact still is the model it was made from.

    The verdict is `identical` (bit for bit), `equivalent` (within the limits) or `different` (exit code 1).
    A lossless artifact needs no reference: it carries a hash of every original tensor. A quantised one does; its
    recipe or its methods set limits, which the options below override. Stored policies are measured when there is a
    reference, and without one by `--suite kv` and `--suite tokens`.
    """
    given = dict(locals())
    out.configure(json, quiet, verbose)
    options.check_free(html, force)
    from tcw import verify as verification
    from tcw.source import open_source

    limits = {name: value for name, value in given.items() if name in LIMITS and value is not None}
    work: dict[str, Any] = {"tensors_only": tensors_only, "text": text, "device": device, "images": images}
    with out.progress() as progress:
        verdict = verification.verify(
            open_source(artifact, progress=progress),
            open_source(reference, progress=progress) if reference else None,
            suites=tuple(suite or ()),
            limits=limits or None,
            progress=progress,
            residency=residency.value if residency else None,
            **work,
        )
    if html is not None:
        from tcw.verify.html import render

        options.write_report(html, render(verdict))
        out.note(f"wrote {html}")
    _tell(verdict)


def _tell(verdict: "Verdict") -> None:
    """Print the verdict, and leave with its exit code."""
    data = verdict.to_json()
    out.result(data, lambda: show(data), verdict.verdict)
    if not verdict.ok:
        _say_why(data)
        raise typer.Exit(verdict.exit_code)


def show(data: dict[str, Any]) -> None:
    """Print the checks as a table, stored policies and the limits as further ones, and the verdict."""
    out.table(("check", "result"), _rows(data))
    if kv := data.get("kv"):
        from tcw.verify import kv_report

        out.text()
        out.table(("KV policy", "reference", "artifact"), [row[:3] for row in kv_report.rows(kv)])
        out.text(kv_report.WHY_BOTH)
    if tokens := data.get("tokens"):
        from tcw.verify import token_report

        out.text()
        rows = [(row.name, row.reference, row.artifact, *row.controls) for row in token_report.rows(tokens)]
        out.table(("token policy", *token_report.heads(tokens)), rows)
        out.text(token_report.why(tokens))
    limits = [
        (limit["name"], _number(limit["value"]), _number(limit["limit"]), "pass" if limit["ok"] else "FAIL")
        for limit in data.get("limits") or []
    ]
    if limits:
        out.text()
        out.table(("limit", "found", "allowed", ""), limits)
    out.text()
    took = f", found in {show_seconds(data['seconds'])}" if data.get("seconds") else ""
    out.text(f"verdict: {data['verdict']}{took}")


def _rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    tensors = data["tensors"]
    rows = [("tensors", f"{tensors['identical']} of {tensors['checked']} identical")]
    for name in tensors["different"][:SHOWN]:
        rows.append(("  different", f"{name}: {tensors.get('reasons', {}).get(name, 'other bytes')}"))
    if len(tensors["different"]) > SHOWN:
        rows.append(("", f"and {len(tensors['different']) - SHOWN} more (`--json` has them all)"))
    rows += [("file changed", name) for name in tensors.get("files_changed") or []]
    if (data.get("runtime") or {}).get("residency") == "packed":
        rows.append(("runs", "with quantised inputs, as its method says"))
    sections = (
        ("weights", _weights), ("logits", _logits), ("perplexity", _perplexity), ("generation", _generation),
    )  # fmt: skip
    for section, lines in sections:
        measured = data.get(section) or {}
        if any(value is not None for value in measured.values()):
            rows += lines(measured)
    if residency := data.get("residency"):
        rows += _residency(residency)
    if kv := data.get("kv"):
        from tcw.verify import kv_report

        rows += kv_report.gate_rows(kv)
    if tokens := data.get("tokens"):
        from tcw.verify import token_report

        rows += token_report.gate_rows(tokens)
    skipped = data.get("skipped") or {}
    # a limit on output that was not compared at all needs no line of its own
    shown = [name for name in skipped if "outputs" not in skipped or name not in OUTPUT_LIMITS]
    return rows + [(name, f"not compared: {skipped[name]}") for name in shown]


def _residency(residency: dict[str, Any]) -> list[tuple[str, str]]:
    """What running with compressed weights gave the bits of, and how far it is from what it did not."""
    plain, proved = residency["plain"], residency["proved"]
    rows = [f"bit-identical to {proved}"] if proved else []
    if not plain["bit_identical"]:
        kl = "" if plain["mean_kl"] is None else f", mean KL {_number(plain['mean_kl'])}"
        rows.append(f"against decoded weights: largest difference {_number(plain['max_abs_diff'])}{kl}")
    return [(f"residency {residency['name']}" if i == 0 else "", row) for i, row in enumerate(rows)]


def _weights(weights: dict[str, Any]) -> list[tuple[str, str]]:
    """Nothing for what is lossless: no tensor has an error."""
    if not weights.get("max_error"):
        return []
    rows = [f"largest relative error {_number(weights['max_error'])}: {weights['max_error_tensor']}"]
    methods = weights["methods"] or {}
    bits = [f"{name} {method['bits_per_weight']:.3f}" for name, method in methods.items()]
    if bits:
        rows.append(f"bits a weight: {', '.join(bits)}")
    return [("weights" if i == 0 else "", row) for i, row in enumerate(rows)]


def _logits(logits: dict[str, Any]) -> list[tuple[str, str]]:
    if logits["bit_identical"]:
        return [("logits", "identical bit for bit")]
    return [
        ("logits", f"largest difference {_number(logits['max_abs_diff'])}"),
        ("", f"mean KL {_number(logits['mean_kl'])}, top-1 agreement {_percent(logits['top1_agreement'])}"),
    ]


def _perplexity(perplexity: dict[str, Any]) -> list[tuple[str, str]]:
    reference, artifact = _number(perplexity["reference"]), _number(perplexity["artifact"])
    return [("perplexity", f"{artifact}, the reference has {reference}: rise {_percent(perplexity['rise'])}")]


def _generation(generation: dict[str, Any]) -> list[tuple[str, str]]:
    same, tokens = generation["identical_tokens"], generation["tokens"]
    before = "" if same == tokens else " before the first other one"
    return [("generation", f"{same} of {tokens} tokens identical{before}")]


def _say_why(data: dict[str, Any]) -> None:
    past = [each["name"] for each in data.get("limits") or [] if not each["ok"]]
    failed = list(data.get("failed") or {})
    if out.mode == "json":
        return
    if failed:
        out.error(f"failed: {', '.join(failed)}", "`--json` has the numbers; a policy that fails must not be used")
    elif past:
        out.error(f"past {'its limit' if len(past) == 1 else 'its limits'}: {', '.join(past)}")
    elif policy := _unlimited(data):
        what, flags = {
            "kv": ("KV policy", "`--max-key-nll-rise X` and `--max-next-nll-rise X`"),
            "tokens": ("token policy", "`--max-token-kl X` or `--min-token-top1 X`, of a tower `--min-patch-cosine X`"),
        }[policy]
        out.error(
            f"the {what} changes what the model says, and no limit says how much it may",
            f"{flags}, or the same in the recipe",
        )
    else:
        out.error("the artifact differs from its source", "`tcw info` shows its methods; compress the model again")


def _unlimited(data: dict[str, Any]) -> str:
    """The policy that no limit was set on, where that is all that stands against the artifact; else ""."""
    limits = {limit["name"] for limit in data.get("limits") or []}
    likeness = {"kv": set(KV_LIMITS) - {"max_kv_bytes"}, "tokens": set(TOKEN_LIMITS) - {"max_token_flops"}}
    free = [policy for policy, names in likeness.items() if data.get(policy) and not limits & names]
    return free[0] if free and (limits or not data["tensors"]["different"]) else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
