"""Buffers that are no weights: what becomes of them where a run begins with the weights of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from adapters import adapter_class
from naming import shorten

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.run.source import Source
    from trainer.session import Session

__all__ = ["with_own_fits"]


def with_own_fits(
    s: Session, source: Source, state: dict[str, Tensor], note: Callable[[str], None]
) -> dict[str, Tensor]:
    """`state`, the model of `source`, as this run may take it: without what the other run was fitted to, and
    with what this one is (`ModelAdapter.fitted`). What was fitted to the text comes with the weights where that is
    the same; and always where they are only scored, as it belongs to the law that they were trained with."""
    own, theirs = s.adapter.trained_state(), adapter_class(source.config(note)[0])
    saved = source.data or {}
    now = {"fingerprint": s.dataset.fingerprint, "tokenizer_digest": s.dataset.tokenizer.digest}
    same_text = s.cfg.eval_only or all(saved.get(key) == value for key, value in now.items())
    state = dict(state)
    for name, kind in {**theirs.fitted, **s.adapter.fitted}.items():
        given = state.pop(name, None)
        if name not in own:
            continue
        brought = given is not None and kind == "text" and same_text
        state[name] = given if given is not None and brought else own[name]
        if kind == "run":
            note(f"{name} starts anew: it is fitted to a run")
        else:
            note(
                f"{name} {'comes with the weights' if brought else 'is fitted anew, to the text of this run'}"
            )
    whole = s.adapter.with_added(state)
    if len(whole) > len(state):
        note(
            f"what {s.cfg.type} adds to {source.type} starts anew: {shorten([n for n in whole if n not in state])}"
        )
    return whole
