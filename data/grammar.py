"""Sentences from a small context-free grammar over English words, of exactly known entropy.

Subjects and verbs agree in number across relative clauses, so a good score needs more than neighbours. The
grammar is LL(1), which is checked when it is built: one word decides the rule, so every sentence has one
derivation, and the entropy of derivations is the entropy of strings. Samples can be parsed: the share of
valid sentences means the same for every kind of model.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np

DOCUMENT_SENTENCES = 48  # about 2 KB
END = "."
TEXT_SEED = 2022


class Alternative(NamedTuple):
    """One right-hand side: probability and symbols. Names of rules are in capitals, words are not."""

    probability: float
    symbols: tuple[str, ...]


def _words(names: str) -> list[Alternative]:
    listed = names.split()
    return [Alternative(1 / len(listed), (name,)) for name in listed]


def _alternatives(*listed: tuple[float, str]) -> list[Alternative]:
    return [Alternative(probability, tuple(symbols.split())) for probability, symbols in listed]


_VERBS = {
    "INTRANSITIVE": ("sleeps waits sings falls", "sleep wait sing fall"),
    "TRANSITIVE": ("sees follows likes finds carries", "see follow like find carry"),
    "REPORTING": ("says knows hopes", "say know hope"),
}
RULES: dict[str, list[Alternative]] = {
    "SENTENCE": _alternatives((1.0, f"CLAUSE {END}")),
    "CLAUSE": _alternatives((0.6, "ONE VERB-ONE"), (0.4, "MANY VERB-MANY")),
    "ONE": _alternatives((1.0, "DET-ONE BODY-ONE")),
    "MANY": _alternatives((1.0, "DET-MANY BODY-MANY")),
    "OBJECT": _alternatives((0.7, "ONE"), (0.3, "MANY")),
    "DET-ONE": _alternatives((0.5, "a"), (0.3, "this"), (0.2, "every")),
    "DET-MANY": _alternatives((0.5, "some"), (0.3, "these"), (0.2, "many")),
    "ADJECTIVE": _words("big small red quiet happy clever"),
    "NOUN-ONE": _words("cat dog bird child farmer queen"),
    "NOUN-MANY": _words("cats dogs birds children farmers queens"),
}
for _number in ("ONE", "MANY"):
    RULES[f"BODY-{_number}"] = _alternatives(
        (0.3, f"ADJECTIVE BODY-{_number}"), (0.7, f"NOUN-{_number} RELATIVE-{_number}")
    )
    RULES[f"RELATIVE-{_number}"] = _alternatives((0.8, ""), (0.2, f"that VERB-{_number}"))
    RULES[f"VERB-{_number}"] = _alternatives(
        (0.4, f"INTRANSITIVE-{_number}"),
        (0.45, f"TRANSITIVE-{_number} OBJECT"),
        (0.15, f"REPORTING-{_number} that CLAUSE"),
    )
for _kind, (_one, _many) in _VERBS.items():
    RULES[f"{_kind}-ONE"], RULES[f"{_kind}-MANY"] = _words(_one), _words(_many)


class GrammarSource:
    """The language of `rules`, from `SENTENCE`. A document is lines, a sentence each.

    `bits_per_sentence` and `bytes_per_sentence` are exact expectations, `entropy_bits_per_byte` their ratio.
    """

    def __init__(self, rules: dict[str, list[Alternative]] | None = None):
        self.rules = RULES if rules is None else rules
        self._table = _parsing_table(self.rules)
        self.bits_per_sentence, self.bytes_per_sentence = self._expectations()
        self.entropy_bits_per_byte = self.bits_per_sentence / self.bytes_per_sentence

    def _expectations(self) -> tuple[float, float]:
        """Solve H(A) = sum_r p_r (-log2 p_r + sum of H over r's symbols), and the same for lengths."""
        index = {name: place for place, name in enumerate(self.rules)}
        matrix = np.eye(len(index))
        constants = np.zeros((len(index), 2))
        for name, alternatives in self.rules.items():
            for probability, symbols in alternatives:
                constants[index[name], 0] -= probability * math.log2(probability)
                for symbol in symbols:
                    if symbol in index:
                        matrix[index[name], index[symbol]] -= probability
                    else:  # every word has a blank or the full stop behind it; the full stop a line end
                        constants[index[name], 1] += probability * (
                            len(symbol) if symbol == END else len(symbol) + 1
                        )
        bits, length = np.linalg.solve(matrix, constants)[index["SENTENCE"]]
        return float(bits), float(length)

    def sample(self, n_documents: int, stream: int) -> list[bytes]:
        """Documents of `DOCUMENT_SENTENCES` sentences; different streams are independent."""
        generator = random.Random(f"{TEXT_SEED}/{stream}")
        return [
            "".join(self._sentence(generator) for _ in range(DOCUMENT_SENTENCES)).encode()
            for _ in range(n_documents)
        ]

    def _sentence(self, generator: random.Random) -> str:
        words, stack = [], ["SENTENCE"]
        while stack:
            symbol = stack.pop()
            if symbol not in self.rules:
                words.append(symbol)
                continue
            draw, alternatives = generator.random(), self.rules[symbol]
            for chosen in alternatives:
                draw -= chosen.probability
                if draw < 0:
                    break
            stack.extend(reversed(chosen.symbols))
        return _spell(words)

    def nats(self, text: bytes) -> float:
        """-ln p of a document of whole sentences, their number given; infinite for any other text."""
        sentences = text.decode("utf-8", "replace").split("\n")
        if sentences.pop():  # something behind the last line end
            return math.inf
        return sum(self.sentence_nats(sentence) for sentence in sentences)

    def sentence_nats(self, sentence: str) -> float:
        """-ln p of one sentence without its line end; infinite if the grammar does not derive it."""
        words = sentence.removesuffix(END).split(" ")
        if not sentence.endswith(END):
            return math.inf
        words.append(END)
        stack, nats, place = ["SENTENCE"], 0.0, 0
        while stack:
            symbol, word = stack.pop(), words[min(place, len(words) - 1)]
            if symbol in self.rules:
                chosen = self._table[symbol].get(word)
                if chosen is None:
                    return math.inf
                nats -= math.log(chosen.probability)
                stack.extend(reversed(chosen.symbols))
            elif symbol == word and place < len(words):
                place += 1
            else:
                return math.inf
        return nats if place == len(words) else math.inf

    def valid_fraction(self, text: str | bytes) -> float:
        """The share of complete lines of a text that are sentences of the language; 0 without any."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        lines = text.split("\n")[:-1]
        return sum(math.isfinite(self.sentence_nats(line)) for line in lines) / len(lines) if lines else 0.0


def _spell(words: list[str]) -> str:
    return " ".join(words[:-1]) + words[-1] + "\n"


def _parsing_table(rules: dict[str, list[Alternative]]) -> dict[str, dict[str, Alternative]]:
    """LL(1) table: rule name and next word -> the one alternative. AssertionError if two alternatives claim a word."""
    empty, first = _first_sets(rules)
    follow = _follow_sets(rules, empty, first)
    table: dict[str, dict[str, Alternative]] = {}
    for name, alternatives in rules.items():
        row: dict[str, Alternative] = {}
        for alternative in alternatives:
            words, vanishes = _first_of(alternative.symbols, empty, first)
            for word in words | (follow[name] if vanishes else set()):
                assert word not in row, f"grammar is not LL(1): {name} before {word!r}"
                row[word] = alternative
        table[name] = row
    return table


def _first_of(symbols: tuple[str, ...], empty: set[str], first: dict[str, set[str]]) -> tuple[set[str], bool]:
    """Words that can begin `symbols`, and whether all of them can be empty."""
    words: set[str] = set()
    for symbol in symbols:
        words |= first.get(symbol, {symbol})
        if symbol not in empty:
            return words, False
    return words, True


def _first_sets(rules: dict[str, list[Alternative]]) -> tuple[set[str], dict[str, set[str]]]:
    empty: set[str] = set()
    first: dict[str, set[str]] = {name: set() for name in rules}
    before = None
    while before != (before := (len(empty), [len(words) for words in first.values()])):
        for name, alternatives in rules.items():
            for alternative in alternatives:
                words, vanishes = _first_of(alternative.symbols, empty, first)
                first[name] |= words
                if vanishes:
                    empty.add(name)
    return empty, first


def _follow_sets(
    rules: dict[str, list[Alternative]], empty: set[str], first: dict[str, set[str]]
) -> dict[str, set[str]]:
    follow: dict[str, set[str]] = {name: set() for name in rules}
    before = None
    while before != (before := [len(words) for words in follow.values()]):
        for name, alternatives in rules.items():
            for _, symbols in alternatives:
                for place, symbol in enumerate(symbols):
                    if symbol in rules:
                        words, vanishes = _first_of(symbols[place + 1 :], empty, first)
                        follow[symbol] |= words | (follow[name] if vanishes else set())
    return follow
