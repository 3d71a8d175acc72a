"""Operations worth more than a composition of library calls: one folder each, with its plain definition.

The table of them, as strings: reading it imports no torch. Which implementation runs is decided in kernels/choose.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from naming import Entry, not_one_of

__all__ = ["AUTO", "KERNELS", "REFERENCE", "Kernel", "problems"]

AUTO, REFERENCE = "auto", "reference"


@dataclass(frozen=True)
class Kernel(Entry):
    """One operation on rows of logits.

    `factory` is the function that models and adapters call. `implementations`: name -> "module:function", all of one
    signature; `reference` is the plain definition, with all logits at once. `chunk_bytes`: the size of the logits that
    `chunked` holds, by type of device, in the dtype of statistics; a type that is not named is taken for "cuda".
    `plain_if_one_chunk`: where all rows are one chunk, `auto` takes the reference.
    """

    implementations: Mapping[str, str] = field(default_factory=dict)
    chunk_bytes: Mapping[str, int] = field(default_factory=dict)
    plain_if_one_chunk: bool = False


KERNELS: dict[str, Kernel] = {
    # On a CPU it is a matter of caches: D = 192, V = 1,025, one thread, forward and backward, reference : chunked:
    # 4,096 rows (19 MB) 66 : 67 ms fp32, 33 : 39 bf16; 8,192 rows (38 MB) 185 : 134, 108 : 78; 16,384 rows (75 MB)
    # 377 : 270, 278 : 160. On a GPU it is a matter of memory, and of products large enough.
    "linear_cross_entropy": Kernel(
        "kernels.linear_cross_entropy:linear_cross_entropy",
        description="output layer and cross-entropy",
        implementations={
            REFERENCE: "kernels.linear_cross_entropy.reference:reference",
            "chunked": "kernels.linear_cross_entropy.chunked:chunked",
        },
        chunk_bytes={"cpu": 24 * 2**20, "cuda": 256 * 2**20},
        plain_if_one_chunk=True,
    ),
    # Some modes hold three buffers of this size. On a CPU chunks that stay in its cache are faster: 4,096 rows,
    # V = 1,025, D = 192, one thread, masked cross-entropy: 75 ms in chunks of 1 or 2 MiB, 104 ms in one of 16.
    "linear_diffusion_loss": Kernel(
        "kernels.linear_diffusion_loss:linear_diffusion_loss",
        description="output layer and the losses of discrete diffusion",
        implementations={
            REFERENCE: "kernels.linear_diffusion_loss.reference:reference",
            "chunked": "kernels.linear_diffusion_loss.chunked:chunked",
        },
        chunk_bytes={"cpu": 2 * 2**20, "cuda": 256 * 2**20},
    ),
    # The function holds a handful of tensors of this size, some of them in fp64.
    "linear_function_loss": Kernel(
        "kernels.linear_function_loss:linear_function_loss",
        description="output layer and a loss given as a function of logits",
        implementations={
            REFERENCE: "kernels.linear_function_loss.reference:reference",
            "chunked": "kernels.linear_function_loss.chunked:chunked",
        },
        chunk_bytes={"cuda": 64 * 2**20},
    ),
}


def problems(wanted: Mapping[str, str]) -> list[str]:
    """What is wrong with the field `kernels`: a mapping of `default` and operations to implementations."""
    every = dict.fromkeys(name for kernel in KERNELS.values() for name in kernel.implementations)
    found = []
    for op, name in wanted.items():
        if op != "default" and op not in KERNELS:
            found.append(f"kernels.{op}: {not_one_of(op, ['default', *KERNELS])}")
            continue
        allowed = every if op == "default" else KERNELS[op].implementations
        if name not in (AUTO, *allowed):
            found.append(f"kernels.{op}: {not_one_of(name, [AUTO, *allowed])}")
    return found
