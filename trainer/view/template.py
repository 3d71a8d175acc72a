"""Pages that need nothing but themselves: a template of the assets with its parts."""

from __future__ import annotations

from html import escape
from pathlib import Path

__all__ = ["filled"]

_ASSETS = Path(__file__).parent / "assets"


def filled(template: str, title: str, styles: tuple[str, ...], script: str, **parts: str) -> str:
    """`<template>.html` with STYLE, SCRIPT and TITLE, and the parts that are given; those that are not are empty."""
    text = _asset(f"{template}.html")
    known = parts | {
        "TITLE": escape(title),
        "STYLE": "".join(_asset(f"{name}.css") for name in styles),
        "SCRIPT": _asset(f"{script}.js"),
    }
    # One pass over the template, so that a placeholder's name inside a sample stays what it is.
    head, *rest = text.split("{{")
    for piece in rest:
        name, _, tail = piece.partition("}}")
        head += known.get(name, "") + tail
    return head


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
