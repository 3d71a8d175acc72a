"""What a model did with a text, in a form that anybody can draw: stretches of the text, and maps.

Places are those of the L tokens of the text (bytes, of models that read these), from 0; the start token before them has
none. Shapes: L tokens, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Annotation", "Map", "Span", "Spans"]


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `end` - 1 of the text. `label`: what they are, where there is more than one kind; equal labels
    are drawn in one colour, spans without one in two by turns."""

    start: int
    end: int
    label: str = ""


@dataclass(frozen=True)
class Spans:
    """Stretches of the text in their order, none within another. What lies between them is not marked. `name`: whose
    they are, and what is marked, as people read it ("layer 3: the expert that weighs most").

    Raises:
        ValueError: one is empty, or begins before the end of the one before.
    """

    name: str
    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        before = 0
        for span in self.spans:
            if not before <= span.start < span.end:
                raise ValueError(
                    f"{self.name}: a span goes from {span.start} to {span.end}; it must begin at {before} or later, "
                    f"where the one before ends, and end behind its start"
                )
            before = span.end

    @classmethod
    def by_token(cls, name: str, labels: Sequence[str | None]) -> Spans:
        """One for each token that has a label; labels (L,)."""
        marked = [(place, label) for place, label in enumerate(labels) if label is not None]
        return cls(name, tuple(Span(place, place + 1, label) for place, label in marked))


@dataclass(frozen=True, eq=False)
class Map:
    """`values` (R, C), of any real type or bool, 0 and more: how much row r has to do with column c. `rows`, `columns`:
    what one of them is, as people read it ("expert", "block of keys"). Labels are the rows' and columns' own; None:
    they are the tokens of the text, one each.

    Raises:
        ValueError: values are no matrix, not finite or negative, or labels are not one for each.
    """

    name: str
    values: Tensor
    rows: str
    columns: str
    row_labels: tuple[str, ...] | None = None
    column_labels: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or not self.values.numel():
            raise ValueError(f"{self.name}: values must be (R, C), got {tuple(self.values.shape)}")
        # NaN is neither.
        if not bool(((self.values >= 0) & (self.values < torch.inf)).all()):
            raise ValueError(f"{self.name}: values must be finite and not negative")
        for what, labels, size in zip(("row", "column"), self.labels, self.values.shape, strict=True):
            if labels is not None and len(labels) != size:
                raise ValueError(f"{self.name}: {len(labels)} {what}_labels for {size} {what}s; give {size}")

    @property
    def labels(self) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
        return self.row_labels, self.column_labels


@dataclass(frozen=True)
class Annotation:
    """All that there is to draw, in the order in which it is drawn; nothing by default."""

    spans: tuple[Spans, ...] = ()
    maps: tuple[Map, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.spans or self.maps)

    def check(self, length: int) -> None:
        """ValueError where this is not of a text of `length` tokens."""
        for one in self.spans:
            if one.spans and one.spans[-1].end > length:
                raise ValueError(
                    f"{one.name}: a span ends at {one.spans[-1].end}, and the text has {length} tokens"
                )
        for of in self.maps:
            for what, labels, size in zip(("rows", "columns"), of.labels, of.values.shape, strict=True):
                if labels is None and size != length:
                    raise ValueError(
                        f"{of.name}: {size} {what} are not the {length} tokens of the text. The start token has none; "
                        f"{what} that are something else have {what[:-1]}_labels"
                    )
