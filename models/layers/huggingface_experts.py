"""Experts as the files of Hugging Face transformers have them: one tensor for each matrix. Its classes, from version 5
on, hold those of a layer stacked, gate and up as one; a state dict of theirs is read too.

Shapes: E experts, f hidden width of one, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import EllipsisType

from torch import Tensor

__all__ = ["Single", "single"]

Index = tuple[int | slice | EllipsisType, ...]


def single(name: str, t: Tensor, names: Mapping[str, str]) -> dict[str, Tensor]:
    """A tensor of ours under their name: `layers.0.mlp.experts.up_proj` (E, f, D) as views `layers.0.block_sparse_moe.
    experts.2.w3.weight` (f, D) and so on; what is no stack as one. `names`: ours -> theirs (`Row.experts`)."""
    name = _renamed(name, names)
    layer, within, matrix = name.partition(".experts.")
    if not within:
        return {name: t}
    return {f"{layer}.experts.{e}.{names[matrix]}.weight": part for e, part in enumerate(t.unbind())}


class Single(Mapping[str, Tensor]):
    """Weights of files or of a state dict, stacks taken apart. Tensors are read when they are asked for."""

    def __init__(self, hf: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._hf = hf
        self._where: dict[
            str, tuple[str, Index]
        ] = {}  # our name for it -> theirs, and its part of that tensor
        for name in hf:
            known = _renamed(name, names)
            layer, within, matrix = known.partition(".experts.")
            if within and matrix == "gate_up_proj" and hf[name].ndim == 3:
                half = hf[name].shape[1] // 2
                for part, rows in (("gate_proj", slice(half)), ("up_proj", slice(half, None))):
                    self._spread(name, f"{layer}.experts", names[part], (rows,))
            elif within and matrix == "down_proj" and hf[name].ndim == 3:
                self._spread(name, f"{layer}.experts", names["down_proj"], ())
            else:
                self._where[known] = name, (...,)

    def _spread(self, name: str, experts: str, matrix: str, rows: Index) -> None:
        for e in range(len(self._hf[name])):
            self._where[f"{experts}.{e}.{matrix}.weight"] = name, (e, *rows)

    def __getitem__(self, name: str) -> Tensor:
        theirs, part = self._where[name]
        return self._hf[theirs][part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    return name.replace(".mlp.", f".{names['mlp']}.")
