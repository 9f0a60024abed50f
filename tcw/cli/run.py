"""`tcw run`: generate text with an artifact."""

import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from tcw.cli import options
from tcw.cli.output import out
from tcw.errors import UsageError
from tcw.units import show_bytes, show_seconds

EXAMPLES = (
    ("ask something", 'tcw run ./smollm2.lossless "What is the capital of France?"'),
    ("keep the weights compressed in memory", 'tcw run ./smollm2.lossless "Once upon a time" --residency huffman'),
    ("a model that the GPU cannot hold", "tcw run ./big.lossless --residency offload --device cuda"),
    ("the prompt from a pipe, the text to a file", "tcw run ./smollm2.lossless - --max-new-tokens 200"),
)
PROMPT = "What is the capital of France?"


class Residency(StrEnum):
    """How compressed weights lie in memory."""

    AUTO = "auto"
    BF16 = "bf16"
    HUFFMAN = "huffman"
    PACKED = "packed"
    OFFLOAD = "offload"


def run(
    artifact: options.Artifact,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to go on from; - reads it from stdin.")
    ] = PROMPT,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", metavar="N", min=1, help="Stop after this many tokens.")
    ] = 64,
    residency: Annotated[
        Residency,
        typer.Option(
            "--residency",
            help="bf16: decode once; huffman: stay compressed, decode as needed; packed: multiply with codes, or with "
            "BF16 in 12 bits; offload: stay compressed beside the GPU.",
        ),
    ] = Residency.AUTO,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Generate text, and say how fast and in how much memory.

    Text goes to stdout as it comes, everything else to stderr. Greedy: the same prompt gives the same text.
    A chat model gets the prompt as one turn of a user. Any MODEL will do.
    """
    out.configure(json, quiet, verbose)
    text = sys.stdin.read() if prompt == "-" else prompt
    if any("\ud800" <= c <= "\udfff" for c in text):  # how Python passes on bytes that are not UTF-8
        raise UsageError("the prompt is not UTF-8 text", "give text, or convert it: `iconv -t UTF-8`")
    if not text.strip():
        raise UsageError("the prompt is empty", "give some text, or `-` to read it from stdin")
    from tcw.runtime.generate import generate
    from tcw.runtime.load import load, tokenizer
    from tcw.source import open_source

    with out.progress() as progress:
        source = open_source(artifact, progress=progress)
    model = load(source, residency=residency.value, device=device)
    _check_speaks(model, source.id)
    found = generate(model, tokenizer(source), text, max_new_tokens, on_text=out.stream)
    if out.mode != "json" and not found.text.endswith("\n"):
        out.stream("\n")
    if out.mode == "json":
        out.result(found.to_json(), lambda: None, "")
    out.note(
        f"\n{len(found.tokens)} tokens, {found.tokens_per_second:.1f} a second, "
        f"the first after {show_seconds(found.prefill_seconds)}, peak memory {show_bytes(found.peak_memory_bytes)}"
    )


def _check_speaks(model: Any, name: str) -> None:
    """Refuse a model that does not go on from a text, before it trips over one."""
    starts = model.generation_config if model.can_generate() else None
    if starts is None or model.main_input_name != "input_ids":
        raise UsageError(
            f"`{name}` ({type(model).__name__}) does not go on from a text", "`tcw verify` runs any kind of model"
        )
    if model.config.is_encoder_decoder and starts.decoder_start_token_id is None and starts.bos_token_id is None:
        raise UsageError(
            f"`{name}` does not say which token its decoder starts with",
            "put `decoder_start_token_id` into its generation_config.json",
        )
