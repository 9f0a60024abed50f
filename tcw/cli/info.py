"""`tcw info`: what a file or folder holds."""

from typing import Annotated

import typer

from tcw.cli import options
from tcw.cli.output import out
from tcw.units import show_bytes, show_count

EXAMPLES = (
    ("an artifact", "tcw info ./smollm2.lossless"),
    ("every tensor of a GGUF file", "tcw info ./model.gguf --tensors"),
    ("for a script", "tcw info ./smollm2.lossless --json"),
)


def info(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="An artifact, a model folder, a .gguf or .safetensors file, or any MODEL."),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Say what a file or folder holds, without loading it."""
    out.configure(json, quiet, verbose)
    from tcw.info import Info, inspect

    found: Info = inspect(path)
    data = found.to_json()

    def show() -> None:
        sizes = data["bytes"]
        out.facts(
            {
                "name": found.id,
                "format": " ".join(filter(None, (found.format, found.version))),
                "model": found.model_type,
                "made from": found.source,
                "methods": ", ".join(found.methods) or None,
                "verdict": found.verdict,
                "parameters": show_count(data["parameters"]),
                "stored": show_bytes(sizes["stored"]),
                "original": show_bytes(sizes["original"]) if sizes["stored"] != sizes["original"] else None,
            }
        )
        out.text()
        if tensors:
            rows = [
                (t.name, t.dtype, "x".join(map(str, t.shape)) or "scalar", show_bytes(t.bytes),
                 show_bytes(t.stored_bytes), t.method)
                for t in found.tensors
            ]  # fmt: skip
            out.table(("tensor", "dtype", "shape", "bytes", "stored", "method"), rows)
        else:
            groups = [
                (g["part"], g["dtype"], g["method"], g["tensors"], show_count(g["parameters"]),
                 show_bytes(g["bytes"]), show_bytes(g["stored_bytes"]))
                for g in found.groups()
            ]  # fmt: skip
            out.table(("part", "dtype", "method", "tensors", "parameters", "bytes", "stored"), groups)

    out.result(data, show, found.format)
