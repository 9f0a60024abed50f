"""Define an operation of torch that has a kernel: `torch.ops.tcw.<name>`, on a processor, on a GPU, and for its shapes.

torch.library.custom_op does the same with a layer in Python for gradients, which these operations do not have: a call
takes 42 µs there and 15 µs so (AMD EPYC, torch 2.13), and a model of 8 B parameters makes some 200 calls for a token.
"""

from collections.abc import Callable, Sequence

import torch

_LIBRARY = torch.library.Library("tcw", "FRAGMENT")  # kept: what it defines goes when it goes


def define(name: str, *, cpu: Callable, cuda: Callable, fake: Callable, mutates: Sequence[str] = ()) -> None:
    """Define `tcw::name`, once.

    Args:
        name: of the operation.
        cpu: what runs on a processor; its annotations are the schema.
        cuda: what runs on a GPU.
        fake: gives the result's shape, dtype and device without its values, for torch.compile and the like.
        mutates: names of arguments that are written.
    """
    schema = torch.library.infer_schema(cpu, mutates_args=tuple(mutates))
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"tcw::{name}", fake, lib=_LIBRARY)
