"""Which implementation of an operation runs: the one rule, and what came of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from kernels import AUTO, CHUNKED, CLOSED_FORM, CPP, KERNELS, REFERENCE, TRITON, cpp, problems
from kernels import device as devices
from kernels.device import Gpu, gpu_of
from kernels.precision import at_least_fp32
from kernels.tuned import verdict
from naming import load

__all__ = ["MIN_CHUNK_ROWS", "SPARING", "Call", "Kernels", "UsesKernels", "rows_at_once"]

# Fewer rows make the matrix products inefficient, and each chunk passes over the head and its gradient: V = 50,257,
# D = 768, bf16, CPU: 10.5 s in chunks of 128 rows, 9.8 of 256, 8.1 of 512.
MIN_CHUNK_ROWS = 512
TILE_ROWS = 128  # of matrix products on a GPU
SPARING = "sparing"  # a fact of calls that are to keep no logits until the backward, as others follow

# Functions of implementations, as attributes `<operation>__<name>`. No dictionary: the compiler looks at one as it was
# when the first operation of a graph was met, and would miss the next one's.
_loaded = SimpleNamespace()


@dataclass(frozen=True)
class Call:
    """What the rule may look at. `dtype` of the matrix products, or of what is read (None: unknown); `rows` and
    `columns` of the logits, or rows (0: unknown) and width; `compiling`: inside a compiled block; `facts`: what else a
    row of the table asks for.
    """

    device: torch.device
    dtype: torch.dtype | None
    rows: int = 0
    columns: int = 0
    compiling: bool = False
    facts: tuple[str, ...] = ()

    @property
    def gpu(self) -> Gpu | None:
        return gpu_of(self.device)


class Kernels:
    """The field `kernels` of one run, and a record of what its operations used.

    It belongs to the run's adapter, which hands it to every operation it calls, and to the layers that call some
    (`UsesKernels`): two runs in one process have nothing in common. `wanted` maps `default` and operations to an
    implementation or "auto". An operation's own entry is followed or refused; the default is followed where it can be.
    With a `device`, entries that cannot be followed there are refused at once.
    """

    def __init__(
        self,
        wanted: Mapping[str, str] | None = None,
        *,
        deterministic: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.wanted = {"default": AUTO, **(wanted or {})}
        if wrong := problems(self.wanted):
            raise ValueError("; ".join(wrong))
        self.deterministic = deterministic
        self.used: dict[str, dict[str, str]] = {}  # operation -> implementation -> why, the first time
        # What compiled code is guarded by: with another field, blocks are compiled anew.
        self._key = f"{sorted(self.wanted.items())} {deterministic}"
        self._known: dict[
            tuple[Any, ...], Callable[..., Any]
        ] = {}  # what was chosen, outside of compiled code
        if device is not None and device.type != "meta":
            for op, name in self.wanted.items():
                if op != "default" and name != AUTO:
                    self._require(op, name, Call(device, None))

    def with_choice(self, op: str, name: str) -> Kernels:
        """The same with this implementation of an operation."""
        return Kernels({**self.wanted, op: name}, deterministic=self.deterministic)

    def __deepcopy__(self, memo: Any) -> Kernels:
        return self

    def choose(self, op: str, call: Call) -> str:
        """The implementation that this call of `op` takes; it is recorded."""
        name, why = self.foresee(op, call)
        self.used.setdefault(op, {}).setdefault(name, why)
        return name

    def implementation(
        self,
        op: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        rows: int = 0,
        columns: int = 0,
        facts: tuple[str, ...] = (),
    ) -> Callable[..., Any]:
        """The function that `choose` names. Compiled code takes it as it was when it was compiled; there, `rows` and
        `columns` must not vary."""
        if torch.compiler.is_compiling():
            return getattr(_loaded, self._name(self._key, op, True, device, dtype, rows, columns, facts))
        # Norms ask some dozens of times in a step. Numbers of rows may be drawn anew in every one: those are not kept.
        call = op, device, dtype, columns, facts
        run = None if rows or op not in self.used else self._known.get(call)
        if run is None:
            run = getattr(_loaded, self._name(self._key, op, False, device, dtype, rows, columns, facts))
            if not rows:
                self._known[call] = run
        return run

    @torch.compiler.assume_constant_result
    def _name(
        self,
        key: str,
        op: str,
        compiling: bool,
        device: torch.device,
        dtype: torch.dtype,
        rows: int,
        columns: int,
        facts: tuple[str, ...],
    ) -> str:
        name = self.choose(op, Call(device, dtype, rows, columns, compiling, facts))
        attribute = f"{op}__{name}"
        setattr(_loaded, attribute, load(KERNELS[op].implementations[name].where))
        return attribute

    def foresee(self, op: str, call: Call) -> tuple[str, str]:
        """(implementation, why) of such a call, without a record. ValueError where what is asked for cannot be."""
        kernel = KERNELS[op]
        own, default = self.wanted.get(op), self.wanted["default"]
        if own not in (None, AUTO):
            self._require(op, own, call)
            return own, f"kernels.{op}"
        if own == AUTO or default == AUTO:
            return self._automatic(op, call)
        if default not in kernel.implementations:
            lacking = "there is none"
        elif not (lacking := self.lacking(op, default, call)):
            return default, "kernels.default"
        name, why = self._automatic(op, call)
        return name, f"{why}; kernels.default={default}: {lacking}"

    def lacking(self, op: str, name: str, call: Call) -> str:
        """Why this implementation cannot run such a call; "" if it can."""
        way = KERNELS[op].implementations[name]
        interpreted = name == TRITON and call.device.type == "cpu" and devices.interpreting()
        if way.package and not _installed(way.package):
            return f"the package {way.package} is not installed"
        if way.devices and call.device.type not in way.devices and not interpreted:
            hint = " (with TRITON_INTERPRET=1 it is interpreted, slowly)" if name == TRITON else ""
            return f"it runs on {', '.join(way.devices)}, and this is {call.device.type}{hint}"
        if call.gpu is not None and call.gpu.capability < way.capability:
            return f"it needs sm_{way.capability[0]}{way.capability[1]}, and this is {call.gpu.name}"
        if (
            way.dtypes
            and call.dtype is not None
            and (dtype := str(call.dtype).removeprefix("torch.")) not in way.dtypes
        ):
            return f"it computes {', '.join(way.dtypes)}, and this is {dtype}"
        if way.adds_in_any_order and self.deterministic:
            return "it adds floats in no fixed order, and deterministic=true"
        if way.source and (missing := cpp.missing(way.source)):
            return missing
        return (load(way.refuses)(call) if way.refuses else None) or ""

    def _require(self, op: str, name: str, call: Call) -> None:
        if lacking := self.lacking(op, name, call):
            others = [other for other in KERNELS[op].implementations if not self.lacking(op, other, call)]
            raise ValueError(
                f"kernels.{op}={name} is not possible here: {lacking}. Possible: {', '.join([AUTO, *others])}"
            )

    def _automatic(self, op: str, call: Call) -> tuple[str, str]:
        kernel = KERNELS[op]
        if kernel.rule is not None:
            name, why = load(kernel.rule)(call, lambda name: self.lacking(op, name, call))
            return name, f"auto: {why}"
        if call.compiling and kernel.compiled_with_neighbours:
            return REFERENCE, "auto: the compiler fuses it with its neighbours"
        why_not = ""
        if TRITON in kernel.implementations and call.device.type == "cuda":
            why_not = self.lacking(op, TRITON, call)
            if not why_not:
                fast, said = verdict(op, TRITON, call.gpu)
                if fast or kernel.for_memory:
                    return TRITON, f"auto: {said if fast else 'logits of all rows never exist'}"
                why_not = said
        because = f"; not {TRITON}: {why_not}" if why_not else ""
        if CPP in kernel.implementations and call.device.type == "cpu":
            if not (why_not := self.lacking(op, CPP, call)):
                return CPP, "auto: in one pass over memory"
            because = f"; not {CPP}: {why_not}"
        if CLOSED_FORM in kernel.implementations and not self.lacking(op, CLOSED_FORM, call):
            return CLOSED_FORM, f"auto: its gradient by formula, in fewer passes{because}"
        if CHUNKED not in kernel.implementations:
            return REFERENCE, f"auto: the plain definition{because}"
        assert call.dtype is not None, "auto chooses for calls, and these have one"
        shape = call.columns, call.device, at_least_fp32(call.dtype)
        fits_at_once = kernel.plain_bytes and SPARING not in call.facts
        if fits_at_once and call.rows <= _rows_of(kernel.plain_bytes, *shape):
            return REFERENCE, f"auto: logits of {call.rows:,} rows fit at once{because}"
        return CHUNKED, f"auto: logits of {rows_at_once(op, *shape):,} rows at a time{because}"

    @property
    def host_syncs(self) -> tuple[str, ...]:
        """Operations that wait for an accelerator in the implementations that were used so far."""
        ways = (KERNELS[op].implementations[name] for op, used in self.used.items() for name in used)
        return tuple(dict.fromkeys(wait for way in ways for wait in way.host_syncs))

    def unread(self, ops: Iterable[str]) -> list[str]:
        """Operations that have an entry, and are none of those that the run has."""
        return sorted(self.wanted.keys() - {"default", *ops})


class UsesKernels(nn.Module):
    """A layer that calls operations of kernels/ hands them `self.kernels`: the run's, once the adapter has set it."""

    kernels = Kernels()

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        """Operations that a forward pass over rows of `seq_len` tokens calls -> what `Kernels.foresee` may know of it:
        `columns`, `facts`. Said of a run before it starts; nothing depends on it."""
        return {}


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def rows_at_once(op: str, columns: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows of a chunk, whose logits are held in `dtype`: whole tiles of the products, where there are so many."""
    return _rows_of(KERNELS[op].chunk_bytes, columns, device, dtype)


def _rows_of(sizes: Mapping[str, int], columns: int, device: torch.device, dtype: torch.dtype) -> int:
    budget = sizes.get(device.type, sizes["cuda"])
    rows = budget // (dtype.itemsize * columns)
    return max(MIN_CHUNK_ROWS, rows - rows % TILE_ROWS if rows > TILE_ROWS else rows)
