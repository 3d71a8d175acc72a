"""Drafters that say what a test wants, before models that verify them."""

import functools

import torch

from models.layers.drafter import Drafter


class Planted:
    """Drafts from the logits (V,) that `tell(text)` gives of what follows a row's window; any model with a cache."""

    def __init__(self, model, rows, tell):
        self.model, self.tell = model, tell
        self.cache = model.init_cache(rows)
        self.text = torch.empty(rows, 0, dtype=torch.int64)

    @property
    def length(self):
        return self.cache.length

    def read(self, tokens):
        self.before = self.cache.snapshot()
        return self.model(tokens, cache=self.cache)

    def draft(self, depth, tokens, at):
        self.tokens = tokens
        ends = (at + 1 + depth).tolist()
        rows = zip(self.text, tokens, ends, strict=True)
        return torch.stack([self.tell(torch.cat((old, new[:end]))) for old, new, end in rows])

    def forget(self, length):
        self.cache.restore(self.before)
        more = self.tokens[:, : length - self.text.shape[1]]
        if more.shape[1]:
            self.model(more, cache=self.cache)
        self.text = torch.cat((self.text, more), 1)

    def select(self, rows):
        self.cache.select(rows)
        self.text = self.text[rows]


def plant(adapter, tell, most=3):
    """Let an adapter's model draft by `tell(text) -> (V,)`, up to `most` tokens ahead. Returns the adapter."""

    def init_drafter(rows, drafts) -> Drafter:
        return Planted(adapter.model, rows, tell)

    adapter.model.max_drafts, adapter.model.init_drafter = most, init_drafter
    return adapter


def own(model):
    """What the model itself says: an oracle."""

    @functools.cache  # rows and runs ask about the same texts
    def told(text):
        window = torch.tensor([text[-(model.max_context or len(text)) :]])
        return model.logits(model(window))[0, -1]

    return lambda text: told(tuple(text.tolist()))


def wrong(model):
    """Whatever the model finds least likely."""
    tell = own(model)
    return lambda text: -tell(text)


def by_chance(model, seed=0, strength=1.0):
    """What the model says, disturbed by noise that is a function of the text."""
    tell = own(model)

    def told(text):
        key = seed + sum((i + 1) * int(token) for i, token in enumerate(text))
        logits = tell(text)
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(key), dtype=logits.dtype)
        return logits + strength * noise * logits.std()

    return told
