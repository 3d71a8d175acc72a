"""Which layer does what: lists of a record laid over a depth that may be another.

Layer i of a record's L becomes layer floor(i (L' - 1) / (L - 1) + 1/2) of L'. Where several fall onto one the list has
it once, and of two lists that exclude each other (paired heads have no layer of exclusive attention or of composed
heads) the one whose place lies nearer has it. With fewer than 8 layers none loses its attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["LEAST_SKIPPING", "Layout", "Stretch"]

LEAST_SKIPPING = 8  # layers, so that one may go without attention


@dataclass(frozen=True)
class Stretch:
    """From a record of `layers` to a model of `depth`."""

    layers: int
    depth: int

    def exact(self, layer: int) -> float:
        return layer * (self.depth - 1) / max(1, self.layers - 1)

    def __call__(self, layer: int) -> int:
        steps = max(1, self.layers - 1)
        return (2 * layer * (self.depth - 1) + steps) // (2 * steps)

    def all(self, layers: Iterable[int], without: Iterable[int] = ()) -> list[int]:
        gone = set(without)
        return [layer for layer in dict.fromkeys(map(self, layers)) if layer not in gone]

    def away(self, layer: int, origins: Iterable[int]) -> float:
        """How far the nearest origin's place lies from `layer`, of those that became it."""
        return min(
            (abs(self.exact(i) - layer) for i in origins if self(i) == layer), default=float(self.layers)
        )


@dataclass(frozen=True)
class Layout:
    """Layers from 0. States are counted by boundaries: 0 is what enters layer 0, i + 1 what leaves layer i.

    `tables`: of each layer with a value embedding, which table. `skip`: (boundary, layer that adds it). `late`:
    (boundary, layers whose attention reads it). `gates_from`: the first layer whose gates are computed from its own
    input, those before it from x0. `mixed`: boundaries that the last layer mixes into its input and its values;
    `exit_mix`: (boundary, start) of what is mixed behind it.
    """

    depth: int
    skipping: tuple[int, ...]
    long: tuple[int, ...]
    paired: tuple[int, ...]
    xsa: tuple[int, ...]
    gated: tuple[int, ...]
    composed: tuple[int, ...]
    tables: dict[int, int]
    skip: tuple[int, int] | None
    late: tuple[int, tuple[int, ...]] | None
    gates_from: int
    mixed: tuple[int, ...]
    exit_mix: tuple[tuple[int, float], ...]

    @property
    def kept(self) -> set[int]:
        """Boundaries whose states later layers read."""
        found = {*self.mixed, *(boundary for boundary, _ in self.exit_mix)}
        return found | {part[0] for part in (self.skip, self.late) if part is not None}

    def in_words(self) -> str:
        """Which layers have what, of all that some have."""
        lists = {
            "without attention": self.skipping,
            "long windows": self.long,
            "paired heads": self.paired,
            "exclusive attention": self.xsa,
            "gated heads": self.gated,
            "composed heads": self.composed,
            "values looked up": tuple(self.tables),
            "skip from the state behind layer": () if self.skip is None else (self.skip[0] - 1,),
            "which is added in": () if self.skip is None else (self.skip[1],),
            "attention to an earlier state in": () if self.late is None else self.late[1],
        }
        return ", ".join(f"{name} {' '.join(map(str, layers))}" for name, layers in lists.items() if layers)
