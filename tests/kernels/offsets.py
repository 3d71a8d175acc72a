"""Where a kernel multiplies in 32 bits what may need more: read off what Triton made of it, unoptimised."""

from __future__ import annotations

import re

__all__ = ["narrow_products"]

# A tile is no larger than this; a constant beyond it is a width, by which a row is multiplied.
LARGEST_TILE = 4096
PASSES = (  # operations whose result is derived from a program's number if an operand is
    "arith.addi",
    "arith.subi",
    "arith.muli",
    "arith.divsi",
    "arith.remsi",
    "arith.minsi",
    "arith.maxsi",
    "arith.extsi",
    "arith.trunci",
    "arith.select",
    "tt.splat",
    "tt.broadcast",
    "tt.expand_dims",
    "tt.reshape",
    "tt.trans",
)
LINE = re.compile(r"^\s*(%[\w#]+)(?::\d+)? = \"?([\w.]+)\"?(.*)$")
CONSTANT = re.compile(r"(?:dense<)?(-?\d+)>? : ")


def narrow_products(ttir: str) -> list[str]:
    """Lines that multiply something derived from a program's number by a runtime value or a width, in 32 bits."""
    derived: set[str] = set()
    constants: dict[str, int] = {}
    found = []
    for line in ttir.splitlines():
        text = line.split(" loc(")[0]
        if loop := re.match(r"^\s*(?:%[\w#:]+ = )?scf\.for (%\w+) = (%\w+) to", text):
            if loop[2] in derived:  # a loop that starts at this program's part
                derived.add(loop[1])
            continue
        if not (parts := LINE.match(text)):
            continue
        name, operation, rest = parts.groups()
        operands = re.findall(r"%[\w#]+", rest)
        if operation == "arith.constant":
            if value := CONSTANT.search(rest):
                constants[name] = int(value[1])
        elif operation == "tt.get_program_id":
            derived.add(name)
        elif operation in PASSES:
            if operation == "tt.splat" and operands[0] in constants:
                constants[name] = constants[operands[0]]
            if derived.isdisjoint(operands):
                continue
            derived.add(name)
            tile = any(abs(constants.get(o, LARGEST_TILE + 1)) <= LARGEST_TILE for o in operands)
            if operation == "arith.muli" and re.search(r"\bi32>?$|xi32>$", text.strip()) and not tile:
                found.append(text.strip())
    return found
