"""Tokenizers in the form of Hugging Face: what its folders hold, and a byte-level one of ours as tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data.huggingface.alphabet import spelled

if TYPE_CHECKING:
    from data.tokenizers import Tokenizer

__all__ = ["byte_level_json", "huggingface_files", "merges_of"]

# Of all classes the one that takes tokenizer.json as it is: those of an architecture (GPT2Tokenizer, LlamaTokenizer)
# make another one of its vocabulary in transformers 5.
CLASS = "PreTrainedTokenizerFast"


def huggingface_files(tokenizer: Tokenizer, model_max_length: int | None) -> dict[str, dict[str, Any]] | None:
    """The JSON files of a tokenizer by name, as `AutoTokenizer` opens them; None where it has no such form.

    `model_max_length`: the context of the model in tokens; None where there is no end to it.
    """
    content = tokenizer.to_huggingface()
    if content is None:
        return None
    config = {
        "clean_up_tokenization_spaces": False,  # text comes out as the model wrote it
        **tokenizer.huggingface_config,
        **({} if model_max_length is None else {"model_max_length": model_max_length}),
        "tokenizer_class": CLASS,
    }
    return {"tokenizer.json": content, "tokenizer_config.json": config}


def byte_level_json(
    tokens: Sequence[bytes], special_tokens: Mapping[str, int], pattern: str | None = None
) -> dict[str, Any]:
    """The content of a tokenizer.json with these byte strings as ids 0, 1, ..., and the special tokens
    behind them.

    `pattern` splits text into words, None not at all; in each the pair whose joint is the earliest token is merged,
    until there is none.
    """
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    alphabet = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocabulary = {spelled(token): index for index, token in enumerate(tokens)}
    if sorted(special_tokens.values()) != list(range(len(tokens), len(tokens) + len(special_tokens))):
        vocabulary |= special_tokens  # the library numbers added tokens on, unless the vocabulary has them
    steps = [alphabet] if pattern is None else [split, alphabet]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **special} for token, i in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": alphabet,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # as tiktoken: a word that is a token is that token
            "vocab": vocabulary,
            "merges": [[spelled(left), spelled(right)] for left, right in merges_of(tokens)],
        },
    }


def merges_of(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pairs that tiktoken merges, the first to be merged first: any two tokens that together are one, by its id."""
    known = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(left, right) for left, right in halves if left in known and right in known]
        merges += sorted(pairs, key=lambda pair: (known[pair[0]], known[pair[1]]))
    return merges
